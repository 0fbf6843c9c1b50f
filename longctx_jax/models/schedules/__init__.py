"""The order in which the (segment, layer) grid of cells runs, on one device or on several.

| order | where |
| --- | --- |
| sequential: segments outside; layerwise: layers outside | `run.py`, the front door `run_stack` |
| diagonal: all cells (s, l) with s + l = t at step t of S + L - 1 | `diagonal.py` |
| diagonal, layers spread over devices: exact pipeline parallelism | `diagonal.py`, `pipeline` |
| a sequence spread over devices, caches handed on | `context_parallel.py` |
| the grid itself: cells, sizes, keys | `grid.py` |
"""

from longctx_jax.models.schedules.run import SCHEDULES, run_stack

__all__ = ["SCHEDULES", "run_stack"]
