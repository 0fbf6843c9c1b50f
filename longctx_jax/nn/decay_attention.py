"""Decaying linear attention as a sequence mixer: retention, Lightning Attention, gated retention.

    y = ( norm_per_head( decay_attention(f(q), f(k), v) ) * gate(x W_gate) ) W_out

with, if asked, a short convolution of x before the projections. Where the decay comes from, what f
and the gate are, and whether positions are rotated in are options: RetNet is (kind "retnet",
rotary, gate "silu"), TransNormerLLM (kind "transnormer", rates falling with depth, feature map
"silu", gate "sigmoid"), MiniMax-01 (kind "lightning", falling with depth), gated retention (kind
"gated": a decay per token and head).

Source: Sun et al. (2023), arXiv 2307.08621 (RetNet); Sun et al. (2024), arXiv 2405.05254 (gated
retention); Qin et al. (2023), arXiv 2307.14995 (TransNormerLLM); Qin et al. (2024), arXiv
2401.04658 (Lightning Attention-2).
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
from longctx_jax.nn.norms import LayerNorm, RMSNorm
from longctx_jax.ops.convolution import short_convolution
from longctx_jax.ops.decay import decay_attention
from longctx_jax.ops.position import rotate

DECAY_KINDS = ("retnet", "lightning", "transnormer", "learned", "gated", "none")
DEPTH_SCHEDULES = ("constant", "linear")
POSITIONS = ("rotary", "none")
FEATURE_MAPS = {"none": lambda x: x, "silu": jax.nn.silu, "elu": lambda x: jax.nn.elu(x) + 1.0}
GATES = {"none": None, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}
HEAD_NORMS = {
    "rms": lambda dtype: RMSNorm(dtype, name="head_norm"),
    "layer": lambda dtype: LayerNorm(dtype, name="head_norm"),
    "plain_rms": lambda dtype: RMSNorm(dtype, use_scale=False, name="head_norm"),
}
GATE_TEMPERATURE = 16.0  # of gated decay: log decay = log sigmoid(x W + b) / it, as in public code


@flax.struct.dataclass
class DecayCache:
    """The state matrix of every head, and the position of the next token."""

    state: jax.Array  # float32 [batch, heads, key, value]
    position: jax.Array  # int32 [batch]
    history: Any = ()  # inputs of the convolution [batch, conv_len - 1, model]; () without one
    history_documents: Any = ()  # their documents, int32 [batch, conv_len - 1]


def log_decays(kind: str, n_heads: int) -> np.ndarray:
    """Returns the log decay of each head, float32 [heads].

    "retnet": log(1 - 2^(-5-h)); "lightning": -2^(-8(h+1)/H), the ALiBi slopes; "transnormer":
    -8h/H, so head 0 never forgets; "none": 0. "learned" and "gated" start from "retnet".
    """
    head = np.arange(n_heads)
    if kind == "lightning":
        return -(2.0 ** (-8.0 * (head + 1) / n_heads)).astype(np.float32)
    if kind == "transnormer":
        return (-8.0 * head / n_heads).astype(np.float32)
    if kind == "none":
        return np.zeros(n_heads, np.float32)
    return np.log1p(-(2.0 ** (-5.0 - head))).astype(np.float32)


def log_decays_by_layer(kind: str, depth: str, n_layers: int, n_heads: int) -> np.ndarray:
    """Returns `log_decays` of every layer, float32 [layers, heads].

    Depth "constant": the same in all. "linear": times 1 - l/L, so that deeper layers forget less
    (TransNormerLLM; MiniMax-01).
    """
    factor = np.ones(n_layers) if depth == "constant" else 1 - np.arange(n_layers) / n_layers
    return np.outer(factor, log_decays(kind, n_heads)).astype(np.float32)


class DecayAttention(nn.Module):
    """Decaying linear attention with a gated, head-normalised output.

    Attributes:
        n_kv_heads: heads of key and value, each shared by a run of query heads.
        kind: where the per-head decays come from (`log_decays`); "learned" makes them parameters,
            "gated" functions of the token.
        depth: how they change from layer to layer (`log_decays_by_layer`).
        n_layers: of the stack, for `depth`.
        chunk_len: tokens a chunk of the chunked form.
        position: "rotary" or "none".
        feature_map: of query and key: "none", "silu" or "elu" (elu + 1).
        gate: "silu", "sigmoid" or "none".
        head_norm: "rms", "layer" or "plain_rms" (no scale), over each head's output.
        conv_len: tokens the short convolution mixes, the current one included; 0 = none.
        d_model: width of the input, for the convolution's cache.
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    kind: str
    depth: str
    n_layers: int
    chunk_len: int
    position: str
    rope_theta: float
    feature_map: str
    gate: str
    head_norm: str
    conv_len: int
    d_model: int
    implementation: str
    dtype: str
    output_scale: float

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
        batch, seq, d_model = x.shape
        if self.conv_len > 1:
            x, cache = self._convolve(x, cache, documents)

        def heads(name, n_heads, width):
            y = dense(n_heads * width, self.dtype, name)(x)
            return y.reshape(batch, seq, n_heads, width)

        feature_map = FEATURE_MAPS[self.feature_map]
        query = feature_map(heads("query", self.n_heads, self.d_key))
        key = feature_map(heads("key", self.n_kv_heads, self.d_key))
        value = heads("value", self.n_kv_heads, self.d_value)
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
            self._log_decay(x, 0 if layer is None else layer),
            None if cache is None else cache.state,
            reset=None if documents is None else documents.reset,
            chunk_len=self.chunk_len,
            for_training=train,
            implementation=self.implementation,
        )
        out = HEAD_NORMS[self.head_norm](self.dtype)(out).reshape(batch, seq, -1)
        if gate := GATES[self.gate]:
            out = out * gate(dense(out.shape[-1], self.dtype, "gate")(x))
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

    def _log_decay(self, x: jax.Array, layer: jax.Array | int) -> jax.Array:
        """Returns the log decays, float32: [heads], or [batch, seq, heads] if gated."""
        table = log_decays_by_layer(self.kind, self.depth, self.n_layers, self.n_heads)
        start = jnp.asarray(table)[layer]
        if self.kind == "learned":
            # log decay = -softplus(rate) stays <= 0 whatever the optimizer does.
            rate = self.param("decay_rate", lambda key: jnp.log(jnp.expm1(-start)))
            return -jax.nn.softplus(rate)
        if self.kind == "gated":
            # The bias starts every head at its constant decay: sigmoid(b) = exp(start * 16).
            open_at = GATE_TEMPERATURE * start
            bias = self.param("decay_bias", lambda key: open_at - jnp.log(-jnp.expm1(open_at)))
            wide = jnp.promote_types(x.dtype, jnp.float32)
            logits = dense(self.n_heads, str(wide), "decay_gate")(x.astype(wide)) + bias
            return jax.nn.log_sigmoid(logits) / GATE_TEMPERATURE
        return start

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
