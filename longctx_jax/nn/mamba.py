"""Mamba, versions 1 and 2, as a sequence mixer.

Version 1, with d_inner = expand d_model channels of n numbers each:

    [u; g] = W_in x,   u <- silu(conv(u) + bias),   [dt; B; C] = W_x u
    delta = softplus(W_dt dt + bias),   y = W_out ( selective_scan(u, delta, A, B, C, D) * silu(g) )

Version 2 has heads of P channels that share one rate, and takes everything from one projection:

    [z; uBC; dt] = W_in x,   uBC <- silu(conv(uBC) + bias),   delta = softplus(dt + bias)
    y = W_out RMSNorm( ssd(u, delta, A, B, C, D) * silu(z) )

A = -exp(A_log) in both. The last conv_len - 1 inputs of the convolution are state.

Source: Gu & Dao (2023), arXiv 2312.00752; Dao & Gu (2024), arXiv 2405.21060.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Aux, Documents, no_aux, own_documents
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.ops.convolution import short_convolution
from longctx_jax.ops.ssm import selective_scan, ssd

VERSIONS = (1, 2)
SLOWEST, FASTEST = 1e-3, 1e-1  # initial steps, spread evenly in their logarithm
LARGEST_RATE = 16.0  # version 2: initial rates are uniform in [1, it]
NORM_EPS = 1e-5


@flax.struct.dataclass
class MambaCache:
    """The state of the recurrence, and what the convolution still needs."""

    state: jax.Array  # float32 [batch, channels, n], or [batch, heads, n, P]
    history: jax.Array  # inputs of the convolution [batch, conv_len - 1, width]
    history_documents: jax.Array  # their documents, int32 [batch, conv_len - 1]


def step_bias_start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns softplus^-1 of steps whose logarithms are uniform between SLOWEST and FASTEST."""
    low, high = math.log(SLOWEST), math.log(FASTEST)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


class Mamba(nn.Module):
    """Mamba-1 or Mamba-2.

    Attributes:
        version: 1 or 2.
        d_inner: channels, expand d_model.
        d_state: numbers a channel (version 1) or key width a head (version 2).
        head_len: channels a head (version 2).
        n_groups: of heads that share B and C (version 2).
        step_rank: of the projection to the steps (version 1).
        conv_len: tokens the convolution mixes, the current one included.
        chunk_len: tokens a chunk of the forms that have chunks.
    """

    version: int
    d_inner: int
    d_state: int
    head_len: int
    n_groups: int
    step_rank: int
    conv_len: int
    chunk_len: int
    implementation: str
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: MambaCache | None,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, MambaCache | None, Aux]:
        """Maps [batch, seq, d_model] to the same; `cache` None = empty and not wanted back."""
        del layer
        mixed = dense(self._conv_width, self.dtype, "input")(x)
        gate = jax.nn.silu(dense(self.d_inner, self.dtype, "gate")(x))
        mixed, history = self._convolve(mixed, cache, documents)
        options = {
            "reset": None if documents is None else documents.reset,
            "chunk_len": self.chunk_len,
            "implementation": self.implementation,
        }
        state = None if cache is None else cache.state
        if self.version == 1:
            y, state = self._version1(mixed, state, options)
            y = y * gate
        else:
            y, state = self._version2(x, mixed, state, {**options, "for_training": train})
            y = RMSNorm(self.dtype, eps=NORM_EPS, name="norm")(y * gate)
        y = dense(x.shape[-1], self.dtype, "out", self.output_scale)(y)
        return y, None if history is None else MambaCache(state, *history), no_aux()

    def _version1(self, u, state, options):
        wide = jnp.promote_types(u.dtype, jnp.float32)
        weights = dense(self.step_rank + 2 * self.d_state, self.dtype, "weights")(u)
        low, b, c = jnp.split(weights, [self.step_rank, self.step_rank + self.d_state], axis=-1)
        bound = self.step_rank**-0.5

        def up_start(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        shape = (self.step_rank, self.d_inner)
        up = self.param("step_up", up_start, shape, jnp.float32)
        bias = self.param("step_bias", step_bias_start, (self.d_inner,), jnp.float32)
        delta = jax.nn.softplus(low.astype(wide) @ up + bias)

        def rate_start(key):
            rates = jnp.arange(1, self.d_state + 1, dtype=jnp.float32)
            return jnp.log(jnp.broadcast_to(rates, (self.d_inner, self.d_state)))

        rate = -jnp.exp(self.param("log_rate", rate_start))
        skip = self.param("skip", nn.initializers.ones, (self.d_inner,), jnp.float32)
        return selective_scan(u, delta, rate, b, c, skip, state, **options)

    def _version2(self, x, mixed, state, options):
        heads, shared = self.d_inner // self.head_len, self.n_groups * self.d_state
        wide = jnp.promote_types(x.dtype, jnp.float32)
        u, b, c = jnp.split(mixed, [self.d_inner, self.d_inner + shared], axis=-1)
        bias = self.param("step_bias", step_bias_start, (heads,), jnp.float32)
        delta = jax.nn.softplus(dense(heads, str(wide), "step")(x.astype(wide)) + bias)

        def rate_start(key):
            return jnp.log(jax.random.uniform(key, (heads,), jnp.float32, 1.0, LARGEST_RATE))

        rate = -jnp.exp(self.param("log_rate", rate_start))
        skip = self.param("skip", nn.initializers.ones, (heads,), jnp.float32)
        tokens = x.shape[:2]
        b, c = (w.reshape(*tokens, self.n_groups, self.d_state) for w in (b, c))
        u = u.reshape(*tokens, heads, self.head_len)
        y, state = ssd(u, delta, rate, b, c, skip, state, **options)
        return y.reshape(*tokens, self.d_inner), state

    def _convolve(self, x, cache: MambaCache | None, documents: Documents | None):
        """Returns silu(conv(x) + bias), and the new history and its documents (None without)."""
        bound = self.conv_len**-0.5

        def start(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param("convolution", start, (self.conv_len, x.shape[-1]), jnp.float32)
        bias = self.param("convolution_bias", start, (x.shape[-1],), jnp.float32)
        if cache is None:
            y, _ = short_convolution(x, kernel, documents=own_documents(documents))
            kept = None
        else:
            assert documents is not None
            y, history = short_convolution(
                x,
                kernel,
                cache.history,
                documents=documents.index,
                history_documents=cache.history_documents,
            )
            indices = jnp.concatenate([cache.history_documents, documents.index], axis=1)
            kept = history, indices[:, x.shape[1] :]
        return jax.nn.silu(y + bias.astype(x.dtype)), kept

    @property
    def _conv_width(self) -> int:
        return self.d_inner + (2 * self.n_groups * self.d_state if self.version == 2 else 0)

    def init_cache(self, batch_size: int, max_len: int) -> MambaCache:
        """Returns an empty cache; max_len does not matter.

        Bytes a row: 4 d_inner d_state of state, conv_len - 1 inputs of the convolution in dtype,
        d_inner wide (version 1) or d_inner + 2 n_groups d_state (version 2), and their documents.
        """
        del max_len
        past = self.conv_len - 1
        shape = (self.d_inner, self.d_state)
        if self.version == 2:
            shape = (self.d_inner // self.head_len, self.d_state, self.head_len)
        return MambaCache(
            state=jnp.zeros((batch_size, *shape), jnp.promote_types(self.dtype, jnp.float32)),
            history=jnp.zeros((batch_size, past, self._conv_width), self.dtype),
            history_documents=jnp.zeros((batch_size, past), jnp.int32),
        )
