"""One token of vector-quantised attention: decoding, without moving the ring.

The same numbers as a block of one query, but the ring is read where it stands and one slot of it is
written, where the block form would copy all of it into order. The token that leaves the ring is
filed afterwards: at distance window_len it is still seen by itself.

Source: Lingle (2023), arXiv 2309.16354, section 3.
"""

import functools

import jax
import jax.numpy as jnp

from longctx_jax.ops.products import accumulator, product
from longctx_jax.ops.vq.blocks import Rules
from longctx_jax.ops.vq.state import Tokens, VQState, write
from longctx_jax.ops.vq.table import file_token
from longctx_jax.typing import Array, Float


def step(
    query: Float[Array, "batch 1 heads key"],
    token: Tokens,
    codebook: Float[Array, "kv_heads codes key"],
    state: VQState,
    *,
    relative_bias: Float[Array, "batch 1 heads distances"] | None,
    rules: Rules,
) -> tuple[Float[Array, "batch 1 heads value"], VQState]:
    """Returns attention of one token over the state and itself, and the state after it.

    Cost: 2 batch heads (codes + window + 1) (key + value) flops; reads the state once.
    """
    dtype = accumulator(query, state.value)
    batch, _, heads, d_key = query.shape
    kv_heads, window = state.key.shape[2], rules.window_len
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, d_key)
    position = state.position[:, None]
    # Slot p % window holds the newest position congruent to it.
    age = (position - 1 - jnp.arange(window)[None]) % window
    distance = age + 1  # [batch, window], 1 .. window
    visible = state.documents == token.documents
    score = functools.partial(product, dtype=dtype)

    ring = rules.scale * score("bhgk,bshk->bhgs", grouped, state.key.astype(query.dtype))
    own = rules.scale * score("bhgk,bhsk->bhgs", grouped, token.key.astype(query.dtype))
    if relative_bias is not None:
        bias = relative_bias.astype(dtype).reshape(batch, kv_heads, heads // kv_heads, -1)
        n_distances = bias.shape[-1]
        index = jnp.broadcast_to(jnp.minimum(distance, n_distances - 1)[:, None, None], ring.shape)
        listed = (distance < n_distances)[:, None, None]
        ring += jnp.where(listed, jnp.take_along_axis(bias, index, axis=-1), 0.0)
        own += bias[..., :1]
    ring = jnp.where(visible[:, None, None], ring, -jnp.inf)
    scores = [own, ring]
    if rules.use_table:
        table = rules.scale * score("bhgk,hsk->bhgs", grouped, codebook.astype(query.dtype))
        table += jnp.log(state.table.count.astype(dtype))[:, :, None]
        is_open = state.table.document == token.documents[:, 0]
        scores.append(jnp.where(is_open[:, None, None, None], table, -jnp.inf))

    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = weights.astype(token.value.dtype)
    own, ring, table = jnp.split(weights, [1, 1 + window], axis=-1)
    out = score("bhgs,bhsv->bhgv", own, token.value)
    out += score("bhgs,bshv->bhgv", ring, state.value.astype(token.value.dtype))
    filed = state.table
    if rules.use_table:
        codes, value, document = _leaving(state)
        if not rules.grad_through_cache:
            filed, value = jax.lax.stop_gradient((filed, value))
        out += score("bhgs,bhsv->bhgv", table, filed.mean.astype(token.value.dtype))
        filed = file_token(filed, codes, value, document)
    out = out.astype(token.value.dtype).reshape(batch, 1, heads, -1)
    return out, write(state, token, filed, 1)


def _leaving(state: VQState):
    """Returns codes, value and document of the token whose slot is written next."""
    rows = jnp.arange(state.position.shape[0])
    slot = state.position % state.window_len
    return state.codes[rows, slot], state.value[rows, slot], state.documents[rows, slot]
