"""The sub-configs of `config.model`, one for each kind of mixer and one for the memory."""

import dataclasses

from longctx_jax.models.config_checks import (
    nearest_divisor,
    require_not_negative,
    require_one_of,
    require_positive,
    require_probability,
    require_types,
)
from longctx_jax.models.rotary_config import RotaryConfig
from longctx_jax.nn import attention, decay_attention, mamba, rwkv, vq_attention
from longctx_jax.ops.vq.codebook import SMOOTHINGS, STARTS
from longctx_jax.ops.vq.table import REDUCTIONS


@dataclasses.dataclass(frozen=True)
class _ExactAttentionConfig(RotaryConfig):
    """What full attention and attention in a window have in common."""

    position: str = "rotary"
    qk_norm: bool = False
    implementation: str = "auto"

    def _check(self, prefix: str) -> None:
        require_types(self, prefix)
        require_one_of(f"{prefix}position", self.position, attention.POSITIONS)
        self.check_rotary(prefix)


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(_ExactAttentionConfig):
    """`config.model.softmax`."""

    def __post_init__(self):
        self._check("softmax.")


@dataclasses.dataclass(frozen=True)
class SlidingConfig(_ExactAttentionConfig):
    """`config.model.sliding`."""

    window_len: int = 128

    def __post_init__(self):
        self._check("sliding.")
        require_positive("sliding.window_len", self.window_len)


@dataclasses.dataclass(frozen=True)
class DecayConfig:
    """`config.model.decay`."""

    kind: str = "retnet"
    depth: str = "constant"
    chunk_len: int = 64
    position: str = "rotary"
    rope_theta: float = 10_000.0
    feature_map: str = "none"
    gate: str = "silu"
    head_norm: str = "rms"
    conv_len: int = 0
    implementation: str = "auto"

    def __post_init__(self):
        require_types(self, "decay.")
        require_one_of("decay.kind", self.kind, decay_attention.DECAY_KINDS)
        require_one_of("decay.depth", self.depth, decay_attention.DEPTH_SCHEDULES)
        require_one_of("decay.feature_map", self.feature_map, tuple(decay_attention.FEATURE_MAPS))
        require_one_of("decay.gate", self.gate, tuple(decay_attention.GATES))
        require_one_of("decay.head_norm", self.head_norm, tuple(decay_attention.HEAD_NORMS))
        require_positive("decay.chunk_len", self.chunk_len)
        require_not_negative("decay.conv_len", self.conv_len)
        require_one_of("decay.position", self.position, decay_attention.POSITIONS)
        require_positive("decay.rope_theta", self.rope_theta)


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """`config.model.vq`."""

    codebook_size: int = 256
    window_len: int = 128
    block_len: int = 0
    reduction: str = "auto"
    gate: str = "none"
    position: str = "relative"
    position_dropout: float = 0.0
    position_theta: float = 100_000.0
    use_table: bool = True
    grad_through_cache: bool = True
    commitment: float = 1e-4
    codebook_decay: float = 0.99
    codebook_start: str = "sphere"
    smoothing: str = "clip"
    reseed_below: float = 0.0
    implementation: str = "auto"
    search: str = "auto"

    def __post_init__(self):
        require_types(self, "vq.")
        for field in ("codebook_size", "window_len", "position_theta"):
            require_positive(f"vq.{field}", getattr(self, field))
        for field in ("block_len", "commitment", "reseed_below"):
            require_not_negative(f"vq.{field}", getattr(self, field))
        require_one_of("vq.reduction", self.reduction, ("auto", *REDUCTIONS))
        require_one_of("vq.gate", self.gate, vq_attention.GATES)
        require_one_of("vq.position", self.position, vq_attention.POSITIONS)
        require_one_of("vq.codebook_start", self.codebook_start, STARTS)
        require_one_of("vq.smoothing", self.smoothing, SMOOTHINGS)
        require_one_of("vq.implementation", self.implementation, vq_attention.IMPLEMENTATIONS)
        require_one_of("vq.search", self.search, vq_attention.SEARCHES)
        require_probability("vq.position_dropout", self.position_dropout)
        if self.reseed_below > 0 and self.codebook_decay == 1.0:
            raise ValueError(
                f"config.model.vq.reseed_below needs a codebook that learns: got "
                f"{self.reseed_below} with codebook_decay=1; set one of them to 0 or below 1"
            )
        if not 0.0 <= self.codebook_decay <= 1.0:
            raise ValueError(
                f"config.model.vq.codebook_decay must be in [0, 1]: got {self.codebook_decay}; "
                "it is what running averages keep, 1 = a fixed codebook"
            )


RECURRENCES = ("armt", "rmt", "layerwise")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """`config.model.memory`."""

    kind: str = "armt"
    segment_len: int = 256
    n_memory_tokens: int = 16
    mixer: str = "softmax"
    bptt_segments: int = 0
    d_memory: int = 64
    nu: int = 3
    n_heads: int = 1
    correction: bool = True
    use_denominator: bool = True
    normalize: bool = False
    eps: float = 1e-5

    def __post_init__(self):
        require_types(self, "memory.")
        require_positive("memory.eps", self.eps)
        require_one_of("memory.kind", self.kind, RECURRENCES)
        require_one_of("memory.mixer", self.mixer, tuple(MIXER_CONFIGS))
        for field in ("segment_len", "n_memory_tokens", "d_memory", "nu", "n_heads"):
            require_positive(f"memory.{field}", getattr(self, field))
        require_not_negative("memory.bptt_segments", self.bptt_segments)
        if self.d_memory % self.n_heads:
            raise ValueError(
                f"config.model.memory.n_heads must divide memory.d_memory: got {self.n_heads} and "
                f"{self.d_memory}; use {nearest_divisor(self.d_memory, self.n_heads)} heads"
            )


@dataclasses.dataclass(frozen=True)
class RWKVConfig:
    """`config.model.rwkv`."""

    version: int = 6
    head_len: int = 0
    shift_rank: int = 32
    decay_rank: int = 64
    chunk_len: int = 32
    implementation: str = "auto"

    def __post_init__(self):
        require_types(self, "rwkv.")
        require_one_of("rwkv.version", self.version, rwkv.VERSIONS)
        require_not_negative("rwkv.head_len", self.head_len)
        for field in ("shift_rank", "decay_rank", "chunk_len"):
            require_positive(f"rwkv.{field}", getattr(self, field))


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """`config.model.mamba`."""

    version: int = 2
    d_state: int = 0
    expand: int = 2
    conv_len: int = 4
    head_len: int = 64
    n_groups: int = 1
    step_rank: int = 0
    chunk_len: int = 64
    implementation: str = "auto"

    def __post_init__(self):
        require_types(self, "mamba.")
        require_one_of("mamba.version", self.version, mamba.VERSIONS)
        for field in ("expand", "conv_len", "head_len", "n_groups", "chunk_len"):
            require_positive(f"mamba.{field}", getattr(self, field))
        for field in ("d_state", "step_rank"):
            require_not_negative(f"mamba.{field}", getattr(self, field))


MIXER_CONFIGS = {
    "softmax": SoftmaxConfig,
    "sliding": SlidingConfig,
    "decay": DecayConfig,
    "vq": VQConfig,
    "rwkv": RWKVConfig,
    "mamba": MambaConfig,
}
