"""Classes of calls that our GPU kernels take, compiled for an H200 without one: registers, spills.

A file a family of kernels: `cases()` lists the classes, `compile_case(case, log)` returns a row a
kernel of one. What it needs: `deviceless.py`.
"""

from longctx_jax.benchmarking.kernel_classes import decay, flash_decoding, vq

SPILL_LIMIT = 64  # bytes of registers that a kernel which "auto" takes may spill
FAMILIES = {"decay": decay, "vq": vq, "flash_decoding": flash_decoding}
