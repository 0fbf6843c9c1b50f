"""Compiles GPU kernels for an H200 on a machine without one, and reads registers and spills.

XLA compiles ahead of time for a described device; the assembler `ptxas` is wrapped so that it also
reports what each kernel uses. Needs a jax with its CUDA plugin (0.11 or later; no GPU, no driver)
and `ptxas` on PATH (the CUDA toolkit's; XLA would prefer one from the wheel nvidia-cuda-nvcc, which
must not be installed then).
"""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
runtime_version { major: 12 minor: 8 } platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def prepare_environment() -> pathlib.Path:
    """Sets what XLA reads at its start and returns the assembler's log; call before importing jax.

    Raises:
        FileNotFoundError: if there is no ptxas on PATH.
    """
    assembler = shutil.which("ptxas")
    if assembler is None:
        raise FileNotFoundError(
            "registers are read from ptxas: got none on PATH; install the CUDA toolkit"
        )
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ptxas-"))
    log = folder / "log"
    log.touch()
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ptxas"
    wrapper.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version*) exec "{assembler}" "$@";; esac\n'
        f'"{assembler}" -v "$@" 2>"{log}.$$"; code=$?\n'
        f'cat "{log}.$$" >>"{log}"; cat "{log}.$$" >&2; rm "{log}.$$"; exit $code\n'
    )
    wrapper.chmod(0o755)
    os.environ["PATH"] = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # Mosaic assembles by itself, and says so on stderr
    os.environ["XLA_FLAGS"] = (
        "--xla_gpu_enable_libnvptxcompiler=false --xla_gpu_enable_libnvjitlink=false "
        f"--xla_gpu_cuda_data_dir={folder}"
    )
    return log


def compile_for_h200(
    function: Callable[..., Any], arguments: list[Any], log: pathlib.Path
) -> list[dict[str, Any]]:
    """Returns kernel, registers, spill_store_bytes, spill_load_bytes, stack_bytes of each kernel.

    Args:
        function: to be jitted.
        arguments: `jax.ShapeDtypeStruct`s or None.
        log: of `prepare_environment`.

    Raises:
        RuntimeError: if the assembler did not report, or the compiler's own errors.
    """
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=H200
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    log.write_text("")
    with _output_into(log), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(function).lower(*jax.tree.map(placed, arguments)).compile()
    kernels = parse_report(log.read_text())
    if not kernels:
        raise RuntimeError(
            "ptxas did not report: XLA used another one; uninstall the wheel nvidia-cuda-nvcc"
        )
    return kernels


@contextlib.contextmanager
def _output_into(log: pathlib.Path) -> Iterator[None]:
    """Appends what this process writes to stdout and stderr, C++ code included, to the log."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with open(log, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def parse_report(text: str) -> list[dict[str, Any]]:
    """Returns the kernels in a log of `ptxas -v`, each once, XLA's own fusions left out."""
    found = {}
    for match in REPORT.finditer(text):
        if not re.search("decay|mosaic|vq_|flash_decoding", match["kernel"]):
            continue
        numbers = {
            "registers": int(match["registers"]),
            "spill_store_bytes": int(match["stores"]),
            "spill_load_bytes": int(match["loads"]),
            "stack_bytes": int(match["stack"]),
        }
        found[match["kernel"], *numbers.values()] = {"kernel": match["kernel"], **numbers}
    return list(found.values())
