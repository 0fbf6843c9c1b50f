"""Softmax attention as a sequence mixer: MHA, GQA and MQA, full or in a sliding window."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Aux, Documents, no_aux
from longctx_jax.nn.kv_cache import KVCache, NewTokens, cached_attention, init_kv_cache
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import EPS, RMSNorm
from longctx_jax.ops.position import UNSCALED, DistanceBias, RotaryScaling, rotate

N_RELATIVE_BUCKETS = 32
POSITIONS = ("rotary", "relative", "none")


class SoftmaxAttention(nn.Module):
    """Projections, exact causal softmax attention, output projection.

    Attributes:
        n_kv_heads: n_heads = MHA, 1 = MQA, between = GQA.
        window_len: tokens a query sees, itself included; 0 = all the cache holds.
        position: "rotary", "relative" (learned bias by log-bucketed distance) or "none".
        output_scale: standard deviation of the output projection, relative to 1/sqrt(fan in).
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    window_len: int
    position: str
    rope_theta: float
    qk_norm: bool
    implementation: str
    dtype: str
    output_scale: float
    rope_scaling: RotaryScaling = UNSCALED
    norm_eps: float = EPS

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: KVCache | None,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, KVCache | NewTokens | None, Aux]:
        """Maps [batch, seq, d_model] to the same; `cache` None = empty and not wanted back."""
        del layer, train
        query = self._heads(x, "query", self.n_heads, self.d_key)
        key = self._heads(x, "key", self.n_kv_heads, self.d_key)
        value = self._heads(x, "value", self.n_kv_heads, self.d_value)
        if self.qk_norm:
            query = RMSNorm(self.dtype, self.norm_eps, name="query_norm")(query)
            key = RMSNorm(self.dtype, self.norm_eps, name="key_norm")(key)
        if self.position == "rotary":
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            if cache is not None:
                positions = cache.position[:, None] + positions
            query = rotate(query, positions, self.rope_theta, self.rope_scaling)
            key = rotate(key, positions, self.rope_theta, self.rope_scaling)
        bias = None
        if self.position == "relative":
            shape = (self.n_heads, N_RELATIVE_BUCKETS)
            table = self.param("relative_bias", nn.initializers.zeros, shape, jnp.float32)
            bias = DistanceBias(table)

        out, kept = cached_attention(
            query,
            key,
            value,
            cache,
            documents,
            window_len=self.window_len,
            relative_bias=bias,
            implementation=self.implementation,
        )
        out = out.reshape(*out.shape[:2], -1)
        return dense(x.shape[-1], self.dtype, "out", self.output_scale)(out), kept, no_aux()

    def _heads(self, x, name, n_heads, width):
        return dense(n_heads * width, self.dtype, name)(x).reshape(*x.shape[:2], n_heads, width)

    def init_cache(self, batch_size: int, max_len: int) -> KVCache:
        """Returns an empty cache: min(window, max_len) tokens (max_len without a window)."""
        capacity = min(self.window_len or max_len, max_len)
        return init_kv_cache(
            batch_size, capacity, self.n_kv_heads, self.d_key, self.d_value, self.dtype
        )
