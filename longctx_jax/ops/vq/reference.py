"""The definition of vector-quantised attention: all pairs of tokens, quadratic time and memory.

    out_i = sum_{j <= i} softmax_j( scale q_i . k_hat_j + B[i, i-j] ) v_j

over the tokens of i's document, B = 0 at distances it does not list. The oracle of the other forms;
it knows no blocks, no table and no state.

Source: Lingle (2023), arXiv 2309.16354, section 3.
"""

import jax
import jax.numpy as jnp

from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Float, Int


def vq_attention_reference(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq kv_heads key"],
    value: Float[Array, "batch seq kv_heads value"],
    *,
    relative_bias: Float[Array, "batch seq heads distances"] | None = None,
    documents: Int[Array, "batch seq"] | None = None,
    window_len: int,
    scale: float,
    use_table: bool = True,
    grad_through_cache: bool = True,
) -> Float[Array, "batch seq heads value"]:
    """Returns attention over quantised keys, with the gradients of the linear-time form.

    Args:
        query: [batch, seq, heads, key].
        key: quantised, with straight-through gradients (`codebook.quantize`).
        value: as key; query head h reads kv head h // (heads / kv_heads).
        relative_bias: added to the score of distances 0, 1, ...
        documents: of the tokens, not decreasing; None = one.
        window_len: distance up to which keys get gradients. Farther ones are seen (unless use_table
            is off) but, like the codewords that stand for them in the linear-time form, constant.
        scale: of query . key.
        use_table: see tokens farther than window_len at all.
        grad_through_cache: give those tokens' values a gradient.
    """
    dtype = accumulator(query, value)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    place = jnp.arange(query.shape[1])
    distance = place[:, None] - place[None]
    is_near = distance <= window_len
    fixed = jax.lax.stop_gradient

    def scores(key):
        return jnp.einsum("bthk,bshk->bhts", query, key, precision="highest")

    score = scale * jnp.where(is_near, scores(key), scores(fixed(key)))
    if relative_bias is not None:
        n_distances = relative_bias.shape[-1]
        index = jnp.broadcast_to(jnp.clip(distance, 0, n_distances - 1), score.shape)
        bias = jnp.moveaxis(relative_bias.astype(dtype), 1, 2)
        bias = jnp.take_along_axis(bias, index, axis=-1)
        score += jnp.where((distance >= 0) & (distance < n_distances), bias, 0.0)
    visible = distance >= 0
    if not use_table:
        visible &= is_near
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None])
    weight = jax.nn.softmax(jnp.where(visible, score, -jnp.inf), axis=-1)

    def weigh(weight, value):
        return jnp.einsum("bhts,bshv->bthv", weight, value, precision="highest")

    if grad_through_cache:
        return weigh(weight, value)
    near, far = jnp.where(is_near, weight, 0.0), jnp.where(is_near, 0.0, weight)
    return weigh(near, value) + weigh(far, fixed(value))
