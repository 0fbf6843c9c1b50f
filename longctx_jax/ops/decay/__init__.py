"""Exponentially decaying causal linear attention: one operator, several algorithms.

    out_t = scale * sum_{s <= t} lambda^(t-s) (q_t . k_s) v_s    lambda = exp(log_decay), one a head
    S_t   = lambda S_{t-1} + k_t v_t^T,   out_t = scale * S_t^T q_t  (the same, S: [key, value])

`state` is S after the last token, undecayed further, so calls chain exactly. Every power lambda^d
is formed from a difference d >= 0 in float32, hence no form overflows at any decay or length.
"""

from longctx_jax.ops.decay.recurrent import decay_attention_step
from longctx_jax.ops.decay.select import decay_attention

__all__ = ["decay_attention", "decay_attention_step"]
