"""Mamba and Mamba-2.

Gu & Dao (2023), arXiv 2312.00752, eq. 2, algorithm 2 and section 3.4; Dao & Gu (2024), arXiv
2405.21060, sections 3 and 7. Of the discretisations the one of the public code: A by zero-order
hold, exp(Delta A), and B by Euler's rule, Delta B (the first paper's eq. 4 has zero-order hold for
B too). The gated norm of Mamba-2 is the public code's: RMSNorm(y * silu(z)), eps 1e-5, over each
of the n_groups groups of channels by itself; its options are the gate after the norm
(norm_before_gate) and bounds of the step (dt_limit).
"""

import numpy as np

from tests.golden.equations import common
from tests.golden.equations.common import silu, softplus


def mamba_1(p, x, o):
    """Algorithm 2 inside the block of figure 3: h_t = exp(Delta A) h + Delta B x, y = C h + D x."""
    n, rank = o["d_state"], o["step_rank"]
    z = x @ p["gate"]["kernel"]
    u = common.causal_convolution(x @ p["input"]["kernel"], p["convolution"])
    u = silu(u + p["convolution_bias"])
    projected = u @ p["weights"]["kernel"]
    low, b, c = projected[:, :rank], projected[:, rank : rank + n], projected[:, rank + n :]
    delta = softplus(low @ p["step_up"] + p["step_bias"])
    a = -np.exp(p["log_rate"])
    h = np.zeros((u.shape[1], n))
    y = np.empty_like(u)
    for t in range(len(x)):
        h = np.exp(delta[t][:, None] * a) * h + (delta[t] * u[t])[:, None] * b[t][None]
        y[t] = h @ c[t] + p["skip"] * u[t]
    return (y * silu(z)) @ p["out"]["kernel"]


def mamba_2(p, x, o):
    """SSD, eqs. 1-2 with scalar times identity A, inside the block of figure 6."""
    n, groups, width = o["d_state"], o.get("n_groups", 1), o["head_len"]
    z = x @ p["gate"]["kernel"]
    ubc = common.causal_convolution(x @ p["input"]["kernel"], p["convolution"])
    ubc = silu(ubc + p["convolution_bias"])
    d_inner = z.shape[1]
    n_heads = d_inner // width
    u = ubc[:, :d_inner].reshape(len(x), n_heads, width)
    b = ubc[:, d_inner : d_inner + groups * n].reshape(len(x), groups, n)
    c = ubc[:, d_inner + groups * n :].reshape(len(x), groups, n)
    delta = softplus(x @ p["step"]["kernel"] + p["step_bias"])
    if o.get("min_step") or o.get("max_step"):
        delta = np.minimum(np.maximum(delta, o.get("min_step", 0.0)), o.get("max_step") or np.inf)
    a = -np.exp(p["log_rate"])
    y = np.empty_like(u)
    for head in range(n_heads):
        g = head // (n_heads // groups)
        h = np.zeros((n, width))
        for t in range(len(x)):
            h = np.exp(delta[t, head] * a[head]) * h
            h = h + delta[t, head] * np.outer(b[t, g], u[t, head])
            y[t, head] = c[t, g] @ h + p["skip"][head] * u[t, head]
    late = o.get("norm_before_gate", False)
    y = y.reshape(len(x), -1) * (1.0 if late else silu(z))
    normed = common.rms_norm(y.reshape(len(x), groups, -1), eps=1e-5).reshape(len(x), -1)
    return (normed * p["norm"]["scale"] * (silu(z) if late else 1.0)) @ p["out"]["kernel"]


def language_model(variables, tokens, c, sg):
    """Logits [tokens, vocab]."""
    del sg
    o = dict(c["mamba"])
    if o["version"] == 1:  # the published defaults: N = 16, rank D / 16 rounded up
        o["d_state"] = o["d_state"] or 16
        o["step_rank"] = o["step_rank"] or -(-c["d_model"] // 16)

    def mix(p, x, l):
        del l
        return mamba_1(p, x, o) if o["version"] == 1 else mamba_2(p, x, o)

    return common.decoder(variables["params"], tokens, c, "mamba", mix)
