"""RWKV-4 and RWKV-6 (Finch), in the form of sums over all earlier tokens.

Peng et al. (2023), arXiv 2305.13048, eqs. 11-18; Peng et al. (2024), arXiv 2404.05892, section 4
and its appendix for the per-head norm of the public code (GroupNorm, eps 64e-5). Products of
decays are written out; there is no state and no rescaling here.

The papers' first layer has one more LayerNorm behind the embedding, which the model leaves out.
"""

import numpy as np

from tests.golden.equations import common
from tests.golden.equations.common import heads, relu, shifted, sigmoid, silu

STREAMS = ("decay", "key", "value", "receptance", "gate")


def interpolate(x, share_of_previous):
    """RWKV-4, eq. 11: mu * x_t + (1 - mu) * x_{t-1}. The parameter here holds 1 - mu."""
    mu = 1.0 - share_of_previous
    return mu * x + (1.0 - mu) * shifted(x)


def time_mix_4(p, x):
    """RWKV-4, eqs. 11-13, 16 and 17, with w = exp(decay) > 0."""
    k = interpolate(x, p["shift_key"]) @ p["key"]["kernel"]
    v = interpolate(x, p["shift_value"]) @ p["value"]["kernel"]
    r = interpolate(x, p["shift_receptance"]) @ p["receptance"]["kernel"]
    w, u = np.exp(p["decay"]), p["bonus"]
    wkv = np.empty_like(v)
    for t in range(len(x)):
        above, below = np.exp(u + k[t]) * v[t], np.exp(u + k[t])
        for i in range(t):
            weight = np.exp(-(t - 1 - i) * w + k[i])
            above, below = above + weight * v[i], below + weight
        wkv[t] = above / below
    return (sigmoid(r) * wkv) @ p["out"]["kernel"]


def ddlerp(p, x):
    """Finch: ddlerp(a, b) = a + (b - a) * (lambda + tanh((a + (b - a) mu_x) A) B), a = x_t."""
    change = shifted(x) - x
    down = np.split((x + change * p["shift_all"]) @ p["shift_down"], len(STREAMS), axis=-1)
    mixed = {}
    for i, name in enumerate(STREAMS):
        lora = p[f"shift_{name}"] + np.tanh(down[i]) @ p["shift_up"][i]
        mixed[name] = x + change * lora
    return mixed


def time_mix_6(p, x, n_heads):
    """Finch: wkv_t = diag(u) k_t^T v_t + sum_{i<t} diag(prod_{i<j<t} w_j) k_i^T v_i."""
    mixed = ddlerp(p, x)
    r = heads(mixed["receptance"] @ p["receptance"]["kernel"], n_heads)
    k = heads(mixed["key"] @ p["key"]["kernel"], n_heads)
    v = heads(mixed["value"] @ p["value"]["kernel"], n_heads)
    g = mixed["gate"] @ p["gate"]["kernel"]
    d = p["decay"] + np.tanh(mixed["decay"] @ p["decay_down"]) @ p["decay_up"]
    w = heads(np.exp(-np.exp(d)), n_heads)
    out = np.zeros_like(v)
    for h in range(n_heads):
        for t in range(len(x)):
            wkv = np.outer(p["bonus"][h] * k[t, h], v[t, h])
            for i in range(t):
                kept = np.prod(w[i + 1 : t, h], axis=0)
                wkv = wkv + np.outer(kept * k[i, h], v[i, h])
            out[t, h] = r[t, h] @ wkv
    gain, bias = p["head_norm"]["scale"], p["head_norm"]["bias"]
    out = common.layer_norm(out, gain, bias, eps=64e-5).reshape(len(x), -1)
    return (out * silu(g)) @ p["out"]["kernel"]


def channel_mix(p, x, c):
    """RWKV-4, eqs. 14, 15 and 18; the same in Finch: sigmoid(r') * (W_v' max(k', 0)^2)."""
    del c
    r = interpolate(x, p["shift_receptance"]) @ p["receptance"]["kernel"]
    k = interpolate(x, p["shift_key"]) @ p["key"]["kernel"]
    return sigmoid(r) * (relu(k) ** 2 @ p["value"]["kernel"])


def language_model(variables, tokens, c, sg):
    """Logits [tokens, vocab]."""
    del sg
    o = c["rwkv"]
    n_heads = c["d_model"] // o["head_len"] if o.get("head_len") else c["n_heads"]

    def mix(p, x, l):
        del l
        return time_mix_4(p, x) if o["version"] == 4 else time_mix_6(p, x, n_heads)

    feed = channel_mix if c.get("mlp") == "rwkv" else common.mlp
    return common.decoder(variables["params"], tokens, c, "rwkv", mix, feed)
