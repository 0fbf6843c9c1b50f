"""Softmax attention as a sequence mixer: MHA, GQA and MQA, of everything that the cache holds.

    y_t = sum over s <= t of softmax_s(q_t . k_s / sqrt(K) + bias(t - s)) v_s W_out

with q, k, v = x W, a key head shared by n_heads / n_kv_heads query heads; positions are rotated
into q and k, or a learned bias by log-bucketed distance, or not told.

Source: Vaswani et al. (2017), arXiv 1706.03762; Shazeer (2019), arXiv 1911.02150 (MQA); Ainslie et
al. (2023), arXiv 2305.13245 (GQA); Su et al. (2021), arXiv 2104.09864 (rotary positions).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn import costs
from longctx_jax.nn.config_checks import require_one_of, require_types
from longctx_jax.nn.contract import Aux, Call, Costs, Documents, Mixer, Sizes, no_aux
from longctx_jax.nn.kv_cache import KVCache, NewTokens, cached_attention, init_kv_cache
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.nn.rotary_config import RotaryConfig
from longctx_jax.ops.position import DistanceBias, rotate

N_RELATIVE_BUCKETS = 32
POSITIONS = ("rotary", "relative", "none")


@dataclasses.dataclass(frozen=True)
class ExactAttentionConfig(RotaryConfig):
    """The fields that full attention and attention in a window have in common."""

    position: str = "rotary"
    qk_norm: bool = False
    implementation: str = "auto"

    def check(self, prefix: str) -> None:
        """Raises ValueError unless the fields make sense; `prefix` is that of their names."""
        require_types(self, prefix)
        require_one_of(f"{prefix}position", self.position, POSITIONS)
        self.check_rotary(prefix)


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(ExactAttentionConfig):
    """`config.model.softmax`."""

    def __post_init__(self):
        self.check("softmax.")


class SoftmaxAttention(nn.Module):
    """Projections, exact causal softmax attention, output projection.

    Attributes:
        window_len: tokens a query sees, itself included; 0 = all the cache holds.
    """

    sizes: Sizes
    config: ExactAttentionConfig
    window_len: int = 0

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
        sizes, config = self.sizes, self.config
        query = self._heads(x, "query", sizes.n_heads, sizes.d_key)
        key = self._heads(x, "key", sizes.n_kv_heads, sizes.d_key)
        value = self._heads(x, "value", sizes.n_kv_heads, sizes.d_value)
        if config.qk_norm:
            query = RMSNorm(sizes.dtype, sizes.norm_eps, name="query_norm")(query)
            key = RMSNorm(sizes.dtype, sizes.norm_eps, name="key_norm")(key)
        if config.position == "rotary":
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            if cache is not None:
                positions = cache.position[:, None] + positions
            query = rotate(query, positions, config.rope_theta, config.rotary_scaling)
            key = rotate(key, positions, config.rope_theta, config.rotary_scaling)
        bias = None
        if config.position == "relative":
            shape = (sizes.n_heads, N_RELATIVE_BUCKETS)
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
            implementation=config.implementation,
        )
        out = out.reshape(*out.shape[:2], -1)
        out = dense(x.shape[-1], sizes.dtype, "out", sizes.output_scale)(out)
        return out, kept, no_aux()

    def _heads(self, x, name, n_heads, width):
        y = dense(n_heads * width, self.sizes.dtype, name)(x)
        return y.reshape(*x.shape[:2], n_heads, width)

    def init_cache(self, batch_size: int, max_len: int) -> KVCache:
        """Returns an empty ring of C = max_len tokens, at most the window.

        Bytes a row: C n_kv_heads (d_key + d_value) numbers of dtype, and 8 C + 4.
        """
        capacity = min(self.window_len or max_len, max_len)
        c = self.sizes
        return init_kv_cache(batch_size, capacity, c.n_kv_heads, c.d_key, c.d_value, c.dtype)


def _costs(sizes: Sizes, config: SoftmaxConfig, call: Call) -> Costs:
    """Projections and 2 H n (K + V) a token for n keys; scores of the call, or onto the ring."""
    del config
    return Costs(
        flops=costs.softmax_flops(sizes, costs.n_keys(call)),
        rows=costs.head_numbers(sizes),
        scores=costs.ring_scores(sizes, call.seq_len, call.cache_len),
    )


MIXER = Mixer(
    config=SoftmaxConfig,
    build=SoftmaxAttention,
    costs=_costs,
    examples={
        "mha": {},
        "gqa_relative": {
            "n_heads": 4,
            "n_kv_heads": 2,
            "softmax": {"position": "relative", "qk_norm": True},
        },
    },
)
