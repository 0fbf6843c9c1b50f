"""Rotary positions of a sub-config of `config.model`: base, and scaling for longer contexts."""

import dataclasses

from longctx_jax.nn.config_checks import (
    require_not_negative,
    require_one_of,
    require_positive,
)
from longctx_jax.ops.position import ROTARY_SCALINGS, RotaryScaling


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """The fields that all sub-configs with rotary positions of full contexts have."""

    rope_theta: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_len: int = 0
    rope_low_turns: float = 1.0
    rope_high_turns: float = 4.0
    rope_amplitude: float = 0.0

    @property
    def rotary_scaling(self) -> RotaryScaling:
        """How the rotary frequencies change for longer contexts."""
        return RotaryScaling(
            self.rope_scaling,
            self.rope_factor,
            self.rope_original_len,
            self.rope_low_turns,
            self.rope_high_turns,
            self.rope_amplitude,
        )

    def check_rotary(self, prefix: str) -> None:
        """Raises ValueError unless the fields make sense; `prefix` is that of their names."""
        require_positive(f"{prefix}rope_theta", self.rope_theta)
        require_one_of(f"{prefix}rope_scaling", self.rope_scaling, ROTARY_SCALINGS)
        for field in ("rope_factor", "rope_low_turns", "rope_high_turns"):
            require_positive(f"{prefix}{field}", getattr(self, field))
        require_not_negative(f"{prefix}rope_amplitude", self.rope_amplitude)
        if self.rope_scaling in ("llama3", "yarn"):
            require_positive(f"{prefix}rope_original_len", self.rope_original_len)
            if self.rope_low_turns >= self.rope_high_turns:
                raise ValueError(
                    f"config.model.{prefix}rope_low_turns must be below rope_high_turns: got "
                    f"{self.rope_low_turns} and {self.rope_high_turns}; llama3 has 1 and 4, yarn "
                    "1 and 32"
                )
