"""Exponentially decaying causal linear attention: one operator, every algorithm for it.

    out_t = scale * sum_{s <= t} M_ts (q_t . k_s) v_s      M_ts = decay_{s+1} ... decay_t, M_tt = 1
    S_t   = decay_t S_{t-1} + k_t v_t^T,   out_t = scale * S_t^T q_t  (the same, S: [key, value])

decay = exp(log_decay), one constant a head or one number a token and head. `state` is S after the
last token, undecayed further, so calls chain exactly. Every factor is exp of a difference <= 0,
masked before exp, in float32, hence no form overflows at any decay or length.

`explain` tells which algorithm "auto" takes and why; docs/decay.md has the catalogue.
"""

from longctx_jax.ops.decay.select import decay_attention, decay_attention_step, explain

__all__ = ["decay_attention", "decay_attention_step", "explain"]
