"""`config.model.inattention`: attention to initial embeddings, frozen and checked."""

import dataclasses

from longctx_jax.nn.config_checks import (
    require_not_negative,
    require_one_of,
    require_positive,
    require_types,
)
from longctx_jax.nn.inattention.attention import SCORE_POSITIONS
from longctx_jax.nn.rotary_config import RotaryConfig

MEMORY_POSITIONS = ("sinusoid", "none")
CACHES = ("auto", "kv", "embedding", "ids", "counts")
FORMS = ("auto", "dense", "blockwise", "cudnn", "vq")  # of attention among a call's tokens
COUNTABLE = ("none", "near", "alibi")  # score positions under which old tokens can be counted


@dataclasses.dataclass(frozen=True)
class InAttentionConfig(RotaryConfig):
    """`config.model.inattention`."""

    memory_position: str = "sinusoid"
    score_position: str = "relative"
    n_exact: int = 128
    max_distance: int = 4096
    d_rotary: int = 32
    d_memory: int = 0
    share_projections: bool = False
    cache: str = "auto"
    implementation: str = "auto"

    def __post_init__(self):
        require_types(self, "inattention.")
        require_one_of("inattention.memory_position", self.memory_position, MEMORY_POSITIONS)
        require_one_of("inattention.score_position", self.score_position, SCORE_POSITIONS)
        require_one_of("inattention.cache", self.cache, CACHES)
        require_one_of("inattention.implementation", self.implementation, FORMS)
        for field in ("n_exact", "max_distance", "d_rotary"):
            require_positive(f"inattention.{field}", getattr(self, field))
        self.check_rotary("inattention.")
        require_not_negative("inattention.d_memory", self.d_memory)
        if self.d_rotary % 2:
            raise ValueError(
                f"config.model.inattention.d_rotary must be even: got {self.d_rotary}; use "
                f"{self.d_rotary + 1}"
            )
        if self.score_position == "relative" and self.max_distance <= self.n_exact:
            raise ValueError(
                "config.model.inattention.max_distance must exceed n_exact, up to which every "
                f"distance has a bias of its own: got {self.max_distance} and {self.n_exact}; "
                "raise it, or set score_position='near'"
            )
        is_near = self.score_position == "near" and self.cache in ("auto", "counts")
        if self.implementation == "vq" and (self.why_not("counts") or not is_near):
            raise ValueError(
                "config.model.inattention.implementation='vq' takes ids for codes: got "
                f"memory_position={self.memory_position!r}, score_position="
                f"{self.score_position!r}, cache={self.cache!r}; set 'none', 'near' and 'counts', "
                "or implementation='auto'"
            )
        if reason := self.why_not(self.cache):
            raise ValueError(
                f"config.model.inattention.cache={self.cache!r} cannot be: {reason}; use another "
                "cache or 'auto'"
            )

    def why_not(self, cache: str) -> str:
        """Returns why this kind of cache cannot be exact here; "" if it is."""
        if cache in ("embedding", "ids") and self.score_position == "rotary":
            return "score_position='rotary' turns keys after they are projected"
        if cache != "counts":
            return ""
        if self.memory_position != "none":
            return f"memory_position={self.memory_position!r} makes equal tokens differ"
        if self.score_position not in COUNTABLE:
            return f"score_position={self.score_position!r} tells old equal tokens apart"
        return ""
