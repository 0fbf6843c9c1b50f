"""Decaying linear attention as a sequence mixer, in the form of RetNet's multi-scale retention.

    y = ( norm_per_head( decay_attention(q, k, v) ) * silu(x W_gate) ) W_out

Source: Sun et al. (2023), arXiv 2307.08621; decays of Lightning Attention: Qin et al. (2024), arXiv
2401.04658.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.nn.contract import Aux, Documents, no_aux
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.ops.decay import decay_attention
from longctx_jax.ops.position import rotate

DECAY_KINDS = ("retnet", "lightning", "learned", "none")
POSITIONS = ("rotary", "none")


@flax.struct.dataclass
class DecayCache:
    """The state matrix of every head, and the position of the next token."""

    state: jax.Array  # float32 [batch, heads, key, value]
    position: jax.Array  # int32 [batch]


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
    """

    n_heads: int
    d_key: int
    d_value: int
    kind: str
    chunk_len: int
    position: str
    rope_theta: float
    use_gate: bool
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
            cache = DecayCache(state=state, position=cache.position + seq)
        return out, cache, no_aux()

    def _log_decay(self) -> jax.Array:
        start = log_decays(self.kind, self.n_heads)
        if self.kind != "learned":
            return jnp.asarray(start)
        # log decay = -softplus(rate) stays <= 0 whatever the optimizer does.
        raw = np.log(np.expm1(-start)).astype(np.float32)
        rate = self.param("decay_rate", lambda key: jnp.asarray(raw))
        return -jax.nn.softplus(rate)

    def init_cache(self, batch_size: int, max_len: int) -> DecayCache:
        """Returns an empty state, 4 n_heads d_key d_value bytes a row; max_len does not matter."""
        del max_len
        shape = (batch_size, self.n_heads, self.d_key, self.d_value)
        return DecayCache(
            state=jnp.zeros(shape, jnp.promote_types(self.dtype, jnp.float32)),
            position=jnp.zeros((batch_size,), jnp.int32),
        )
