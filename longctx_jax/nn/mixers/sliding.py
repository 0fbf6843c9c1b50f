"""Softmax attention in a sliding window as a sequence mixer: the softmax mixer's, over window_len.

    y_t = sum over t - window_len < s <= t of softmax_s(q_t . k_s / sqrt(K) + bias(t - s)) v_s W_out

Source: Child et al. (2019), arXiv 1904.10509; Beltagy et al. (2020), arXiv 2004.05150.
"""

import dataclasses

from longctx_jax.nn import costs
from longctx_jax.nn.config_checks import require_positive
from longctx_jax.nn.contract import Call, Costs, Mixer, Sizes
from longctx_jax.nn.mixers.softmax import ExactAttentionConfig, SoftmaxAttention
from longctx_jax.ops.attention import MIN_BAND_LEN


@dataclasses.dataclass(frozen=True)
class SlidingConfig(ExactAttentionConfig):
    """`config.model.sliding`."""

    window_len: int = 128

    def __post_init__(self):
        self.check("sliding.")
        require_positive("sliding.window_len", self.window_len)


def _build(sizes: Sizes, config: SlidingConfig) -> SoftmaxAttention:
    return SoftmaxAttention(sizes, config, config.window_len)


def _costs(sizes: Sizes, config: SlidingConfig, call: Call) -> Costs:
    """As of softmax attention; scores of tiles of a window, each against two, or of the ring."""
    tile = max(config.window_len, MIN_BAND_LEN)
    ring_len = min(config.window_len, call.cache_len or config.window_len)
    scores = costs.ring_scores(sizes, call.seq_len, ring_len)
    if call.seq_len > 2 * tile:
        n_reaching = min(call.seq_len, max(1, ring_len - 1))
        own = -(-call.seq_len // tile) * tile * 2 * tile
        pairs = max(own, costs.pairs_at_once(sizes, n_reaching, ring_len))
        scores = costs.SCORE_COPIES * sizes.n_heads * pairs
    return Costs(
        flops=costs.softmax_flops(sizes, costs.n_keys(call, config.window_len)),
        rows=costs.head_numbers(sizes),
        scores=scores,
    )


MIXER = Mixer(
    config=SlidingConfig,
    build=_build,
    costs=_costs,
    examples={"sliding": {"d_value": 6, "sliding": {"window_len": 5}}},
)
