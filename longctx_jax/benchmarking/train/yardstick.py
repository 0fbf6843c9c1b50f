"""A hand-written training step of the softmax transformer, to hold our models' speed against.

One file of plain JAX and optax: no Flax, no scan over layers, no cache, no documents, no schedule,
nothing of this package. It is the same model as `config.model.name = "transformer"` with default
fields (pre-norm RMSNorm, rotary multi-head attention, SwiGLU, tied embeddings), written as one
would write it for speed alone. A test copies weights over and compares loss, gradients and update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]
NORM_EPS = 1e-6


class Shape(NamedTuple):
    """Sizes of the model; dtype is that of matrix-product inputs."""

    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    rope_theta: float = 10_000.0
    dtype: str = "float32"


def init_params(key: jax.Array, shape: Shape) -> Params:
    """Returns {"embed", "norm", "layers": [one dict a layer]}, float32."""
    d, f = shape.d_model, shape.d_ff
    small = (2 * shape.n_layers) ** -0.5
    sizes = {
        "query": (d, d, 1.0),
        "key": (d, d, 1.0),
        "value": (d, d, 1.0),
        "out": (d, d, small),
        "gate": (d, f, 1.0),
        "up": (d, f, 1.0),
        "down": (f, d, small),
    }

    def layer(key):
        keys = jax.random.split(key, len(sizes))
        params = {
            name: jax.random.normal(k, (n_in, n_out)) * scale * n_in**-0.5
            for k, (name, (n_in, n_out, scale)) in zip(keys, sizes.items(), strict=True)
        }
        return params | {"mixer_norm": jnp.ones(d), "mlp_norm": jnp.ones(d)}

    embed_key, *layer_keys = jax.random.split(key, shape.n_layers + 1)
    return {
        "embed": jax.random.normal(embed_key, (shape.vocab_size, d)) * d**-0.5,
        "norm": jnp.ones(d),
        "layers": [layer(k) for k in layer_keys],
    }


def loss_fn(params: Params, tokens: jax.Array, targets: jax.Array, shape: Shape) -> jax.Array:
    """Returns the mean negative log-likelihood of targets [batch, seq], nats a token."""
    d_key = shape.d_model // shape.n_heads
    frequencies = shape.rope_theta ** (-jnp.arange(0, d_key, 2) / d_key)
    angles = jnp.arange(tokens.shape[1])[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    x = params["embed"][tokens].astype(shape.dtype)
    for layer in params["layers"]:
        x = x + _attention(layer, _norm(x, layer["mixer_norm"]), cos, sin, shape.n_heads)
        x = x + _mlp(layer, _norm(x, layer["mlp_norm"]))
    logits = jnp.matmul(
        _norm(x, params["norm"]),
        params["embed"].T.astype(shape.dtype),
        preferred_element_type=jnp.float32,
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW after clipping by global norm; matrices of the layers decay, nothing else."""

    def is_decayed(params):
        layers = [{name: p.ndim == 2 for name, p in layer.items()} for layer in params["layers"]]
        return {"embed": False, "norm": False, "layers": layers}

    adamw = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=is_decayed
    )
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def make_train_step(shape: Shape, tx: optax.GradientTransformation) -> Callable:
    """Returns the compiled (state, tokens, targets) -> (state, metrics); state is donated.

    The state is (params, opt_state); metrics are loss (nats a token) and grad_norm.
    """

    def train_step(state, tokens, targets):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, targets, shape)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(train_step, donate_argnums=0)


def _norm(x, scale):
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPS)
    return (wide * scale).astype(x.dtype)


def _rotate(x, cos, sin):
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def _attention(layer, x, cos, sin, n_heads):
    batch, seq, d_model = x.shape

    def heads(name):
        return (x @ layer[name].astype(x.dtype)).reshape(batch, seq, n_heads, -1)

    is_fused = jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16
    out = jax.nn.dot_product_attention(
        _rotate(heads("query"), cos, sin),
        _rotate(heads("key"), cos, sin),
        heads("value"),
        is_causal=True,
        implementation="cudnn" if is_fused else "xla",
    )
    return out.reshape(batch, seq, d_model) @ layer["out"].astype(x.dtype)


def _mlp(layer, x):
    gate, up, down = (layer[name].astype(x.dtype) for name in ("gate", "up", "down"))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down
