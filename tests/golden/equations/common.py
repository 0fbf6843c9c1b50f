"""What the transcribed models share: norms, second halves, the residual stack, sg().

Everything is float64 numpy on one sequence, [tokens, width]; linear maps are x @ W. The stack is
the pre-norm decoder that all of these papers use:

    x <- x + Mixer(Norm(x));   x <- x + MLP(Norm(x));   logits = Norm(x) E^T
"""

import numpy as np


class StopGradient:
    """sg(.): the identity, which a derivative takes for a constant.

    The first evaluation remembers every value; those after `rewind` get the remembered ones, in the
    same order. So differences of a function that calls it are differences of the surrogate in which
    whatever stands inside sg() is held fixed.
    """

    def __init__(self):
        self.values = []
        self.place = None  # None: still remembering

    def rewind(self) -> "StopGradient":
        self.place = 0
        return self

    def __call__(self, x):
        if self.place is None:
            self.values.append(x)
            return x
        self.place += 1
        return self.values[self.place - 1]


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))  # 1 / (1 + exp(-x)) to the last digits of small ones


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0.0, x)


def relu(x):
    return np.maximum(x, 0.0)


def gelu(x):
    """Hendrycks & Gimpel, arXiv 1606.08415, section 2: the approximation with tanh."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    weight = np.exp(x - np.max(x))
    return weight / np.sum(weight)


def rms_norm(x, gain=1.0, eps=1e-6):
    """Zhang & Sennrich, arXiv 1910.07467, eq. 4."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def layer_norm(x, gain=1.0, bias=0.0, eps=1e-6):
    """Ba et al., arXiv 1607.06450, eq. 4, with eps inside the root as in all public code."""
    mu = np.mean(x, axis=-1, keepdims=True)
    sigma = np.sqrt(np.mean((x - mu) ** 2, axis=-1, keepdims=True) + eps)
    return (x - mu) / sigma * gain + bias


def norm(p, x, c):
    eps = c.get("norm_eps", 1e-6)
    if c.get("norm", "rms") == "layer":
        return layer_norm(x, p["scale"], p["bias"], eps)
    return rms_norm(x, p["scale"], eps)


def mlp(p, x, c):
    """SwiGLU (Shazeer, arXiv 2002.05202, eq. 6), GELU, or relu^2 (Primer, arXiv 2109.08668)."""
    kind = c.get("mlp", "swiglu")
    up = x @ p["up"]["kernel"]
    if kind == "swiglu":
        hidden = silu(x @ p["gate"]["kernel"]) * up
    elif kind == "gelu":
        hidden = gelu(up)
    else:
        hidden = relu(up) ** 2
    return hidden @ p["down"]["kernel"]


def shifted(x):
    """x_{t-1} at every t; zeros in front of the first token."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def causal_convolution(x, kernel):
    """y_t = sum_j kernel_j x_{t-j}, channel by channel; zeros in front of the first token."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(min(len(kernel), t + 1)):
            y[t] += kernel[j] * x[t - j]
    return y


def rotary(x, theta):
    """RoPE, arXiv 2104.09864, eq. 15; the pairs are channels (i, i + d/2). x [tokens, heads, d]."""
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    for n in range(len(x)):
        for i in range(half):
            angle = n * theta ** (-2.0 * i / x.shape[-1])
            a, b = x[n, :, i], x[n, :, i + half]
            y[n, :, i] = a * np.cos(angle) - b * np.sin(angle)
            y[n, :, i + half] = a * np.sin(angle) + b * np.cos(angle)
    return y


def heads(x, n):
    return x.reshape(len(x), n, -1)


def of_layer(tree, l):
    """The parameters of layer l of a pattern position; layers are their leading axis."""
    if isinstance(tree, dict):
        return {name: of_layer(child, l) for name, child in tree.items()}
    return tree[l]


def embedding(params, tokens, c):
    """E[token], times sqrt(d_model) if the output matrix is another one."""
    scale = 1.0 if c.get("tie_embeddings", True) else c["d_model"] ** 0.5
    return scale * params["embed"]["table"][tokens]


def logits(params, x, c):
    name = "table" if c.get("tie_embeddings", True) else "output"
    return norm(params["norm"], x, c) @ params["embed"][name].T


def decoder(params, tokens, c, kind, mix, feed=mlp):
    """Logits of one sequence; mix(layer's mixer parameters, normed input, l) is the mixer."""
    x = embedding(params, tokens, c)
    for l in range(c["n_layers"]):
        p = of_layer(params["stack"][f"0_{kind}"], l)
        x = x + mix(p["mixer"], norm(p["mixer_norm"], x, c), l)
        if "mlp" in p:
            x = x + feed(p["mlp"], norm(p["mlp_norm"], x, c), c)
    return logits(params, x, c)
