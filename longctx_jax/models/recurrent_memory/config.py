"""`config.model.memory`: a memory between segments, frozen and checked."""

import dataclasses

from longctx_jax.nn.config_checks import (
    nearest_divisor,
    require_not_negative,
    require_one_of,
    require_positive,
    require_types,
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
        for field in ("segment_len", "n_memory_tokens", "d_memory", "nu", "n_heads"):
            require_positive(f"memory.{field}", getattr(self, field))
        require_not_negative("memory.bptt_segments", self.bptt_segments)
        if self.d_memory % self.n_heads:
            raise ValueError(
                f"config.model.memory.n_heads must divide memory.d_memory: got {self.n_heads} and "
                f"{self.d_memory}; use {nearest_divisor(self.d_memory, self.n_heads)} heads"
            )
