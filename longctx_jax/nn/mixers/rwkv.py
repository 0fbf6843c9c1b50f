"""RWKV, versions 4 and 6: the time mix as a sequence mixer, the channel mix as a second half.

Version 4, with h the normed input and h- that of the token before (zeros at a document's start):

    k, v, r = W_k m_k, W_v m_v, sigmoid(W_r m_r)        m_i = h + (h- - h) mu_i
    y = W_o ( r * wkv4(k, v, w = -exp(time_decay), u) )

Version 6 makes the shift and the decay functions of the token, of low rank, and keeps a matrix:

    dx = h- - h,  xi_i = tanh( (h + dx mu_x) A )_i,  m_i = h + dx (mu_i + xi_i B_i),  i: w k v r g
    log_decay = -exp( w0 + tanh(m_w C) D ),    k, v, r, g = W_k m_k, W_v m_v, W_r m_r, W_g m_g
    y = W_o ( GroupNorm_heads(wkv6(r, k, v, log_decay, u)) * silu(g) )

Here mu is the share of the token before, where version 4 is written with that of the current one.
The channel mix of both is `channel_mix.py`. Left out: the layer norm between embedding and first
block, and version 5 and 7.

Source: Peng et al. (2023), arXiv 2305.13048; Peng et al. (2024), arXiv 2404.05892.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn import costs
from longctx_jax.nn.channel_mix import blend, learned, share
from longctx_jax.nn.config_checks import (
    nearest_divisor,
    require_not_negative,
    require_one_of,
    require_positive,
    require_types,
)
from longctx_jax.nn.contract import Aux, Call, Costs, Documents, Mixer, Sizes, no_aux
from longctx_jax.nn.mlp import dense
from longctx_jax.ops.rwkv import init_wkv4_state, shift_tokens, wkv4, wkv6

VERSIONS = (4, 6)
STREAMS = ("decay", "key", "value", "receptance", "gate")  # of version 6, each shifted by itself
NORM_EPS = 64e-5  # 1e-5 times the square of the published head size divisor, 8


@flax.struct.dataclass
class RWKVCache:
    """The last token's normed input [batch, model], and the state of the recurrence."""

    last: jax.Array
    state: Any  # WKV4State, or float32 [batch, heads, key, value]


def _zigzag(width: int) -> jax.Array:
    """Returns -1, 0, 1 repeated, so that neighbouring channels differ."""
    return (jnp.arange(width, dtype=jnp.float32) + 1) % 3 - 1.0


def _decay_start(width: int, depth: jax.Array, low: float, span: float) -> jax.Array:
    """Returns log(-log decay) of each channel: from low (slow) to low + span (fast)."""
    place = jnp.arange(width) / max(width - 1, 1)
    return low + span * place ** (0.7 + 1.3 * depth)


@dataclasses.dataclass(frozen=True)
class RWKVConfig:
    """`config.model.rwkv`.

    Attributes:
        version: 4 or 6; version 4 has one memory a channel, and no heads.
        head_len: key and value width a head; 0 = the model's heads.
        shift_rank: of the token-dependent shift (version 6).
        decay_rank: of the token-dependent decay (version 6).
    """

    version: int = 6
    head_len: int = 0
    shift_rank: int = 32
    decay_rank: int = 64
    chunk_len: int = 32
    implementation: str = "auto"

    def __post_init__(self):
        require_types(self, "rwkv.")
        require_one_of("rwkv.version", self.version, VERSIONS)
        require_not_negative("rwkv.head_len", self.head_len)
        for field in ("shift_rank", "decay_rank", "chunk_len"):
            require_positive(f"rwkv.{field}", getattr(self, field))


class RWKVTimeMix(nn.Module):
    """The time mix. Initial decays and shifts spread over channels and change with depth."""

    sizes: Sizes
    config: RWKVConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: RWKVCache | None,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, RWKVCache | None, Aux]:
        """Maps [batch, seq, d_model] to the same; `cache` None = empty and not wanted back.

        `layer` is the block's place in the stack, int32; None = 0.
        """
        del train
        sizes, config = self.sizes, self.config
        reset = None if documents is None else documents.reset
        layer = jnp.asarray(0 if layer is None else layer)
        depth = layer / max(sizes.n_layers - 1, 1)  # 0 .. 1
        height = 1.0 - layer / sizes.n_layers  # 1 .. almost 0
        previous, last = shift_tokens(x, None if cache is None else cache.last, reset=reset)
        options = {
            "reset": reset,
            "implementation": config.implementation,
            "chunk_len": config.chunk_len,
        }
        state = None if cache is None else cache.state
        mix = self._version4 if config.version == 4 else self._version6
        out, state = mix(x, previous - x, state, depth, height, options)
        out = dense(x.shape[-1], sizes.dtype, "out", sizes.output_scale)(out)
        return out, None if cache is None else RWKVCache(last, state), no_aux()

    def _version4(self, x, change, state, depth, height, options):
        width = x.shape[-1]
        shares = {
            "key": share(width, height),
            "value": share(width, height) - 0.3 * depth,
            "receptance": share(width, 0.5 * height),
        }
        key, value, receptance = (
            dense(width, self.sizes.dtype, name)(blend(self, x, change, name, start))
            for name, start in shares.items()
        )
        rate = learned(self, "decay", _decay_start(width, depth, -5.0, 8.0))
        bonus = learned(self, "bonus", jnp.log(0.3) + 0.5 * _zigzag(width))
        out, state = wkv4(key, value, -jnp.exp(rate), bonus, state, **options)
        return jax.nn.sigmoid(receptance) * out, state

    def _version6(self, x, change, state, depth, height, options):
        sizes = self.sizes
        batch, seq, width = x.shape
        heads = (sizes.n_heads, sizes.d_key)
        mixed = self._shifted(x, change, depth, height)

        def project(name, d_head):
            y = dense(sizes.n_heads * d_head, sizes.dtype, name)(mixed[name])
            return y.reshape(batch, seq, sizes.n_heads, d_head)

        place = jnp.arange(sizes.n_heads * sizes.d_key) / max(sizes.n_heads * sizes.d_key - 1, 1)
        bonus = depth * (1.0 - place) + 0.1 * _zigzag(place.size)
        out, state = wkv6(
            project("receptance", sizes.d_key),
            project("key", sizes.d_key),
            project("value", sizes.d_value),
            self._log_decay(mixed["decay"], depth).reshape(batch, seq, *heads),
            learned(self, "bonus", bonus.reshape(heads)),
            state,
            **options,
        )
        out = GroupNorm(name="head_norm", dtype=sizes.dtype)(out).reshape(batch, seq, -1)
        return out * jax.nn.silu(dense(out.shape[-1], sizes.dtype, "gate")(mixed["gate"])), state

    def _shifted(self, x, change, depth, height) -> dict[str, jax.Array]:
        """Returns what each stream is projected from."""
        sizes = self.sizes
        width, rank, n = x.shape[-1], self.config.shift_rank, len(STREAMS)
        base = blend(self, x, change, "all", share(width, height))
        down = self.param("shift_down", nn.initializers.zeros, (width, n * rank), jnp.float32)
        up = self.param("shift_up", _small, (n, rank, width), jnp.float32)
        low = jnp.tanh(base.astype(sizes.dtype) @ down.astype(sizes.dtype))
        low = low.reshape(*x.shape[:2], n, rank)
        extra = jnp.einsum("btnr,nrd->nbtd", low, up.astype(sizes.dtype))
        shares = {
            "decay": share(width, height),
            "key": share(width, height),
            "value": share(width, height) - 0.3 * depth,
            "receptance": share(width, 0.5 * height),
            "gate": share(width, 0.5 * height),
        }
        return {
            name: blend(self, x, change, name, shares[name], extra[i])
            for i, name in enumerate(STREAMS)
        }

    def _log_decay(self, mixed: jax.Array, depth: jax.Array) -> jax.Array:
        """Returns the log decays [batch, seq, heads * key], computed in float32 throughout."""
        sizes, config = self.sizes, self.config
        width = sizes.n_heads * sizes.d_key
        start = learned(self, "decay", _decay_start(width, depth, -6.0, 5.0))
        shape = (mixed.shape[-1], config.decay_rank)
        down = self.param("decay_down", nn.initializers.zeros, shape, jnp.float32)
        up = self.param("decay_up", _small, (config.decay_rank, width), jnp.float32)
        wide = mixed.astype(jnp.promote_types(mixed.dtype, jnp.float32))
        return -jnp.exp(start[None, None] + jnp.tanh(wide @ down) @ up)

    def init_cache(self, batch_size: int, max_len: int) -> RWKVCache:
        """Returns an empty cache; max_len does not matter.

        Bytes a row: d_model of the token shift in dtype, and 12 d_model (version 4) or
        4 n_heads d_key d_value (version 6) of state.
        """
        del max_len
        sizes = self.sizes
        wide = jnp.promote_types(sizes.dtype, jnp.float32)
        if self.config.version == 4:
            state = init_wkv4_state(batch_size, sizes.d_model, wide)
        else:
            state = jnp.zeros((batch_size, sizes.n_heads, sizes.d_key, sizes.d_value), wide)
        return RWKVCache(jnp.zeros((batch_size, sizes.d_model), sizes.dtype), state)


class GroupNorm(nn.Module):
    """(y - mean) / sqrt(variance + eps) of each head, times a scale and plus a bias a channel."""

    dtype: str
    eps: float = NORM_EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [batch, seq, heads, width] in float32; the result has the module's dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        y = y * self.param("scale", nn.initializers.ones, x.shape[-2:], jnp.float32)[None, None]
        y = y + self.param("bias", nn.initializers.zeros, x.shape[-2:], jnp.float32)[None, None]
        return y.astype(self.dtype)


def _small(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)


def _build(sizes: Sizes, config: RWKVConfig) -> RWKVTimeMix:
    """Version 6 has heads of its own where head_len is given."""
    head_len = config.head_len
    if not head_len:
        return RWKVTimeMix(sizes, config)
    if config.version == 6 and sizes.d_model % head_len:
        raise ValueError(
            f"config.model.rwkv.head_len must divide d_model: got head_len={head_len}, "
            f"d_model={sizes.d_model}; use {nearest_divisor(sizes.d_model, head_len)}, or 0 for "
            "config.model.n_heads heads"
        )
    own = {"n_heads": sizes.d_model // head_len, "d_key": head_len, "d_value": head_len}
    return RWKVTimeMix(dataclasses.replace(sizes, **own), config)


def _costs(sizes: Sizes, config: RWKVConfig, call: Call) -> Costs:
    """Projections, and for version 6 its low ranks and op; version 4's average has no products.

    Version 4: 8 d^2. Version 6, with c = min(chunk, seq_len):

        2 d (2 H K + 2 H V) + 2 H V d + 20 d r_shift + 2 r_decay (d + H K) + 2 H (c (K + V) + 2 K V)

    Rows: three shifted inputs, their products, the average (4); five, and the decay (6).
    """
    d = sizes.d_model
    if config.version == 4:
        return Costs(flops=8 * d * d, rows=7 * d)
    own = _build(sizes, config).sizes
    keys, values = own.n_heads * own.d_key, own.n_heads * own.d_value
    low_ranks = 20 * d * config.shift_rank + 2 * config.decay_rank * (d + keys)
    sizes_of_op = (call.seq_len, config.chunk_len, own.d_key, own.d_value)
    op = costs.chunked_flops(own.n_heads, *sizes_of_op)
    return Costs(flops=2 * d * (2 * keys + 3 * values) + low_ranks + op, rows=13 * d)


MIXER = Mixer(
    config=RWKVConfig,
    build=_build,
    costs=_costs,
    examples={
        "version4": {"mlp": "rwkv", "norm": "layer", "rwkv": {"version": 4, "chunk_len": 4}},
        "version6": {
            "mlp": "rwkv",
            "d_value": 6,
            "rwkv": {"chunk_len": 4, "shift_rank": 2, "decay_rank": 3},
        },
    },
)
