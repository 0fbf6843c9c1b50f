"""Transformer-VQ in its quadratic definition, and the surrogate whose gradient training follows.

Lingle (2023), arXiv 2309.16354: keys are replaced by their nearest codewords (definition 3.1, with
the straight-through estimator of van den Oord et al., arXiv 1711.00937), the softmax runs over all
earlier tokens, and the relative bias of Transformer-XL (arXiv 1901.02860, section 3.3) acts inside
a window only. With tau = sqrt(d_k):

    q = RMS(x W_Q) / tau^(1/2),  k = RMS(x W_K) / tau^(1/2),  v = x W_V    (gated: silu of it)
    z_j = argmin_s |k_j - C_s|^2
    k_hat_j = sg(C_{z_j}) + k_j - sg(k_j)      at most `window_len` tokens before the query
            = sg(C_{z_j})                      farther: a row of the compressive cache
    score(i, j) = (q_i + u / tau^(1/2)) . k_hat_j + (q_i + w / tau^(1/2)) . r_{i-j}
    r_d = sin_d W_R / tau^(1/2)                for d <= window_len, else the second term is 0

Surrogate: the loss as a function of the parameters with everything inside sg() fixed, i.e. codes
fixed and k_hat = k + constant. The paper cuts a key's gradient at its blocks, one to two block
lengths back; here, as in the model, it is cut at window_len tokens. Values have gradients at every
distance (through the cache's means), or only inside the window without grad_through_cache.
"""

import numpy as np

from tests.golden.equations import common
from tests.golden.equations.common import heads, silu, softmax


def codewords(codebook):
    """C = sums / max(counts, 0.01), as in the public code."""
    sums, counts = codebook
    return sums / np.maximum(counts, 0.01)[..., None]


def nearest(k, c):
    """argmin_s |k - C_s|^2."""
    return int(np.argmin([np.sum((k - c[s]) ** 2) for s in range(len(c))]))


def sinusoid(d, width, theta):
    """Sines first, then cosines, of wavelengths 2 pi theta^(2k/D)."""
    frequency = theta ** (-2.0 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(d * frequency), np.cos(d * frequency)])


def vq_attention(p, x, codebook, c, sg, errors):
    """One mixer; appends sum over heads and tokens of |k - sg(C_z)|^2 to errors."""
    o, n_heads = c["vq"], c["n_heads"]
    n_kv_heads, window = c.get("n_kv_heads") or n_heads, o["window_len"]
    q = heads(x @ p["query"]["kernel"], n_heads)
    k = heads(x @ p["key"]["kernel"], n_kv_heads)
    v = heads(x @ p["value"]["kernel"], n_kv_heads)
    root = q.shape[-1] ** 0.25  # tau^(1/2)
    q, k = common.rms_norm(q) / root, common.rms_norm(k) / root
    is_gated = o.get("gate", "none") == "silu"
    if is_gated:
        v = silu(v)
    has_bias = o.get("position", "relative") == "relative"
    if has_bias:
        u, w = p["content_bias"] / root, p["position_bias"] / root
        r = [sinusoid(d, c["d_model"], o["position_theta"]) for d in range(window + 1)]
        r = heads(np.stack(r) @ p["relative"]["kernel"], n_kv_heads) / root
    words = codewords(codebook)
    word = np.empty_like(k)
    for j in range(len(x)):
        for g in range(n_kv_heads):
            word[j, g] = words[g, nearest(k[j, g], words[g])]
    word = sg(word)
    errors.append(np.sum((k - word) ** 2))
    k_hat = word + k - sg(k)
    fixed_v = sg(v)

    out = np.empty((len(x), n_heads, v.shape[-1]))
    for h in range(n_heads):
        g = h // (n_heads // n_kv_heads)
        for i in range(len(x)):
            first = 0 if o.get("use_table", True) else max(0, i - window)
            scores, values = [], []
            for j in range(first, i + 1):
                is_near = i - j <= window
                content = q[i, h] + (u[h] if has_bias else 0.0)
                score = content @ (k_hat[j, g] if is_near else word[j, g])
                if has_bias and is_near:
                    score = score + (q[i, h] + w[h]) @ r[i - j, g]
                scores.append(score)
                is_moving = is_near or o.get("grad_through_cache", True)
                values.append(v[j, g] if is_moving else fixed_v[j, g])
            out[i, h] = softmax(np.array(scores)) @ np.array(values)
    y = out.reshape(len(x), -1)
    if is_gated:  # the gated attention unit, Hua et al., arXiv 2202.10447
        y = y * silu(x @ p["gate"]["kernel"])
    return y @ p["out"]["kernel"]


def forward(variables, tokens, c, sg):
    """Logits [tokens, vocab], and the squared quantisation error of all layers."""
    codebooks = variables["model_state"]["stack"]["0_vq"]["mixer"]["codebook"]
    errors = []

    def mix(p, x, l):
        return vq_attention(p, x, (codebooks[0][l], codebooks[1][l]), c, sg, errors)

    return common.decoder(variables["params"], tokens, c, "vq", mix), sum(errors)


def language_model(variables, tokens, c, sg):
    """Logits [tokens, vocab]."""
    return forward(variables, tokens, c, sg)[0]
