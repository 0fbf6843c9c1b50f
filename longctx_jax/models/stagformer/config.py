"""`config.model.stagformer`: time-staggered stacks, frozen and checked."""

import dataclasses

from longctx_jax.nn import cross_attention
from longctx_jax.nn.config_checks import require_not_negative, require_one_of, require_types

HANDOFFS = ("cross", "add")  # cross-attention in every upper layer, or a sum at the start
CROSS_CACHES = ("kv", "memory")  # keys and values a layer, or the rows they are made of, once


@dataclasses.dataclass(frozen=True)
class StagFormerConfig:
    """`config.model.stagformer`."""

    n_stacks: int = 2
    share_weights: bool = False
    handoff: str = "cross"
    cross_window: int = 0
    cross_position: str = "rotary"
    cross_cache: str = "kv"
    combine: str = "last"
    stagger: bool = True
    decode: str = "auto"
    recurrent: bool = False
    stack_axis: str = ""

    def __post_init__(self):
        require_types(self, "stagformer.")
        require_one_of("stagformer.handoff", self.handoff, HANDOFFS)
        require_one_of("stagformer.cross_position", self.cross_position, cross_attention.POSITIONS)
        require_one_of("stagformer.cross_cache", self.cross_cache, CROSS_CACHES)
        require_one_of("stagformer.combine", self.combine, ("last", "linear"))
        require_one_of("stagformer.decode", self.decode, ("auto", "lanes", "sequential"))
        require_not_negative("stagformer.cross_window", self.cross_window)
        self._require(
            self.n_stacks >= 2,
            "n_stacks must be at least 2",
            self.n_stacks,
            "raise it, or use config.model.name='transformer'",
        )
        if self.cross_cache == "memory":
            self._require(
                self.cross_position == "none",
                "cross_cache='memory' keeps rows that no layer has rotated",
                f"cross_position={self.cross_position!r}",
                "set cross_position='none'",
            )
        if not self.stagger:
            for field, value in (("recurrent", self.recurrent), ("stack_axis", self.stack_axis)):
                self._require(
                    not value,
                    f"{field} needs staggered stacks",
                    f"stagger=False, {field}={value!r}",
                    "set stagger=True",
                )
            self._require(
                self.decode != "lanes",
                "without stagger a token goes through one stack after the other",
                f"decode={self.decode!r}",
                "set decode='auto'",
            )
        if self.stack_axis:
            self._require(
                self.decode != "sequential",
                "stack_axis spreads lanes over devices",
                f"decode={self.decode!r}, stack_axis={self.stack_axis!r}",
                "set decode='auto'",
            )
        has_ring = self.handoff == "cross" and self.cross_window != 1
        self._require(
            self.handoff == "cross" or not self.cross_window,
            "handoff='add' has no cross-attention",
            f"cross_window={self.cross_window}",
            "set cross_window=0",
        )
        self._require(
            has_ring or self.cross_cache == "kv",
            "without cross-attention over several rows there is nothing to cache",
            f"cross_cache={self.cross_cache!r}, handoff={self.handoff!r}, "
            f"cross_window={self.cross_window}",
            "set cross_cache='kv'",
        )
        if self.recurrent:
            self._require(
                self.decode == "auto",
                "recurrent decoding runs the last pass alone",
                f"decode={self.decode!r}",
                "set decode='auto'",
            )
            self._require(
                self.share_weights and self.combine == "last" and not self.stack_axis,
                "recurrent decoding replaces the passes of shared weights by the last one",
                f"share_weights={self.share_weights}, combine={self.combine!r}, "
                f"stack_axis={self.stack_axis!r}",
                "set share_weights=True, combine='last' and stack_axis=''",
            )

    def _require(self, holds: bool, rule: str, got: object, remedy: str) -> None:
        if not holds:
            raise ValueError(f"config.model.stagformer: {rule}: got {got}; {remedy}")
