"""Decaying linear attention as a sequence mixer: retention, Lightning Attention, gated retention.

    y = ( norm( decay_attention(f(q), f(k), g(v)) ) * gate(x W_gate) ) W_out

with, if asked, a short convolution of x before the projections. Where the decay comes from, what f,
g and the gate are, whether the norm is one a head, and whether positions are rotated in are
options; docs/decay.md has those of RetNet, TransNormerLLM, MiniMax-01 and gated retention.

Source: Sun et al. (2023), arXiv 2307.08621 (RetNet); Sun et al. (2024), arXiv 2405.05254 (gated
retention); Qin et al. (2023), arXiv 2307.14995 (TransNormerLLM); Qin et al. (2024), arXiv
2401.04658 (Lightning Attention-2); MiniMax (2025), arXiv 2501.08313, and its public code.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.nn import costs
from longctx_jax.nn.config_checks import (
    require_not_negative,
    require_one_of,
    require_positive,
    require_types,
)
from longctx_jax.nn.contract import (
    Aux,
    Call,
    Costs,
    Documents,
    Mixer,
    Sizes,
    no_aux,
    own_documents,
)
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import LayerNorm, RMSNorm
from longctx_jax.ops.convolution import short_convolution
from longctx_jax.ops.decay import decay_attention
from longctx_jax.ops.position import rotate

DECAY_KINDS = ("retnet", "lightning", "transnormer", "learned", "gated", "none")
DEPTH_SCHEDULES = ("constant", "linear", "minimax")
POSITIONS = ("rotary", "none")
FEATURE_MAPS = {"none": lambda x: x, "silu": jax.nn.silu, "elu": lambda x: jax.nn.elu(x) + 1.0}
GATES = {
    "none": None,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}
HEAD_NORMS = {
    "rms": lambda dtype: RMSNorm(dtype, name="head_norm"),
    "layer": lambda dtype: LayerNorm(dtype, name="head_norm"),
    "plain_rms": lambda dtype: RMSNorm(dtype, use_scale=False, name="head_norm"),
}
NORM_SPANS = ("head", "all")
SMALL = 1e-5  # of MiniMax-01's slopes
GATE_TEMPERATURE = 16.0  # of gated decay: log decay = log sigmoid(x W + b) / it, as in public code


@dataclasses.dataclass(frozen=True)
class DecayConfig:
    """`config.model.decay`.

    Attributes:
        kind: where the per-head decays come from (`log_decays`); "learned" makes them parameters,
            "gated" functions of the token.
        depth: how they change from layer to layer (`log_decays_by_layer`).
        feature_map: f, of queries and keys.
        value_map: g, of values: the same choices.
        gate: "none", or what becomes of x W_gate; "linear" leaves it as it is.
        norm_span: "head": head_norm normalises each head by itself; "all": all of them at once.
        scale_query: divide queries by sqrt(d_key); after a norm it matters only beside its eps.
        conv_len: tokens the short convolution mixes, the current one included; 0 = none.
    """

    kind: str = "retnet"
    depth: str = "constant"
    chunk_len: int = 64
    position: str = "rotary"
    rope_theta: float = 10_000.0
    feature_map: str = "none"
    value_map: str = "none"
    gate: str = "silu"
    head_norm: str = "rms"
    norm_span: str = "head"
    scale_query: bool = True
    conv_len: int = 0
    implementation: str = "auto"

    def __post_init__(self):
        require_types(self, "decay.")
        require_one_of("decay.kind", self.kind, DECAY_KINDS)
        require_one_of("decay.depth", self.depth, DEPTH_SCHEDULES)
        require_one_of("decay.feature_map", self.feature_map, tuple(FEATURE_MAPS))
        require_one_of("decay.value_map", self.value_map, tuple(FEATURE_MAPS))
        require_one_of("decay.norm_span", self.norm_span, NORM_SPANS)
        require_one_of("decay.gate", self.gate, tuple(GATES))
        require_one_of("decay.head_norm", self.head_norm, tuple(HEAD_NORMS))
        require_positive("decay.chunk_len", self.chunk_len)
        require_not_negative("decay.conv_len", self.conv_len)
        require_one_of("decay.position", self.position, POSITIONS)
        require_positive("decay.rope_theta", self.rope_theta)


@flax.struct.dataclass
class DecayCache:
    """The state matrix of every head, and the position of the next token."""

    state: jax.Array  # float32 [batch, heads, key, value]
    position: jax.Array  # int32 [batch]
    history: Any = ()  # inputs of the convolution [batch, conv_len - 1, model]; () without one
    history_documents: Any = ()  # their documents, int32 [batch, conv_len - 1]


def log_decays(kind: str, n_heads: int) -> np.ndarray:
    """Returns the log decay of each head, float64 [heads].

    "retnet": log(1 - 2^(-5-h)); "lightning": -2^(-8(h+1)/H), the ALiBi slopes; "transnormer":
    -8h/H, so head 0 never forgets; "none": 0. "learned" and "gated" start from "retnet".
    """
    head = np.arange(n_heads)
    if kind == "lightning":
        return -(2.0 ** (-8.0 * (head + 1) / n_heads))
    if kind == "transnormer":
        return -8.0 * head / n_heads
    if kind == "none":
        return np.zeros(n_heads)
    return np.log1p(-(2.0 ** (-5.0 - head)))


def log_decays_by_layer(kind: str, depth: str, n_layers: int, n_heads: int) -> np.ndarray:
    """Returns `log_decays` of every layer, float64 [layers, heads].

    Depth "constant": the same in all. Or deeper layers forget less: "linear": times 1 - l/L
    (TransNormerLLM); "minimax": times 1 - l/(L - 1 + s) + s, s = 1e-5 (MiniMax-01), so that the
    last layer hardly forgets at all.
    """
    layer = np.arange(n_layers)
    factor = {
        "constant": np.ones(n_layers),
        "linear": 1 - layer / n_layers,
        "minimax": 1 - layer / (n_layers - 1 + SMALL) + SMALL,
    }[depth]
    return np.outer(factor, log_decays(kind, n_heads))


class DecayAttention(nn.Module):
    """Decaying linear attention with a gated, head-normalised output."""

    sizes: Sizes
    config: DecayConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: DecayCache | None,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, DecayCache | None, Aux]:
        """Maps [batch, seq, d_model] to the same; `cache` None = empty and not wanted back.

        `layer` is the block's place in the stack, int32; None = 0.
        """
        sizes, config = self.sizes, self.config
        batch, seq, d_model = x.shape
        if config.conv_len > 1:
            x, cache = self._convolve(x, cache, documents)

        def heads(name, n_heads, width):
            y = dense(n_heads * width, sizes.dtype, name)(x)
            return y.reshape(batch, seq, n_heads, width)

        feature_map = FEATURE_MAPS[config.feature_map]
        query = feature_map(heads("query", sizes.n_heads, sizes.d_key))
        key = feature_map(heads("key", sizes.n_kv_heads, sizes.d_key))
        value = FEATURE_MAPS[config.value_map](heads("value", sizes.n_kv_heads, sizes.d_value))
        if config.position == "rotary":
            positions = jnp.arange(seq, dtype=jnp.int32)[None]
            if cache is not None:
                positions = cache.position[:, None] + positions
            query = rotate(query, positions, config.rope_theta)
            key = rotate(key, positions, config.rope_theta)

        out, state = decay_attention(
            query,
            key,
            value,
            self._log_decay(x, 0 if layer is None else layer),
            None if cache is None else cache.state,
            reset=None if documents is None else documents.reset,
            scale=None if config.scale_query else 1.0,
            chunk_len=config.chunk_len,
            for_training=train,
            implementation=config.implementation,
        )
        if config.norm_span == "all":
            out = out.reshape(batch, seq, -1)
        out = HEAD_NORMS[config.head_norm](sizes.dtype)(out).reshape(batch, seq, -1)
        if gate := GATES[config.gate]:
            out = out * gate(dense(out.shape[-1], sizes.dtype, "gate")(x))
        out = dense(d_model, sizes.dtype, "out", sizes.output_scale)(out)
        if cache is not None:
            cache = dataclasses.replace(cache, state=state, position=cache.position + seq)
        return out, cache, no_aux()

    def _convolve(self, x, cache, documents: Documents | None):
        """The short convolution; it starts as the identity plus a little noise."""

        def start(key, shape, dtype):
            return 0.1 * jax.random.normal(key, shape, dtype).at[0].add(10.0)

        shape = (self.config.conv_len, x.shape[-1])
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

    def _log_decay(self, x: jax.Array, layer: jax.Array | int) -> jax.Array:
        """Returns the log decays, at least float32: [heads], or [batch, seq, heads] if gated."""
        sizes, config = self.sizes, self.config
        table = log_decays_by_layer(config.kind, config.depth, sizes.n_layers, sizes.n_heads)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if config.kind not in ("learned", "gated"):
            return jnp.asarray(table, wide)[layer]
        # The starts are taken in float64: float32 has no log of what the slowest heads forget.
        table = np.minimum(table, -np.finfo(np.float64).tiny)
        if config.kind == "learned":
            # log decay = -softplus(rate) stays <= 0 whatever the optimizer does.
            start = jnp.asarray(np.log(np.expm1(-table)), jnp.float32)
            rate = self.param("decay_rate", lambda key: start[layer])
            return -jax.nn.softplus(rate.astype(wide))
        # The bias starts every head at its constant decay: sigmoid(b) = exp(start * 16).
        open_at = GATE_TEMPERATURE * table
        start = jnp.asarray(open_at - np.log(-np.expm1(open_at)), jnp.float32)
        bias = self.param("decay_bias", lambda key: start[layer])
        logits = dense(sizes.n_heads, str(wide), "decay_gate")(x.astype(wide)) + bias[None, None]
        return jax.nn.log_sigmoid(logits) / GATE_TEMPERATURE

    def init_cache(self, batch_size: int, max_len: int) -> DecayCache:
        """Returns an empty state, 4 n_heads d_key d_value bytes a row; max_len does not matter.

        A convolution adds its last conv_len - 1 inputs.
        """
        del max_len
        sizes = self.sizes
        shape = (batch_size, sizes.n_heads, sizes.d_key, sizes.d_value)
        past = self.config.conv_len - 1
        return DecayCache(
            state=jnp.zeros(shape, jnp.promote_types(sizes.dtype, jnp.float32)),
            position=jnp.zeros((batch_size,), jnp.int32),
            history=jnp.zeros((batch_size, past, sizes.d_model), sizes.dtype) if past > 0 else (),
            history_documents=jnp.zeros((batch_size, past), jnp.int32) if past > 0 else (),
        )


def _costs(sizes: Sizes, config: DecayConfig, call: Call) -> Costs:
    """Projections, the gate, a decay per token if gated, and the chunked form of the op."""
    heads, d_key, d_value = sizes.n_heads, sizes.d_key, sizes.d_value
    gate = 0 if config.gate == "none" else heads * d_value
    per_token = heads if config.kind == "gated" else 0
    products = costs.projection_flops(sizes) + 2 * sizes.d_model * (gate + per_token)
    sizes_of_op = (call.seq_len, config.chunk_len, d_key, d_value)
    return Costs(
        flops=products + costs.chunked_flops(heads, *sizes_of_op),
        rows=costs.head_numbers(sizes) + gate,
        scores=heads * costs.chunked_scores(call.seq_len, config.chunk_len, d_key * d_value),
    )


MIXER = Mixer(
    config=DecayConfig,
    build=DecayAttention,
    costs=_costs,
    examples={
        "retnet": {
            "d_value": 6,
            "norm": "layer",
            "mlp": "gelu",
            "decay": {"chunk_len": 4, "conv_len": 3},
        },
        "gated": {
            "n_kv_heads": 1,
            "decay": {
                "chunk_len": 4,
                "kind": "gated",
                "depth": "linear",
                "feature_map": "silu",
                "gate": "sigmoid",
            },
        },
    },
)
