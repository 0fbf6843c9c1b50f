"""RWKV, versions 4 and 6: the time mix as a sequence mixer, the channel mix as a second half.

Version 4, with h the normed input and h- that of the token before (zeros at a document's start):

    k, v, r = W_k m_k, W_v m_v, sigmoid(W_r m_r)        m_i = h + (h- - h) mu_i
    y = W_o ( r * wkv4(k, v, w = -exp(time_decay), u) )

Version 6 makes the shift and the decay functions of the token, of low rank, and keeps a matrix:

    dx = h- - h,  xi_i = tanh( (h + dx mu_x) A )_i,  m_i = h + dx (mu_i + xi_i B_i),  i: w k v r g
    log_decay = -exp( w0 + tanh(m_w C) D ),    k, v, r, g = W_k m_k, W_v m_v, W_r m_r, W_g m_g
    y = W_o ( GroupNorm_heads(wkv6(r, k, v, log_decay, u)) * silu(g) )

Channel mix of both: sigmoid(W_r m_r) * W_v relu(W_k m_k)^2. Here mu is the share of the token
before, where version 4 is written with that of the current one. Left out: the layer norm between
embedding and first block, and version 5 and 7.

Source: Peng et al. (2023), arXiv 2305.13048; Peng et al. (2024), arXiv 2404.05892.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Aux, Documents, no_aux
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


def _share(d_model: int, power: jax.Array) -> jax.Array:
    """Returns 1 - (channel / d_model)^power: how much of the token before each channel takes."""
    return 1.0 - (jnp.arange(d_model) / d_model) ** power


def _zigzag(width: int) -> jax.Array:
    """Returns -1, 0, 1 repeated, so that neighbouring channels differ."""
    return (jnp.arange(width) + 1) % 3 - 1.0


def _decay_start(width: int, depth: jax.Array, low: float, span: float) -> jax.Array:
    """Returns log(-log decay) of each channel: from low (slow) to low + span (fast)."""
    place = jnp.arange(width) / max(width - 1, 1)
    return low + span * place ** (0.7 + 1.3 * depth)


class RWKVTimeMix(nn.Module):
    """The time mix. Initial decays and shifts spread over channels and change with depth.

    Attributes:
        version: 4 or 6.
        n_heads: of version 6; version 4 has one memory a channel.
        n_layers: of the stack, for the initial values.
        shift_rank: of the token-dependent shift (version 6).
        decay_rank: of the token-dependent decay (version 6).
        chunk_len: tokens a chunk of the chunked form.
        d_model: width of the input, for the cache.
    """

    version: int
    n_heads: int
    d_key: int
    d_value: int
    n_layers: int
    shift_rank: int
    decay_rank: int
    chunk_len: int
    d_model: int
    implementation: str
    dtype: str
    output_scale: float

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
        reset = None if documents is None else documents.reset
        layer = jnp.asarray(0 if layer is None else layer)
        depth = layer / max(self.n_layers - 1, 1)  # 0 .. 1
        height = 1.0 - layer / self.n_layers  # 1 .. almost 0
        previous, last = shift_tokens(x, None if cache is None else cache.last, reset=reset)
        options = {
            "reset": reset,
            "implementation": self.implementation,
            "chunk_len": self.chunk_len,
        }
        state = None if cache is None else cache.state
        mix = self._version4 if self.version == 4 else self._version6
        out, state = mix(x, previous - x, state, depth, height, options)
        out = dense(x.shape[-1], self.dtype, "out", self.output_scale)(out)
        return out, None if cache is None else RWKVCache(last, state), no_aux()

    def _version4(self, x, change, state, depth, height, options):
        width = x.shape[-1]
        shares = {
            "key": _share(width, height),
            "value": _share(width, height) - 0.3 * depth,
            "receptance": _share(width, 0.5 * height),
        }
        key, value, receptance = (
            dense(width, self.dtype, name)(_blend(self, x, change, name, share))
            for name, share in shares.items()
        )
        rate = _learned(self, "decay", _decay_start(width, depth, -5.0, 8.0))
        bonus = _learned(self, "bonus", jnp.log(0.3) + 0.5 * _zigzag(width))
        out, state = wkv4(key, value, -jnp.exp(rate), bonus, state, **options)
        return jax.nn.sigmoid(receptance) * out, state

    def _version6(self, x, change, state, depth, height, options):
        batch, seq, width = x.shape
        heads = (self.n_heads, self.d_key)
        mixed = self._shifted(x, change, depth, height)

        def project(name, d_head):
            y = dense(self.n_heads * d_head, self.dtype, name)(mixed[name])
            return y.reshape(batch, seq, self.n_heads, d_head)

        place = jnp.arange(self.n_heads * self.d_key) / max(self.n_heads * self.d_key - 1, 1)
        bonus = depth * (1.0 - place) + 0.1 * _zigzag(place.size)
        out, state = wkv6(
            project("receptance", self.d_key),
            project("key", self.d_key),
            project("value", self.d_value),
            self._log_decay(mixed["decay"], depth).reshape(batch, seq, *heads),
            _learned(self, "bonus", bonus.reshape(heads)),
            state,
            **options,
        )
        out = GroupNorm(name="head_norm", dtype=self.dtype)(out).reshape(batch, seq, -1)
        return out * jax.nn.silu(dense(out.shape[-1], self.dtype, "gate")(mixed["gate"])), state

    def _shifted(self, x, change, depth, height) -> dict[str, jax.Array]:
        """Returns what each stream is projected from."""
        width, rank, n = x.shape[-1], self.shift_rank, len(STREAMS)
        base = _blend(self, x, change, "all", _share(width, height))
        down = self.param("shift_down", nn.initializers.zeros, (width, n * rank), jnp.float32)
        up = self.param("shift_up", _small, (n, rank, width), jnp.float32)
        low = jnp.tanh(base.astype(self.dtype) @ down.astype(self.dtype))
        low = low.reshape(*x.shape[:2], n, rank)
        extra = jnp.einsum("btnr,nrd->nbtd", low, up.astype(self.dtype))
        shares = {
            "decay": _share(width, height),
            "key": _share(width, height),
            "value": _share(width, height) - 0.3 * depth,
            "receptance": _share(width, 0.5 * height),
            "gate": _share(width, 0.5 * height),
        }
        return {
            name: _blend(self, x, change, name, shares[name], extra[i])
            for i, name in enumerate(STREAMS)
        }

    def _log_decay(self, mixed: jax.Array, depth: jax.Array) -> jax.Array:
        """Returns the log decays [batch, seq, heads * key], computed in float32 throughout."""
        width = self.n_heads * self.d_key
        start = _learned(self, "decay", _decay_start(width, depth, -6.0, 5.0))
        shape = (mixed.shape[-1], self.decay_rank)
        down = self.param("decay_down", nn.initializers.zeros, shape, jnp.float32)
        up = self.param("decay_up", _small, (self.decay_rank, width), jnp.float32)
        wide = mixed.astype(jnp.promote_types(mixed.dtype, jnp.float32))
        return -jnp.exp(start + jnp.tanh(wide @ down) @ up)

    def init_cache(self, batch_size: int, max_len: int) -> RWKVCache:
        """Returns an empty cache; max_len does not matter.

        Bytes a row: d_model of the token shift in dtype, and 12 d_model (version 4) or
        4 n_heads d_key d_value (version 6) of state.
        """
        del max_len
        wide = jnp.promote_types(self.dtype, jnp.float32)
        if self.version == 4:
            state = init_wkv4_state(batch_size, self.d_model, wide)
        else:
            state = jnp.zeros((batch_size, self.n_heads, self.d_key, self.d_value), wide)
        return RWKVCache(jnp.zeros((batch_size, self.d_model), self.dtype), state)


class RWKVChannelMix(nn.Module):
    """sigmoid(W_r m_r) * W_v relu(W_k m_k)^2: an MLP of two tokens, the current and the last.

    Attributes:
        n_layers: of the stack, for the initial shifts.
    """

    d_ff: int
    n_layers: int
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: jax.Array | None,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps (x [batch, seq, d_model], the last token before it) to (y, the last token of x)."""
        reset = None if documents is None else documents.reset
        height = 1.0 - jnp.asarray(0 if layer is None else layer) / self.n_layers
        previous, last = shift_tokens(x, cache, reset=reset)
        share = _share(x.shape[-1], height)
        mixed = {n: _blend(self, x, previous - x, n, share) for n in ("key", "receptance")}
        hidden = jax.nn.relu(dense(self.d_ff, self.dtype, "key")(mixed["key"])) ** 2
        value = dense(x.shape[-1], self.dtype, "value", self.output_scale)(hidden)
        gate = jax.nn.sigmoid(dense(x.shape[-1], self.dtype, "receptance")(mixed["receptance"]))
        return gate * value, None if cache is None else last


class GroupNorm(nn.Module):
    """(y - mean) / sqrt(variance + eps) of each head, times a scale and plus a bias a channel."""

    dtype: str
    eps: float = NORM_EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [..., heads, width] in float32; the result has the dtype of the module."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        y = y * self.param("scale", nn.initializers.ones, x.shape[-2:], jnp.float32)
        y = y + self.param("bias", nn.initializers.zeros, x.shape[-2:], jnp.float32)
        return y.astype(self.dtype)


def _learned(module: nn.Module, name: str, start: jax.Array) -> jax.Array:
    """Returns a float32 parameter of the module that starts at the given values."""
    return module.param(name, lambda key: start.astype(jnp.float32))


def _blend(module: nn.Module, x, change, name: str, start: jax.Array, extra: Any = 0.0):
    """Returns x + change * (a learned share a channel + extra); float32 or wider."""
    return x + change * (_learned(module, f"shift_{name}", start) + extra)


def _small(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)
