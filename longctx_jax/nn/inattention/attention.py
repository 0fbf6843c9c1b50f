"""Attention of the hidden state to the initial embeddings of the tokens: InAttention.

    k_j = (g * m_j) W_K,   v_j = (g * m_j) W_V       m_j: normed embedding of token j, of all layers
    out_i = sum_j softmax_j(q_i . k_j / sqrt(K) + bias(i - j)) v_j,   j <= i,   q_i = h_i W_Q

No layer reads what another token became, so one memory serves all layers, and a token whose output
nobody wants passes through none. Four exact ways to go on from a cache: keys and values a layer;
the rows m, absorbed, (q W_K^T) . m; the ids they are made of; how often each id occurred.

Source: Eisner (2024), arXiv 2410.07063, whose positions and normalisation are not public: these are
ours. Absorption: Yan et al. (2021), arXiv 2105.04779. Rotary rows beside the content: DeepSeek-AI
(2024), arXiv 2405.04434.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.nn.contract import Aux, Documents, no_aux
from longctx_jax.nn.inattention.forms import Projections, Reader, Sight
from longctx_jax.nn.inattention.memory import IdRing, KeyMemory, RowRing
from longctx_jax.nn.kv_cache import KVCache, NewTokens
from longctx_jax.nn.mlp import Kernel, dense
from longctx_jax.ops.position import DistanceBias, RotaryScaling, alibi_slopes, rotate

# relative: a learned bias a distance, by buckets from n_exact on; near: nothing from there on;
# alibi: fixed slopes; decoupled: rotary rows beside the content; rotary: as in a transformer
SCORE_POSITIONS = ("relative", "near", "alibi", "decoupled", "rotary", "none")


def projections(
    module: nn.Module, d_memory: int, n_kv_heads: int, d_key: int, d_value: int, dtype: str
) -> Projections:
    """Returns the parameters "gain", "key" and "value" of the (compact) module as kernels."""
    gain = module.param("gain", nn.initializers.ones, (d_memory,), jnp.float32)
    gain = gain[:, None, None].astype(dtype)
    key = Kernel(n_kv_heads * d_key, dtype, name="key")(d_memory)
    value = Kernel(n_kv_heads * d_value, dtype, name="value")(d_memory)
    return Projections(
        gain * key.reshape(d_memory, n_kv_heads, d_key),
        gain * value.reshape(d_memory, n_kv_heads, d_value),
    )


class SharedProjections(nn.Module):
    """Gain, W_K and W_V that all layers use."""

    n_kv_heads: int
    d_key: int
    d_value: int
    dtype: str

    @nn.compact
    def __call__(self, d_memory: int) -> Projections:
        """Returns the kernels."""
        return projections(self, d_memory, self.n_kv_heads, self.d_key, self.d_value, self.dtype)


def slanted(n_heads: int, n_exact: int, max_distance: int) -> np.ndarray:
    """Returns the bias that learning starts with, [heads, buckets]: ALiBi's, head by head.

    Attention to embeddings has nothing but its positions to find the words around a token with, so
    it starts near. Without max_distance the table ends at 0 where nothing is added any more.
    """
    slopes, exact = alibi_slopes(n_heads)[:, None], np.arange(n_exact, dtype=np.float64)
    if not max_distance:
        return slopes * (n_exact - exact)
    growing = n_exact * (max_distance / n_exact) ** (exact / n_exact)
    return -slopes * np.concatenate([exact, growing])


class InitialAttention(nn.Module):
    """Projections, causal softmax attention to the memory, output projection.

    Attributes:
        n_kv_heads: n_heads = MHA, 1 = MQA, between = GQA; the memory's size does not depend on it.
        d_memory: width of the memory's rows, without rotary ones.
        score_position: one of SCORE_POSITIONS.
        n_exact: relative, near: distances with a bias of their own.
        max_distance: relative: farther tokens share a bias.
        d_rotary: decoupled: numbers of a row that are rotated, shared by all heads and layers.
        shares_projections: W_K and W_V come from outside.
        output_scale: as in `SoftmaxAttention`.
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    d_memory: int
    score_position: str
    n_exact: int
    max_distance: int
    d_rotary: int
    rope_theta: float
    rope_scaling: RotaryScaling
    shares_projections: bool
    implementation: str
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Sight,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, KVCache | NewTokens | None, Aux]:
        """Maps [batch, n, d_model] to the same, and this layer's cache to the one after the call.

        Args:
            x: normed, of the n tokens that are in the layers.
            cache: what they may attend to.
            documents: of all tokens of the call.
            layer: not used.
            train: rules out forms without all gradients.
        """
        del layer
        sight = cache
        query = dense(self.n_heads * self.d_key, self.dtype, "query")(x)
        query = query.reshape(*x.shape[:2], self.n_heads, self.d_key)
        turned = None
        if self.score_position == "rotary":
            query = rotate(query, sight.query_positions, self.rope_theta, self.rope_scaling)
        elif self.score_position == "decoupled":
            turned = dense(self.n_heads * self.d_rotary, self.dtype, "rotary_query")(x)
            turned = turned.reshape(*x.shape[:2], self.n_heads, self.d_rotary)
            turned = rotate(turned, sight.query_positions, self.rope_theta, self.rope_scaling)
        kernels = sight.shared
        if not self.shares_projections:
            sizes = (self.n_kv_heads, self.d_key, self.d_value)
            kernels = projections(self, self.d_memory, *sizes, self.dtype)
        assert kernels is not None

        reader = Reader(self, query, turned, kernels, self._bias())
        kept = None
        if sight.after is None:
            out = reader.alone(sight, documents)
        elif isinstance(sight.after, KeyMemory):
            out, kept = reader.from_keys(sight, documents)
        elif x.shape[1] > 1:
            out = reader.from_window(sight, documents, train)
        elif isinstance(sight.after, RowRing):
            out = reader.from_rows(sight)
        elif isinstance(sight.after, IdRing):
            out = reader.from_ids(sight)
        else:
            out = reader.from_counts(sight)
        out = out.reshape(*x.shape[:2], -1)
        return dense(x.shape[-1], self.dtype, "out", self.output_scale)(out), kept, no_aux()

    def _bias(self) -> DistanceBias | None:
        if self.score_position == "alibi":
            wide = jnp.promote_types(self.dtype, jnp.float32)
            return DistanceBias(slopes=jnp.asarray(alibi_slopes(self.n_heads), wide))
        if self.score_position not in ("relative", "near"):
            return None
        max_distance = 0 if self.score_position == "near" else self.max_distance

        def start(key):
            del key
            return jnp.asarray(slanted(self.n_heads, self.n_exact, max_distance), jnp.float32)

        return DistanceBias(self.param("relative_bias", start), max_distance)
