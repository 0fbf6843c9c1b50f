"""From the weights of a `transformer` to those of another scheme.

By parameter path alone: whatever stands at the same place in a layer with the same shape is kept,
so a scheme needs no code here as long as its mixers name their projections alike.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.stack import layer_names, layer_places
from longctx_jax.nn.rotary_config import RotaryConfig
from longctx_jax.typing import PRNGKey, PyTree

SCHEMES = ("inattention", "decay", "recurrent_memory", "sliding")
ROTARY_FIELDS = tuple(field.name for field in dataclasses.fields(RotaryConfig))
# of config.model.softmax and sliding: what the two share
ATTENTION_FIELDS = ("position", *ROTARY_FIELDS, "qk_norm")
Path = tuple[str, ...]
# of the new model, below a layer: where the old one has what does the same. The gain of the initial
# memory stands before keys and values, where a transformer has the scale of its norm
ALIASES: dict[Path, Path] = {("mixer", "gain"): ("mixer_norm", "scale")}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Another scheme's variables and where they come from, as paths of leaves."""

    variables: dict[str, PyTree]
    kept: list[str]  # in the new model, from the old one
    fresh: list[str]  # in the new model, without a counterpart
    dropped: list[str]  # in the old model, without a counterpart


def scheme_fields(scheme: str, model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of `config.model` that turn a transformer's config into a scheme's.

    Args:
        scheme: one of SCHEMES.
        model: of the transformer.

    Raises:
        ValueError: if the model is none.
    """
    kinds = set(model.pattern)
    if model.name != "transformer" or not kinds <= {"softmax", "sliding"}:
        raise ValueError(
            "schemes are initialised from softmax attention: got config.model.name="
            f"{model.name!r}, pattern={model.pattern}; give --from=RUN of a run with "
            "name='transformer' and its own pattern"
        )
    given = model.of(model.pattern[0])
    if scheme == "sliding":
        taken = {f"sliding.{name}": getattr(given, name) for name in ATTENTION_FIELDS}
        return {"pattern": ("sliding",), **taken}
    if scheme == "decay":
        return {"name": "decay", "pattern": (), "decay.rope_theta": given.rope_theta}
    if scheme == "recurrent_memory":
        mixer = "softmax" if "softmax" in kinds else "sliding"
        return {"name": "recurrent_memory", "pattern": (), "memory.mixer": mixer}
    if model.norm != "rms" or given.qk_norm:
        raise ValueError(
            "inattention norms its memory once, by its root mean square, for all layers: got "
            f"config.model.norm={model.norm!r}, qk_norm={given.qk_norm}; convert a run with "
            "norm='rms' and without qk_norm, or to another scheme"
        )
    if given.position == "none":
        positions = {"memory_position": "none", "score_position": "none"}
        fields = {f"inattention.{name}": value for name, value in positions.items()}
        return {"name": scheme, "pattern": (), **fields}
    if given.position == "rotary":  # what is left to the layers is then as it was
        taken = {"memory_position": "none", "score_position": "rotary"}
        taken |= {n: getattr(given, n) for n in ROTARY_FIELDS}
        fields = {f"inattention.{name}": value for name, value in taken.items()}
        return {"name": scheme, "pattern": (), **fields}
    return {"name": scheme, "pattern": ()}


def transfer(
    source: ModelConfig, given: dict[str, PyTree], target: Decoder, key: PRNGKey
) -> Transfer:
    """Returns variables of `target` with every weight of `given` that has a counterpart.

    The counterpart of a layer's weight is the weight at the same path below the same layer, or at
    that of ALIASES, if it has the same shape in all layers of its pattern position. A recurrent
    memory is put around the converted model without it, where it starts without effect (ARMT).

    Args:
        source: config of the model that `given` belongs to.
        given: its variables.
        target: the new model.
        key: of what is fresh.
    """
    fresh = target.init(key)
    if target.backbone is None:
        return match(source, given, target.config, fresh)
    backbone = target.backbone
    moved = match(source, given, backbone.config, backbone.init(key))
    variables = target.add_to_backbone(fresh, moved.variables)
    olds, news = layer_names(backbone.config), layer_names(target.config)
    names = {f"/{old}/": f"/{new}/" for old, new in zip(olds, news, strict=True)}

    def renamed(paths: Iterable[str]) -> list[str]:
        for old, new in names.items():
            paths = [path.replace(old, new) for path in paths]
        return list(paths)

    memory = [f"params/memory/{'/'.join(path)}" for path in _flat(fresh["params"]["memory"])]
    return Transfer(variables, renamed(moved.kept), renamed(moved.fresh) + memory, moved.dropped)


def match(
    source: ModelConfig, given: dict[str, PyTree], target: ModelConfig, fresh: dict[str, PyTree]
) -> Transfer:
    """As `transfer`, of models without recurrent memory; `fresh` are variables of the new one."""
    old, new = _flat(given), _flat(fresh)
    places = _by_layer(source, old)
    kept, leaves, used = [], {}, set()
    for path, leaf in new.items():
        if not _in_stack(path):
            sources = [(path, None)]
        else:
            numbers = _numbers(target)[path[2]]
            below = path[3:]
            if (path[0], *below, numbers[0]) not in places:
                below = ALIASES.get(below, below)
            sources = [places.get((path[0], *below, n), ((), None)) for n in numbers]
        shape = leaf.shape[1:] if _in_stack(path) else leaf.shape
        parts = [
            old[where] if row is None else old[where][row] for where, row in sources if where in old
        ]
        if len(parts) < len(sources) or any(part.shape != shape for part in parts):
            leaves[path] = leaf
            continue
        used.update(sources)
        kept.append(path)
        leaves[path] = np.stack(parts) if _in_stack(path) else parts[0]
    variables = jax.tree.unflatten(jax.tree.structure(fresh), list(leaves.values()))
    everything = [(path, None) for path in old if not _in_stack(path)] + list(places.values())
    dropped = dict.fromkeys(path for path, row in everything if (path, row) not in used)
    without = [path for path in new if path not in kept]
    return Transfer(variables, *(["/".join(p) for p in ps] for ps in (kept, without, dropped)))


def _by_layer(config: ModelConfig, leaves: dict[Path, Any]) -> dict[tuple, tuple[Path, int]]:
    """Returns where (collection, path below a layer, layer) is: the leaf's path and the row."""
    return {
        (path[0], *path[3:], number): (path, row)
        for path in leaves
        if _in_stack(path)
        for row, number in enumerate(_numbers(config)[path[2]])
    }


def _numbers(config: ModelConfig) -> dict[str, list[int]]:
    """Returns the layers of each pattern position."""
    names, places = layer_names(config), layer_places(config)
    return {name: place.tolist() for name, place in zip(names, places, strict=True)}


def _in_stack(path: Path) -> bool:
    return path[1] == "stack"


def _flat(tree: PyTree) -> dict[Path, Any]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in flat}
