"""Compiles GPU kernels for an H200 without one: python -m scripts.compile_report --kernels=decay.

Writes a JSON line a kernel with its registers and spills, and fails if one that "auto" may take
spills more than 64 bytes. What it needs: `longctx_jax/benchmarking/deviceless.py`.
"""

import json
import pathlib
import sys

from absl import flags

from scripts import common

_KERNELS = flags.DEFINE_enum(
    "kernels", "decay", ["decay", "vq", "flash_decoding"], "Whose kernels to compile."
)
_OUT = flags.DEFINE_string("out", "", "JSON-lines file; empty = one in results/.")


def main(arguments: list[str]) -> None:
    """Compiles, writes, prints the worst."""
    del arguments
    from longctx_jax.benchmarking import deviceless

    log = deviceless.prepare_environment()
    import jax

    from longctx_jax.benchmarking import rows as rows_of
    from longctx_jax.benchmarking.kernel_classes import FAMILIES, SPILL_LIMIT, kernel_rows

    fields = {"device": "NVIDIA H200 (compiled without one)", "jax_version": jax.__version__}
    fields["command"] = f"python -m scripts.compile_report --kernels={_KERNELS.value}"
    out = pathlib.Path(_OUT.value or f"results/{_KERNELS.value}_h200_registers.jsonl")
    rows = []
    for number, case in enumerate(every := FAMILIES[_KERNELS.value].cases()):
        rows += kernel_rows(_KERNELS.value, case, log, fields)
        print(f"\r{number + 1} of {len(every)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    out.unlink(missing_ok=True)
    rows_of.append(out, rows)
    worst = max(map(rows_of.flat, rows), key=lambda row: row["spill_store_bytes"])
    print(f"wrote {len(rows)} kernels to {out}; most spilled: {json.dumps(worst)}")
    if worst["spill_store_bytes"] > SPILL_LIMIT:
        raise common.UsageError(
            f"no kernel may spill more than {SPILL_LIMIT} bytes: got "
            f"{worst['spill_store_bytes']}; change the tiling of that kernel"
        )


if __name__ == "__main__":
    common.run(main)
