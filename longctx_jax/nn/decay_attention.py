"""Decaying linear attention as a sequence mixer, in the form of RetNet's multi-scale retention.

    y = ( norm_per_head( decay_attention(q, k, v) ) * silu(x W_gate) ) W_out

with, if asked, a short convolution of x before the projections.

Source: Sun et al. (2023), arXiv 2307.08621; decays of Lightning Attention: Qin et al. (2024), arXiv
2401.04658.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.nn.contract import Aux, Documents, no_aux, own_documents
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.ops.convolution import short_convolution
from longctx_jax.ops.decay import decay_attention
from longctx_jax.ops.position import rotate

DECAY_KINDS = ("retnet", "lightning", "learned", "none")
POSITIONS = ("rotary", "none")


@flax.struct.dataclass
class DecayCache:
    """The state matrix of every head, and the position of the next token."""

    state: jax.Array  # float32 [batch, heads, key, value]
    position: jax.Array  # int32 [batch]
    history: Any = ()  # inputs of the convolution [batch, conv_len - 1, model]; () without one
    history_documents: Any = ()  # their documents, int32 [batch, conv_len - 1]


def log_decays(kind: str, n_heads: int) -> np.ndarray:
    """Returns the log decay of each head, float32 [heads].

    "retnet": log(1 - 2^(-5-h)); "lightning": -2^(-8(h+1)/H), the ALiBi slopes; "none": 0. "learned"
    starts from "retnet".
    """
    head = np.arange(n_heads)
    if kind == "lightning":
        return -(2.0 ** (-8.0 * (head + 1) / n_heads)).astype(np.float32)
    if kind == "none":
        return np.zeros(n_heads, np.float32)
    return np.log1p(-(2.0 ** (-5.0 - head))).astype(np.float32)


class DecayAttention(nn.Module):
    """Decaying linear attention with a gated, head-normalised output.

    Attributes:
        kind: where the per-head decays come from (`log_decays`); "learned" makes them parameters.
        chunk_len: tokens a chunk of the chunked form.
        position: "rotary" or "none".
        conv_len: tokens the short convolution mixes, the current one included; 0 = none.
        d_model: width of the input, for the convolution's cache.
    """

    n_heads: int
    d_key: int
    d_value: int
    kind: str
    chunk_len: int
    position: str
    rope_theta: float
    use_gate: bool
    conv_len: int
    d_model: int
    implementation: str
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: DecayCache | None, documents: Documents | None, *, train: bool
    ) -> tuple[jax.Array, DecayCache | None, Aux]:
        """Maps [batch, seq, d_model] to the same; `cache` None = empty and not wanted back."""
        del train
        batch, seq, d_model = x.shape
        if self.conv_len > 1:
            x, cache = self._convolve(x, cache, documents)

        def heads(name, width):
            y = dense(self.n_heads * width, self.dtype, name)(x)
            return y.reshape(batch, seq, self.n_heads, width)

        query, key = heads("query", self.d_key), heads("key", self.d_key)
        value = heads("value", self.d_value)
        if self.position == "rotary":
            positions = jnp.arange(seq, dtype=jnp.int32)[None]
            if cache is not None:
                positions = cache.position[:, None] + positions
            query = rotate(query, positions, self.rope_theta)
            key = rotate(key, positions, self.rope_theta)

        out, state = decay_attention(
            query,
            key,
            value,
            self._log_decay(),
            None if cache is None else cache.state,
            reset=None if documents is None else documents.reset,
            chunk_len=self.chunk_len,
            implementation=self.implementation,
        )
        out = RMSNorm(self.dtype, name="head_norm")(out).reshape(batch, seq, -1)
        if self.use_gate:
            out = out * jax.nn.silu(dense(out.shape[-1], self.dtype, "gate")(x))
        out = dense(d_model, self.dtype, "out", self.output_scale)(out)
        if cache is not None:
            cache = dataclasses.replace(cache, state=state, position=cache.position + seq)
        return out, cache, no_aux()

    def _convolve(self, x, cache, documents: Documents | None):
        """The short convolution; it starts as the identity plus a little noise."""

        def start(key, shape, dtype):
            return 0.1 * jax.random.normal(key, shape, dtype).at[0].add(10.0)

        shape = (self.conv_len, x.shape[-1])
        kernel = self.param("convolution", start, shape, jnp.float32)
        if cache is None:
            y, _ = short_convolution(x, kernel, documents=own_documents(documents))
            return y, None
        assert documents is not None
        y, history = short_convolution(
            x,
            kernel,
            cache.history,
            documents=documents.index,
            history_documents=cache.history_documents,
        )
        indices = jnp.concatenate([cache.history_documents, documents.index], axis=1)
        indices = indices[:, x.shape[1] :]
        return y, dataclasses.replace(cache, history=history, history_documents=indices)

    def _log_decay(self) -> jax.Array:
        start = log_decays(self.kind, self.n_heads)
        if self.kind != "learned":
            return jnp.asarray(start)
        # log decay = -softplus(rate) stays <= 0 whatever the optimizer does.
        raw = np.log(np.expm1(-start)).astype(np.float32)
        rate = self.param("decay_rate", lambda key: jnp.asarray(raw))
        return -jax.nn.softplus(rate)

    def init_cache(self, batch_size: int, max_len: int) -> DecayCache:
        """Returns an empty state, 4 n_heads d_key d_value bytes a row; max_len does not matter.

        A convolution adds its last conv_len - 1 inputs.
        """
        del max_len
        shape = (batch_size, self.n_heads, self.d_key, self.d_value)
        past = self.conv_len - 1
        return DecayCache(
            state=jnp.zeros(shape, jnp.promote_types(self.dtype, jnp.float32)),
            position=jnp.zeros((batch_size,), jnp.int32),
            history=jnp.zeros((batch_size, past, self.d_model), self.dtype) if past > 0 else (),
            history_documents=jnp.zeros((batch_size, past), jnp.int32) if past > 0 else (),
        )
