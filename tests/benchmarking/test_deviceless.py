"""Reading registers and spills from an assembler's report."""

import pytest

from longctx_jax.benchmarking import deviceless
from longctx_jax.benchmarking.rows import recorded
from tests.tiny import PROJECT

LOG = """
ptxas info    : Compiling entry function 'loop_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compiling entry function 'decay_attention_walk' for 'sm_90a'
ptxas info    : Function properties for decay_attention_walk
    56 bytes stack frame, 52 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 56 bytes cumulative stack size
ptxas info    : Compiling entry function '_lambda__mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for _lambda__mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_report_keeps_our_kernels_once():
    rows = deviceless.parse_report(LOG + LOG)
    assert rows == [
        {
            "kernel": "decay_attention_walk",
            "registers": 255,
            "spill_store_bytes": 52,
            "spill_load_bytes": 48,
            "stack_bytes": 56,
        },
        {
            "kernel": "_lambda__mosaic_gpu_kernel",
            "registers": 168,
            "spill_store_bytes": 0,
            "spill_load_bytes": 0,
            "stack_bytes": 0,
        },
    ]


def test_no_assembler_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="got none on PATH; install the CUDA toolkit"):
        deviceless.prepare_environment()


@pytest.mark.parametrize(
    ("kernels", "backends"),
    [
        ("decay", {"pallas_triton", "pallas_mosaic_gpu"}),
        ("vq", {"pallas_triton"}),
        ("flash_decoding", {"pallas_triton"}),
    ],
)
def test_committed_report_has_no_spill_above_the_limit(kernels, backends):
    rows = recorded(PROJECT / "results" / f"{kernels}_h200_registers.jsonl")
    assert {row["backend"] for row in rows} == backends
    assert max(row["spill_store_bytes"] for row in rows) <= 64
