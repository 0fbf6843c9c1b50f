"""The associative memory of a layer: projections around `ops.memory`, and what it remembers.

    read    y = associative_read(phi(x W_q), A, z)          every row reads; added to its residual
    write   A, z = associative_write(phi(o W_k), o W_v, sigmoid(o W_b + b), A, z)     memory rows o

Neither has a norm in front. W_v starts at zero, so that a wrapped network starts as the network.

Source: Rodkin et al. (2024), arXiv 2407.04841.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn.mlp import dense
from longctx_jax.ops.memory import (
    EPS,
    MemoryState,
    associative_read,
    associative_write,
    dpfp,
    init_memory_state,
    n_features,
)
from longctx_jax.ops.products import accumulator

EMPTY = -1  # document of a memory into which nothing was written


@flax.struct.dataclass
class MemoryCache:
    """An associative memory and the document it was written by."""

    state: MemoryState  # float32 [batch, heads, features, value], [batch, heads, features]
    document: jax.Array  # int32 [batch]


class AssociativeMemory(nn.Module):
    """Reads and writes one layer's memory; a block's two neighbours, not a mixer.

    Attributes:
        d_model: width of the rows.
        d_memory: width of queries and keys before the feature map, all heads together.
        nu: order of the feature map.
        n_heads: memories side by side, each with its part of d_memory and d_model.
        correction: gamma corrects the normalizer for what a key recalls already.
        use_denominator: recalled values are weighted means, not sums.
        normalize: features have length 1: another model, of the authors' later experiments.
        eps: added to denominators.
    """

    d_model: int
    d_memory: int
    nu: int
    n_heads: int
    correction: bool
    use_denominator: bool
    normalize: bool
    eps: float
    dtype: str

    def setup(self):
        """Makes the projections."""
        self.query = dense(self.d_memory, self.dtype, "query")
        self.key = dense(self.d_memory, self.dtype, "key")
        zeros = nn.initializers.zeros
        self.value = nn.Dense(self.d_model, use_bias=False, dtype=self.dtype, kernel_init=zeros)
        self.beta = nn.Dense(self.n_heads, dtype=self.dtype)

    def __call__(self, x: jax.Array, cache: MemoryCache) -> jax.Array:
        """Touches every parameter, for `init`."""
        document = jnp.zeros((x.shape[0],), jnp.int32)
        cache, _ = self.write(x, document, cache)
        return self.read(x, jnp.broadcast_to(document[:, None], x.shape[:2]), cache)

    def read(self, x: jax.Array, documents: jax.Array, cache: MemoryCache) -> jax.Array:
        """Returns what rows [batch, rows, model] recall of their own documents [batch, rows]."""
        features = self._features(self.query(x))
        recalled = associative_read(
            features,
            cache.state,
            use_denominator=self.use_denominator,
            eps=self.eps,
        )
        recalled = jnp.moveaxis(recalled, 1, 2).reshape(*x.shape[:2], self.d_model)
        visible = documents == cache.document[:, None]
        return jnp.where(visible[..., None], recalled, 0).astype(x.dtype)

    def write(
        self, rows: jax.Array, document: jax.Array, cache: MemoryCache
    ) -> tuple[MemoryCache, jax.Array]:
        """Returns the memory after rows [batch, rows, model] of one document each, and gamma.

        What another document wrote is dropped first. gamma is [batch, heads, rows].
        """
        batch, n_rows = rows.shape[:2]
        value = self.value(rows).reshape(batch, n_rows, self.n_heads, -1)
        beta = self.beta(rows)
        beta = jax.nn.sigmoid(beta.astype(accumulator(beta)))
        is_empty = (cache.document != document)[:, None]
        state, gamma = associative_write(
            self._features(self.key(rows)),
            jnp.moveaxis(value, 2, 1),
            jnp.moveaxis(beta, 2, 1),
            cache.state,
            is_empty=jnp.broadcast_to(is_empty, (batch, self.n_heads)),
            correction=self.correction,
            use_denominator=self.use_denominator,
            eps=self.eps,
        )
        return MemoryCache(state=state, document=document), gamma

    def _features(self, projected: jax.Array) -> jax.Array:
        """[batch, rows, d_memory] -> float32 features [batch, heads, rows, features]."""
        wide = projected.astype(accumulator(projected))
        wide = wide.reshape(*wide.shape[:2], self.n_heads, -1)
        features = dpfp(jnp.moveaxis(wide, 2, 1), self.nu)
        if self.normalize:
            # Not norm + eps: its gradient at 0 is not finite.
            features *= jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + EPS**2)
        return features

    def init_cache(self, batch_size: int) -> MemoryCache:
        """Returns an empty memory of 4 K (d_model + n_heads) bytes a row, K features a head."""
        size = n_features(self.d_memory // self.n_heads, self.nu)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        axes = (batch_size, self.n_heads)
        return MemoryCache(
            state=init_memory_state(axes, size, self.d_model // self.n_heads, dtype),
            document=jnp.full((batch_size,), EMPTY, jnp.int32),
        )
