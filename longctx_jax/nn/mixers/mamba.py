"""Mamba, versions 1 and 2, as a sequence mixer.

Version 1, with d_inner = expand d_model channels of n numbers each:

    [u; g] = W_in x,   u <- silu(conv(u) + bias),   [dt; B; C] = W_x u
    delta = softplus(W_dt dt + bias),   y = W_out ( selective_scan(u, delta, A, B, C, D) * silu(g) )

Version 2 has heads of P channels that share one rate, and takes everything from one projection:

    [z; uBC; dt] = W_in x,   uBC <- silu(conv(uBC) + bias),   delta = softplus(dt + bias)
    y = W_out RMSNorm_g( ssd(u, delta, A, B, C, D) * silu(z) )

where RMSNorm_g normalises the channels of each of the n_groups by themselves, and the published
options are that the gate comes after the norm, and bounds within which delta is kept.

A = -exp(A_log) in both. The last conv_len - 1 inputs of the convolution are state.

Source: Gu & Dao (2023), arXiv 2312.00752; Dao & Gu (2024), arXiv 2405.21060.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn import costs
from longctx_jax.nn.config_checks import (
    nearest_divisor,
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


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """`config.model.mamba`.

    Attributes:
        version: 1 or 2.
        d_state: numbers a channel (1) or key width a head (2); 0 = 16 (1) or 64 (2).
        expand: channels / d_model.
        conv_len: tokens the convolution mixes, the current one included.
        head_len: channels a head (2).
        n_groups: of heads that share B and C (2).
        norm_before_gate: RMSNorm(ssd(..)) * silu(z), instead of the gate inside the norm (2).
        min_step: delta is at least it (2).
        max_step: delta is at most it (2); 0 = no bound.
        step_rank: of the projection to the steps (1); 0 = d_model / 16, rounded up.
    """

    version: int = 2
    d_state: int = 0
    expand: int = 2
    conv_len: int = 4
    head_len: int = 64
    n_groups: int = 1
    norm_before_gate: bool = False
    min_step: float = 0.0
    max_step: float = 0.0
    step_rank: int = 0
    chunk_len: int = 64
    implementation: str = "auto"

    def __post_init__(self):
        require_types(self, "mamba.")
        require_one_of("mamba.version", self.version, VERSIONS)
        for field in ("expand", "conv_len", "head_len", "n_groups", "chunk_len"):
            require_positive(f"mamba.{field}", getattr(self, field))
        for field in ("d_state", "step_rank", "min_step", "max_step"):
            require_not_negative(f"mamba.{field}", getattr(self, field))
        if self.max_step and self.min_step >= self.max_step:
            raise ValueError(
                "config.model.mamba.min_step must be below max_step: got "
                f"{self.min_step} and {self.max_step}; 0 and 0 are no bounds"
            )
        if self.version == 1 and (self.norm_before_gate or self.min_step or self.max_step):
            raise ValueError(
                "config.model.mamba.norm_before_gate, min_step and max_step are of version 2: got "
                f"{self.norm_before_gate}, {self.min_step} and {self.max_step} with version=1; "
                "leave them at False, 0 and 0"
            )


class Mamba(nn.Module):
    """Mamba-1 or Mamba-2; `config` has no zeros left to fill in."""

    sizes: Sizes
    config: MambaConfig

    @property
    def d_inner(self) -> int:
        """Channels."""
        return self.config.expand * self.sizes.d_model

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
        sizes, config = self.sizes, self.config
        mixed = dense(self._conv_width, sizes.dtype, "input")(x)
        gate = jax.nn.silu(dense(self.d_inner, sizes.dtype, "gate")(x))
        mixed, history = self._convolve(mixed, cache, documents)
        options = {
            "reset": None if documents is None else documents.reset,
            "chunk_len": config.chunk_len,
            "implementation": config.implementation,
        }
        state = None if cache is None else cache.state
        if config.version == 1:
            y, state = self._version1(mixed, state, options)
            y = y * gate
        else:
            y, state = self._version2(x, mixed, state, {**options, "for_training": train})
            norm = RMSNorm(sizes.dtype, eps=NORM_EPS, n_groups=config.n_groups, name="norm")
            y = norm(y) * gate if config.norm_before_gate else norm(y * gate)
        y = dense(x.shape[-1], sizes.dtype, "out", sizes.output_scale)(y)
        return y, None if history is None else MambaCache(state, *history), no_aux()

    def _version1(self, u, state, options):
        config = self.config
        wide = jnp.promote_types(u.dtype, jnp.float32)
        weights = dense(config.step_rank + 2 * config.d_state, self.sizes.dtype, "weights")(u)
        low, b, c = jnp.split(
            weights, [config.step_rank, config.step_rank + config.d_state], axis=-1
        )
        bound = config.step_rank**-0.5

        def up_start(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        shape = (config.step_rank, self.d_inner)
        up = self.param("step_up", up_start, shape, jnp.float32)
        bias = self.param("step_bias", step_bias_start, (self.d_inner,), jnp.float32)
        delta = jax.nn.softplus(low.astype(wide) @ up + bias[None, None])

        def rate_start(key):
            rates = jnp.arange(1, config.d_state + 1, dtype=jnp.float32)
            return jnp.log(jnp.broadcast_to(rates, (self.d_inner, config.d_state)))

        rate = -jnp.exp(self.param("log_rate", rate_start))
        skip = self.param("skip", nn.initializers.ones, (self.d_inner,), jnp.float32)
        return selective_scan(u, delta, rate, b, c, skip, state, **options)

    def _version2(self, x, mixed, state, options):
        config = self.config
        heads, shared = (
            self.d_inner // config.head_len,
            config.n_groups * config.d_state,
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        u, b, c = jnp.split(mixed, [self.d_inner, self.d_inner + shared], axis=-1)
        bias = self.param("step_bias", step_bias_start, (heads,), jnp.float32)
        delta = jax.nn.softplus(dense(heads, str(wide), "step")(x.astype(wide)) + bias[None, None])
        if config.min_step or config.max_step:
            delta = jnp.clip(delta, config.min_step, config.max_step or None)

        def rate_start(key):
            return jnp.log(jax.random.uniform(key, (heads,), jnp.float32, 1.0, LARGEST_RATE))

        rate = -jnp.exp(self.param("log_rate", rate_start))
        skip = self.param("skip", nn.initializers.ones, (heads,), jnp.float32)
        tokens = x.shape[:2]
        b, c = (w.reshape(*tokens, config.n_groups, config.d_state) for w in (b, c))
        u = u.reshape(*tokens, heads, config.head_len)
        y, state = ssd(u, delta, rate, b, c, skip, state, **options)
        return y.reshape(*tokens, self.d_inner), state

    def _convolve(self, x, cache: MambaCache | None, documents: Documents | None):
        """Returns silu(conv(x) + bias), and the new history and its documents (None without)."""
        config = self.config
        bound = config.conv_len**-0.5

        def start(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param("convolution", start, (config.conv_len, x.shape[-1]), jnp.float32)
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
        return jax.nn.silu(y + bias.astype(x.dtype)[None, None]), kept

    @property
    def _conv_width(self) -> int:
        config = self.config
        return self.d_inner + (2 * config.n_groups * config.d_state if config.version == 2 else 0)

    def init_cache(self, batch_size: int, max_len: int) -> MambaCache:
        """Returns an empty cache; max_len does not matter.

        Bytes a row: 4 d_inner d_state of state, conv_len - 1 inputs of the convolution in dtype,
        d_inner wide (version 1) or d_inner + 2 n_groups d_state (version 2), and their documents.
        """
        del max_len
        sizes, config = self.sizes, self.config
        past = config.conv_len - 1
        shape = (self.d_inner, config.d_state)
        if config.version == 2:
            shape = (
                self.d_inner // config.head_len,
                config.d_state,
                config.head_len,
            )
        return MambaCache(
            state=jnp.zeros((batch_size, *shape), jnp.promote_types(sizes.dtype, jnp.float32)),
            history=jnp.zeros((batch_size, past, self._conv_width), sizes.dtype),
            history_documents=jnp.zeros((batch_size, past), jnp.int32),
        )


def _filled(sizes: Sizes, config: MambaConfig) -> MambaConfig:
    """Returns the fields with their zeros filled in."""
    return dataclasses.replace(
        config,
        d_state=config.d_state or (16 if config.version == 1 else 64),
        step_rank=config.step_rank or -(-sizes.d_model // 16),
    )


def _build(sizes: Sizes, config: MambaConfig) -> Mamba:
    width, head_len = config.expand * sizes.d_model, config.head_len
    if config.version == 2 and width % head_len:
        raise ValueError(
            "config.model.mamba.head_len must divide expand * d_model: got "
            f"head_len={head_len}, {config.expand} * {sizes.d_model}; use "
            f"{nearest_divisor(width, head_len)}"
        )
    if config.version == 2 and width // head_len % config.n_groups:
        raise ValueError(
            "config.model.mamba.n_groups must divide the heads, expand * d_model / "
            f"head_len: got n_groups={config.n_groups}, {width // head_len} heads; use "
            f"{nearest_divisor(width // head_len, config.n_groups)}"
        )
    return Mamba(sizes, _filled(sizes, config))


def _costs(sizes: Sizes, config: MambaConfig, call: Call) -> Costs:
    """Projections, and what reads (and writes) the state.

    With I = expand d channels and n numbers of state, version 1: 6 d I + 2 I (2 r + 2 n) + 2 I n.
    Version 2, with heads of P channels, G groups and c = min(chunk, seq_len):

        2 d (3 I + 2 G n + I/P) + 2 (I/P) (c (n + P) + 2 n P)

    Rows: the input before and after the convolution, the gate; version 2 scans chunks of heads too.
    """
    config = _filled(sizes, config)
    d, inner, n, width = (
        sizes.d_model,
        config.expand * sizes.d_model,
        config.d_state,
        config.head_len,
    )
    if config.version == 1:
        flops = 6 * d * inner + 4 * inner * (config.step_rank + n) + 2 * inner * n
        return Costs(flops, rows=3 * inner)
    heads = inner // width
    flops = 2 * d * (3 * inner + 2 * config.n_groups * n + heads)
    flops += costs.chunked_flops(heads, call.seq_len, config.chunk_len, n, width)
    scores = heads * costs.chunked_scores(call.seq_len, config.chunk_len, n * width)
    return Costs(flops, rows=5 * inner, scores=scores)


MIXER = Mixer(
    config=MambaConfig,
    build=_build,
    costs=_costs,
    rules=((r"(input|weights|step)/kernel$", ("data", None)),),  # parts of unlike kinds, joined
    examples={
        "version1": {
            "mlp": "none",
            "mamba": {"version": 1, "d_state": 3, "step_rank": 2, "chunk_len": 4},
        },
        "version2": {
            "mamba": {"d_state": 3, "head_len": 8, "n_groups": 2, "conv_len": 3, "chunk_len": 4}
        },
    },
)
