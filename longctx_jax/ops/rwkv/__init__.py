"""The recurrences of RWKV: token shift, the average of RWKV-4 and the matrix memory of RWKV-6.

    wkv4   out_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same without v)
    wkv6   out_t = r_t^T (S + diag(u) k_t v_t^T),   S <- diag(e^{g_t}) S + k_t v_t^T

Both take and return a state, so calls chain exactly; `reset` drops it at document starts.
docs/recurrent_members.md has the layers around them.
"""

from longctx_jax.ops.rwkv.token_shift import shift_tokens
from longctx_jax.ops.rwkv.wkv4 import WKV4State, init_wkv4_state, wkv4
from longctx_jax.ops.rwkv.wkv6 import wkv6

__all__ = ["WKV4State", "init_wkv4_state", "shift_tokens", "wkv4", "wkv6"]
