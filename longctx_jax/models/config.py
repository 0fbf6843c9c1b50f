"""The frozen form of `config.model`: hashable, validated, the only config that models see."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from longctx_jax.models.inattention.config import InAttentionConfig
from longctx_jax.models.recurrent_memory.config import MemoryConfig
from longctx_jax.models.schedules import SCHEDULES
from longctx_jax.models.stagformer.config import StagFormerConfig
from longctx_jax.nn.config_checks import (
    nearest_divisor,
    require_not_negative,
    require_one_of,
    require_positive,
    require_probability,
    require_types,
)
from longctx_jax.nn.contract import Mixer
from longctx_jax.nn.mixers import MIXERS
from longctx_jax.nn.mlp import MLPS
from longctx_jax.nn.norms import NORMS

DTYPES = ("float32", "bfloat16", "float64")
REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """`config.model`, field by field (units and meanings in configs/base.py).

    After construction the derived sizes are filled in: no zero means "derive" any more. The fields
    of the mixers, `config.model.<kind>`, are `of(kind)`.

    Raises:
        ValueError: on contradictions, naming the field, its value and what to do.
    """

    name: str = "transformer"
    pattern: tuple[str, ...] = ()
    n_layers: int = 6
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int = 0
    d_key: int = 0
    d_value: int = 0
    mlp: str = "swiglu"
    d_ff: int = 0
    norm: str = "rms"
    norm_eps: float = 1e-6
    vocab_size: int = 256
    tie_embeddings: bool = True
    embed_scale: float = 0.0
    dropout: float = 0.0
    embed_dropout: float = 0.0
    layer_drop: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    schedule: str = "layerwise"
    segment_len: int = 0
    n_ramp_buckets: int = 4
    layer_axis: str = ""
    sequence_axis: str = ""
    unroll: int = 1
    memory: MemoryConfig = MemoryConfig()
    stagformer: StagFormerConfig = StagFormerConfig()
    inattention: InAttentionConfig = InAttentionConfig()
    mixers: Mapping[str, Mixer] = FrozenDict(MIXERS)
    mixer_fields: Mapping[str, Any] = FrozenDict()  # of each kind; missing ones are the defaults

    def __post_init__(self):
        require_types(self)
        for field in ("n_layers", "d_model", "n_heads", "vocab_size", "n_ramp_buckets", "unroll"):
            require_positive(field, getattr(self, field))
        require_positive("norm_eps", self.norm_eps)
        for field in ("n_kv_heads", "d_key", "d_value", "d_ff", "segment_len", "embed_scale"):
            require_not_negative(field, getattr(self, field))
        require_one_of("mlp", self.mlp, MLPS)
        require_one_of("norm", self.norm, tuple(NORMS))
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("remat", self.remat, REMAT_POLICIES)
        require_one_of("schedule", self.schedule, SCHEDULES)
        for field in ("dropout", "embed_dropout", "layer_drop"):
            require_probability(field, getattr(self, field))
        self._derive_widths()
        self._fill_mixers()
        if self.layer_axis and self.schedule != "diagonal":
            raise ValueError(
                "config.model.layer_axis spreads the diagonal schedule over devices: got "
                f"{self.layer_axis!r} with schedule={self.schedule!r}; set schedule='diagonal'"
            )
        if self.sequence_axis and (self.layer_axis or self.recurrence == "rmt"):
            raise ValueError(
                "config.model.sequence_axis spreads segments over devices, which goes with neither "
                f"layer_axis nor memory.kind='rmt': got {self.sequence_axis!r}, layer_axis="
                f"{self.layer_axis!r}, memory.kind={self.memory.kind!r}; leave one empty, or use "
                "memory.kind 'armt' or 'layerwise'"
            )
        if self.recurrence != "none":
            self._require_memory()

    def of(self, kind: str) -> Any:
        """Returns the fields of a mixer, `config.model.<kind>`."""
        return self.mixer_fields[kind]

    def with_fields_of(self, kind: str, **changes: Any) -> "ModelConfig":
        """Returns the config with other fields of a mixer."""
        changed = dataclasses.replace(self.of(kind), **changes)
        return dataclasses.replace(self, mixer_fields={**self.mixer_fields, kind: changed})

    def _require_memory(self):
        if self.segment_len not in (0, self.memory.segment_len):
            raise ValueError(
                "config.model.segment_len of a recurrent memory is its memory.segment_len, "
                f"{self.memory.segment_len}: got {self.segment_len}; leave it at 0"
            )
        if self.recurrence == "rmt" and self.schedule == "diagonal":
            raise ValueError(
                "config.model.schedule cannot be 'diagonal' with memory.kind='rmt': its memory "
                "passes through all layers before the next segment begins; use 'sequential', or "
                "memory.kind 'armt' or 'layerwise'"
            )
        if self.memory.kind != "armt" and "armt" in self.pattern:
            raise ValueError(
                f"config.model.pattern cannot hold 'armt' with memory.kind={self.memory.kind!r}: "
                f"got {self.pattern}; set memory.kind='armt' or leave it out"
            )
        if self.recurrence == "armt" and self.pattern and "armt" not in self.pattern:
            raise ValueError(
                "config.model.pattern must hold 'armt' with name='recurrent_memory' and "
                f"memory.kind='armt', or no layer has a memory: got {self.pattern}; add 'armt', "
                "leave the pattern empty, or set name='transformer'"
            )
        if self.d_model % self.memory.n_heads:
            raise ValueError(
                "config.model.memory.n_heads must divide d_model: got "
                f"{self.memory.n_heads} and {self.d_model}; use "
                f"{nearest_divisor(self.d_model, self.memory.n_heads)}"
            )

    def _fill_mixers(self):
        taken = {field.name for field in dataclasses.fields(self)} | {"armt"}
        for kind in self.mixers:
            if kind in taken or not kind.isidentifier():
                raise ValueError(
                    "a mixer's name must be a word that no field of config.model has: got "
                    f"{kind!r}; rename it"
                )
        fields = {
            kind: self.mixer_fields.get(kind, mixer.config()) for kind, mixer in self.mixers.items()
        }
        require_one_of("memory.mixer", self.memory.mixer, tuple(self.mixers))
        object.__setattr__(self, "mixers", FrozenDict(self.mixers))
        object.__setattr__(self, "mixer_fields", FrozenDict(fields))

    def _derive_widths(self):
        def fill(field, value):
            if not getattr(self, field):
                object.__setattr__(self, field, value)

        if not self.d_key and self.d_model % self.n_heads:
            raise ValueError(
                f"config.model.n_heads must divide d_model: got n_heads={self.n_heads}, "
                f"d_model={self.d_model}; "
                f"use n_heads={nearest_divisor(self.d_model, self.n_heads)} "
                "or set config.model.d_key"
            )
        fill("d_key", self.d_model // self.n_heads)
        fill("d_value", self.d_key)
        fill("n_kv_heads", self.n_heads)
        fill("embed_scale", 1.0 if self.tie_embeddings else self.d_model**0.5)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"config.model.n_kv_heads must divide n_heads: got n_kv_heads={self.n_kv_heads}, "
                f"n_heads={self.n_heads}; "
                f"use n_kv_heads={nearest_divisor(self.n_heads, self.n_kv_heads)}"
            )
        factor = {"gelu": 4, "relu2": 4, "rwkv": 3.5}.get(self.mlp, 8 / 3)
        fill("d_ff", -(-int(factor * self.d_model) // 32) * 32)

    @property
    def recurrence(self) -> str:
        """Which memory goes from segment to segment: "armt", "rmt", "layerwise" or "none"."""
        if self.name == "recurrent_memory":
            return self.memory.kind
        return "armt" if "armt" in self.pattern else "none"

    def with_pattern(self, default: tuple[str, ...], known: tuple[str, ...] = ()) -> "ModelConfig":
        """Returns the config with `pattern` filled in and checked against n_layers.

        Args:
            default: where the config has none.
            known: kinds that it may hold; () = all mixers, and "armt".
        """
        pattern = tuple(self.pattern) or default
        known = known or (*self.mixers, "armt")
        for kind in pattern:
            require_one_of("pattern", kind, known)
        if self.n_layers % len(pattern):
            raise ValueError(
                f"config.model.n_layers must be a multiple of the pattern's length: got n_layers="
                f"{self.n_layers}, pattern={pattern}; use n_layers="
                f"{-(-self.n_layers // len(pattern)) * len(pattern)}"
            )
        return dataclasses.replace(self, pattern=pattern)


def default_of_mixer(kind: str, field: str) -> Any:
    """Returns the default of `config.model.<kind>.<field>`; None where no mixer has it."""
    return getattr(MIXERS[kind].config(), field, None) if kind in MIXERS else None


def model_config(fields: Any, mixers: Mapping[str, Mixer] = MIXERS) -> ModelConfig:
    """Returns the frozen ModelConfig of a `config.model` ConfigDict (or any mapping).

    Args:
        fields: of `config.model`; a ModelConfig comes back as it is.
        mixers: kinds that a pattern may name; each may have a group of fields.

    Raises:
        ValueError: if a field is unknown or has an impossible value.
    """
    if isinstance(fields, ModelConfig):
        return fields
    schemes = {
        "memory": MemoryConfig,
        "stagformer": StagFormerConfig,
        "inattention": InAttentionConfig,
    }
    groups = schemes | {kind: mixer.config for kind, mixer in mixers.items()}
    fields = dict(fields)
    _require_outside_mixers(fields.pop(OUTSIDE, ()), mixers)
    values, of_mixers = {}, {}
    for name, value in fields.items():
        if name in groups and not isinstance(value, groups[name]):
            if not hasattr(value, "items"):
                raise ValueError(
                    f"config.model.{name} must be a group of fields: got {value!r:.100}; write "
                    f"config.model.{name}.FIELD"
                )
            value = _construct(groups[name], f"{name}.", dict(value))
        elif name == "pattern":
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, tuple | list) or not all(isinstance(k, str) for k in value):
                raise ValueError(
                    f"config.model.pattern must list kinds of mixers: got {value!r:.100}; write "
                    "('decay', 'softmax'), or () for the model's own"
                )
            value = tuple(value)
        if name in mixers:
            of_mixers[name] = value
        else:
            values[name] = value
    values |= {"mixers": FrozenDict(mixers), "mixer_fields": FrozenDict(of_mixers)}
    return _construct(ModelConfig, "", values, known=(*_plain_fields(), *mixers))


OUTSIDE = "outside_mixers"  # of config.model: names of mixers that are not this library's


def _require_outside_mixers(named: Any, mixers: Mapping[str, Mixer]) -> None:
    """Raises ValueError if a config was made for mixers that are not at hand.

    Args:
        named: "kind=package.module:NAME" of each; only shown, never imported.
        mixers: those at hand.
    """
    if not isinstance(named, list | tuple) or not all(isinstance(text, str) for text in named):
        raise ValueError(
            f"config.model.{OUTSIDE} must list texts: got {named!r:.100}; leave it to --mixers"
        )
    missing = [text for text in named if str(text).partition("=")[0] not in mixers]
    if missing:
        places = ",".join(str(text).partition("=")[2] for text in missing)
        raise ValueError(
            "config.model needs mixers from outside this library: got none for "
            f"{', '.join(map(str, missing))!r:.200}; if you trust that code, add "
            f"--mixers={places:.200} to the command, or pass mixers={{**MIXERS, ...}} to "
            "build_model"
        )


def _plain_fields() -> list[str]:
    hidden = ("mixers", "mixer_fields")
    return [f.name for f in dataclasses.fields(ModelConfig) if f.name not in hidden]


def _construct(kind: type, prefix: str, values: dict[str, Any], known: Any = ()) -> Any:
    named = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in named:
            raise ValueError(
                f"config.model.{prefix}{name} is not a field: known are {list(known or named)}; "
                "remove or rename it"
            )
    return kind(**values)
