"""State-space recurrences with input-dependent steps: Mamba-1 and Mamba-2 (SSD).

    selective_scan   h <- e^{delta a} h + (delta u) b^T,  y = h c + d u    a: [model, state]
    ssd              the same with one scalar a per head: decaying linear attention

Both take and return h, so calls chain exactly; `reset` drops it at document starts.
docs/recurrent_members.md has the layers around them.
"""

from longctx_jax.ops.ssm.selective_scan import selective_scan
from longctx_jax.ops.ssm.ssd import ssd

__all__ = ["selective_scan", "ssd"]
