"""The associative recurrent memory transformer, segment by segment and layer by layer.

Rodkin et al. (2024), arXiv 2407.04841, section 3: AssocBlock in front of a transformer
layer, and DPFP features (Schlag et al., arXiv 2102.11174). Where paper and public code differ, the
code: eps = 1e-5 in the denominators and in gamma, gamma clipped to [0, 1] and without a gradient,
gamma = 1 in the first segment, a bias in beta. Several heads, no denominator and normalised
features are of the code's later experiments; per head everything is the same.

    read    y = A phi(q) / (z . phi(q))                                all tokens, memory tokens too
    write   v_bar = A phi(k) / (z . phi(k)),  gamma = sg(1 - z . phi(k) / |phi(k)|^2)
            A <- A + sum_i beta_i (v_i - v_bar_i) phi(k_i)^T,   z <- z + sum_i gamma_i phi(k_i)

A is stored transposed, [features, value].
"""

import numpy as np

from tests.golden.equations import common
from tests.golden.equations.common import heads, relu, sigmoid, softmax


def dpfp(u, nu):
    """phi(u): r = [relu(u); relu(-u)], blocks r_i r_{i-j} for j = 1..nu."""
    r = np.concatenate([relu(u), relu(-u)])
    return np.array([r[i] * r[(i - j) % len(r)] for j in range(1, nu + 1) for i in range(len(r))])


def recall(f, a, z, o):
    """A phi / (z . phi + eps); without a denominator A phi."""
    if not o.get("use_denominator", True):
        return f @ a
    return f @ a / (f @ z + o.get("eps", 1e-5))


def update(f, v, beta, a, z, is_first, o, sg):
    """All rows of one segment, f [rows, features], into one head's (A, z) of before."""
    eps, has_denominator = o.get("eps", 1e-5), o.get("use_denominator", True)
    new_a, new_z = a.copy(), z.copy()
    for i in range(len(f)):
        v_bar = np.zeros_like(v[i]) if is_first else recall(f[i], a, z, o)
        gamma = 1.0
        if o.get("correction", True) and not is_first:
            gamma = sg(np.clip(1.0 - (f[i] @ z + eps) / (f[i] @ f[i] + eps), 0.0, 1.0))
        new_a = new_a + beta[i] * np.outer(f[i], v[i] - v_bar)
        if has_denominator:
            new_z = new_z + gamma * f[i]
    return new_a, new_z


def features(x, kernel, o):
    """phi of each row and head, [rows, heads, features]."""
    u = heads(x @ kernel, o.get("n_heads", 1))
    f = np.array([[dpfp(one, o["nu"]) for one in row] for row in u])
    if o.get("normalize", False):
        f = f / np.sqrt(np.sum(f**2, axis=-1, keepdims=True) + 1e-5**2)
    return f


def attention(p, x, c):
    """Causal softmax attention with rotary positions that start at 0 in every segment."""
    q, k, v = (heads(x @ p[name]["kernel"], c["n_heads"]) for name in ("query", "key", "value"))
    q, k = common.rotary(q, 10_000.0), common.rotary(k, 10_000.0)
    y = np.empty_like(v)
    for h in range(c["n_heads"]):
        for i in range(len(x)):
            weight = softmax(k[: i + 1, h] @ q[i, h] / np.sqrt(q.shape[-1]))
            y[i, h] = weight @ v[: i + 1, h]
    return y.reshape(len(x), -1) @ p["out"]["kernel"]


def language_model(variables, tokens, c, sg):
    """Logits [tokens, vocab]; a short last segment reads and has nothing to write for."""
    params, o, d = variables["params"], c["memory"], c["d_model"]
    n_heads, n_memory = o.get("n_heads", 1), o["n_memory_tokens"]
    n_features = 2 * o["nu"] * o["d_memory"] // n_heads
    a = np.zeros((c["n_layers"], n_heads, n_features, d // n_heads))
    z = np.zeros((c["n_layers"], n_heads, n_features))
    out = []
    for start in range(0, len(tokens), o["segment_len"]):
        segment = tokens[start : start + o["segment_len"]]
        is_first = start == 0
        x = np.concatenate([common.embedding(params, segment, c), params["memory"]["tokens"]])
        for l in range(c["n_layers"]):
            p = common.of_layer(params["stack"]["0_armt"], l)
            m = common.of_layer(params["memory"]["layers"]["0_armt"], l)
            if not is_first:
                f = features(x, m["query"]["kernel"], o)
                y = [
                    np.concatenate([recall(f[i, h], a[l, h], z[l, h], o) for h in range(n_heads)])
                    for i in range(len(x))
                ]
                x = x + np.array(y)
            x = x + attention(p["mixer"], common.norm(p["mixer_norm"], x, c), c)
            x = x + common.mlp(p["mlp"], common.norm(p["mlp_norm"], x, c), c)
            rows = x[-n_memory:]
            f = features(rows, m["key"]["kernel"], o)
            v = heads(rows @ m["value"]["kernel"], n_heads)
            beta = sigmoid(rows @ m["beta"]["kernel"] + m["beta"]["bias"])
            written = [
                update(f[:, h], v[:, h], beta[:, h], a[l, h], z[l, h], is_first, o, sg)
                for h in range(n_heads)
            ]
            a[l], z[l] = (np.array(part) for part in zip(*written, strict=True))
        out.append(x[: len(segment)])
    return common.logits(params, np.concatenate(out), c)
