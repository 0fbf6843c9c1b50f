"""Linear attention with exponential decay: retention, Lightning Attention, gated retention.

Sun et al. (2023), arXiv 2307.08621 (RetNet), eqs. 5-8; Sun et al. (2024), arXiv 2405.05254 (gated
retention); Qin et al. (2023), arXiv 2307.14995 (TransNormerLLM, decay with depth); Qin et al.
(2024), arXiv 2401.04658 (Lightning Attention-2); Wang et al. (2025), arXiv 2501.02573 (the family).

Published retention has no scale of q k^T in common: 1/sqrt(d_key) is RetNet's, and the norm behind
it takes it out again up to its eps. `multi_scale_retention` is RetNet's layer with the model's
options; what TransNormerLLM and MiniMax-01 publish differs from all of them, see
`transnormer_llm` and `minimax_01`.
"""

import numpy as np

from tests.golden.equations import common
from tests.golden.equations.common import heads, sigmoid, silu, softplus

TAU = 16.0  # gated retention's temperature


def recurrent(q, k, v, gamma, scale, state=None):
    """RetNet, eq. 6: S_n = gamma_n S_{n-1} + k_n^T v_n, o_n = q_n S_n. One head; gamma [tokens]."""
    s = np.zeros((k.shape[1], v.shape[1])) if state is None else state
    out = np.empty((len(q), v.shape[1]))
    for n in range(len(q)):
        s = gamma[n] * s + np.outer(k[n], v[n])
        out[n] = scale * q[n] @ s
    return out, s


def parallel(q, k, v, gamma, scale):
    """RetNet, eq. 5: (Q K^T * D) V with D_nm = gamma_{m+1} ... gamma_n for n >= m, else 0."""
    d = np.zeros((len(q), len(q)))
    for n in range(len(q)):
        for m in range(n + 1):
            d[n, m] = np.prod(gamma[m + 1 : n + 1])
    return scale * (q @ k.T * d) @ v


def recursion(q, k, v, gamma, scale):
    """LeetDecoding: halve; what the second half sees of the first is one matrix of rank d_key."""
    if len(q) == 1:
        return scale * (q @ k.T) @ v
    m = len(q) // 2
    first = recursion(q[:m], k[:m], v[:m], gamma[:m], scale)
    second = recursion(q[m:], k[m:], v[m:], gamma[m:], scale)
    _, s = recurrent(q[:m], k[:m], v[:m], gamma[:m], scale)
    read = np.cumprod(gamma[m:])
    return np.concatenate([first, second + scale * (read[:, None] * q[m:]) @ s])


def decays(kind, depth, n_heads, l, n_layers):
    """log gamma of each head in layer l.

    RetNet, eq. 8: gamma = 1 - 2^(-5-h). Lightning: exp(-s_h), s_h the ALiBi slopes 2^(-8(h+1)/H).
    TransNormerLLM, section 3.1.1: exp(-(8h/H)(1 - l/L)), whose last factor is depth "linear".
    """
    h = np.arange(n_heads, dtype=float)
    log_gamma = {
        "retnet": np.log(1.0 - 2.0 ** (-5.0 - h)),
        "lightning": -(2.0 ** (-8.0 * (h + 1.0) / n_heads)),
        "transnormer": -8.0 * h / n_heads,
        "none": 0.0 * h,
    }[kind]
    if depth == "linear":
        log_gamma = log_gamma * (1.0 - l / n_layers)
    return log_gamma


def gammas(p, x, c, l):
    """gamma of every token and head, [tokens, heads]."""
    o, n_heads = c["decay"], c["n_heads"]
    if o["kind"] == "gated":
        # gRet: gamma = sigmoid(X W_gamma)^(1/tau); a bias is ours.
        return sigmoid(x @ p["decay_gate"]["kernel"] + p["decay_bias"]) ** (1.0 / TAU)
    if o["kind"] == "learned":
        log_gamma = -softplus(p["decay_rate"])
    else:
        log_gamma = decays(o["kind"], o.get("depth", "constant"), n_heads, l, c["n_layers"])
    return np.tile(np.exp(log_gamma), (len(x), 1))


def feature_map(kind, x):
    if kind == "silu":
        return silu(x)
    if kind == "elu":  # Katharopoulos et al., arXiv 2006.16236, eq. 7: elu(x) + 1
        return np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))
    return x


def head_norm(kind, p, y):
    """GroupNorm_h of RetNet, eq. 8: each head by itself, with the same gains for all heads."""
    if kind == "layer":
        return common.layer_norm(y, p["head_norm"]["scale"], p["head_norm"]["bias"])
    if kind == "rms":
        return common.rms_norm(y, p["head_norm"]["scale"])
    return common.rms_norm(y)  # SimpleRMSNorm of TransNormerLLM, section 3.1.3


def multi_scale_retention(p, x, c, l):
    """RetNet, eq. 8: MSR(X) = (swish(X W_G) * GroupNorm_h(Concat(head_i))) W_O."""
    o, n_heads = c["decay"], c["n_heads"]
    n_kv_heads = c.get("n_kv_heads") or n_heads
    if o.get("conv_len", 0) > 1:
        x = common.causal_convolution(x, p["convolution"])
    q = feature_map(o.get("feature_map", "none"), heads(x @ p["query"]["kernel"], n_heads))
    k = feature_map(o.get("feature_map", "none"), heads(x @ p["key"]["kernel"], n_kv_heads))
    v = heads(x @ p["value"]["kernel"], n_kv_heads)
    if o["position"] == "rotary":
        q, k = common.rotary(q, 10_000.0), common.rotary(k, 10_000.0)
    gamma = gammas(p, x, c, l)
    scale = q.shape[-1] ** -0.5
    outs = []
    for h in range(n_heads):
        g = h // (n_heads // n_kv_heads)  # grouped queries: a run of heads shares key and value
        outs.append(recurrent(q[:, h], k[:, g], v[:, g], gamma[:, h], scale)[0])
    y = head_norm(o.get("head_norm", "rms"), p, np.stack(outs, axis=1)).reshape(len(x), -1)
    gate = o.get("gate", "silu")
    if gate == "silu":
        y = y * silu(x @ p["gate"]["kernel"])
    elif gate == "sigmoid":
        y = y * sigmoid(x @ p["gate"]["kernel"])
    return y @ p["out"]["kernel"]


def lightning_layer(p, x, c, log_gamma, value_map, gain, gate):
    """(gate(X W_U) * Norm(phi(Q) phi(K)^T V)) W_O; one norm over all heads, and no scale."""
    q, k = (heads(silu(x @ p[name]["kernel"]), c["n_heads"]) for name in ("query", "key"))
    v = heads(value_map(x @ p["value"]["kernel"]), c["n_heads"])
    outs = []
    for h in range(c["n_heads"]):
        gamma = np.full(len(x), np.exp(log_gamma[h]))
        outs.append(recurrent(q[:, h], k[:, h], v[:, h], gamma, 1.0)[0])
    y = common.rms_norm(np.concatenate(outs, axis=1), gain)
    return (gate(x @ p["gate"]["kernel"]) * y) @ p["out"]["kernel"]


def transnormer_llm(variables, tokens, c, sg):
    """TransNormerLLM's gated linear attention, section 3.1.2: U = X W_U without an activation.

    SimpleRMSNorm spans all heads, as in the public code. Without the rotation of its first layer.
    """
    del sg

    def mix(p, x, l):
        log_gamma = decays("transnormer", "linear", c["n_heads"], l, c["n_layers"])
        return lightning_layer(p, x, c, log_gamma, lambda v: v, 1.0, lambda u: u)

    return common.decoder(variables["params"], tokens, c, "decay", mix)


def minimax_01(variables, tokens, c, sg):
    """MiniMax-01, arXiv 2501.08313, as in the public code: silu on values too, a sigmoid gate.

    One RMSNorm with gains spans all heads, and the slopes fall with depth as
    1 - l / (L - 1 + 1e-5) + 1e-5.
    """
    del sg

    def mix(p, x, l):
        slopes = decays("lightning", "constant", c["n_heads"], l, c["n_layers"])
        log_gamma = slopes * (1.0 - l / (c["n_layers"] - 1.0 + 1e-5) + 1e-5)
        gain = p["head_norm"]["scale"]
        return lightning_layer(p, x, c, log_gamma, silu, gain, sigmoid)

    return common.decoder(variables["params"], tokens, c, "decay", mix)


def language_model(variables, tokens, c, sg):
    """Logits [tokens, vocab]."""
    del sg

    def mix(p, x, l):
        return multi_scale_retention(p, x, c, l)

    return common.decoder(variables["params"], tokens, c, "decay", mix)
