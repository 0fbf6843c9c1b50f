"""Which part of a train state lies on which device: ordered rules over the paths of its leaves.

A rule is a pattern, searched for in a leaf's path ("params/stack/0_softmax/mixer/query/kernel", and
the same behind "opt_state/..." for its moments), and the mesh axes of its last dimensions. The
first one that matches counts, and axes that a dimension is no multiple of are left out. Vectors,
counters, keys and codebooks are whole on every device. Where FSDP is on and the rules spread a
matrix over "data" nowhere, its longest dimension that divides is.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.decoder import ModelCache
from longctx_jax.models.stack import layer_names, mixer_kind
from longctx_jax.training.mesh import DATA, LAYER, MODEL, Topology
from longctx_jax.training.state import TrainState
from longctx_jax.typing import PyTree

Axes = tuple[str | None, ...]
Rule = tuple[str, Axes]

# First match wins. Products [rows, columns] share out columns before heads or hidden numbers, and
# rows after them, so that two products need one sum over "model".
RULES: tuple[Rule, ...] = (
    (r"embed/(table|output)$", (MODEL, DATA)),  # [vocab, d_model]
    (r"/mlp/value/kernel$", (MODEL, DATA)),  # RWKV's channel mix: back to d_model
    (r"(query|key|value|receptance|gate|up)/kernel$", (DATA, MODEL)),
    (r"(out|down)/kernel$", (MODEL, DATA)),
)
# Parts of the state whose leaves have a leading axis of layers.
_STACKED = re.compile(r"(^|/)(stack|memory/layers)/")
_SPREAD = ("params", "opt_state", "ema")  # fields of the state that the rules are for
FSDP_SHARE = 0.25  # of a device's memory: a state that takes more is spread
FSDP_BYTES = 4 << 30  # the same where devices do not tell their memory


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a state is spread over the devices of a topology."""

    topology: Topology
    use_fsdp: bool
    rules: tuple[Rule, ...] = RULES

    def specs(self, state: PyTree) -> PyTree:
        """Returns a PartitionSpec for every leaf of a TrainState, or of dicts with its fields."""

        def spec(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return PartitionSpec(*self._axes(name, leaf))

        specs = jax.tree_util.tree_map_with_path(spec, state)
        cache = getattr(state, "cache", None)
        if isinstance(cache, ModelCache):
            specs = dataclasses.replace(specs, cache=self.cache_specs(cache))
        return specs

    def shardings(self, state: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
        """`specs` as shardings over a mesh."""
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(state),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def bytes_per_device(self, state: PyTree) -> dict[str, int]:
        """Returns the bytes of each field of a TrainState on the device that holds most."""
        specs = self.specs(state)
        return {
            field.name: sum(
                _shard_bytes(leaf, spec, self.topology)
                for leaf, spec in zip(
                    jax.tree.leaves(getattr(state, field.name)),
                    jax.tree.leaves(
                        getattr(specs, field.name), is_leaf=lambda x: isinstance(x, PartitionSpec)
                    ),
                    strict=True,
                )
            )
            for field in dataclasses.fields(state)
        }

    def cache_specs(self, cache: ModelCache) -> ModelCache:
        """Returns specs of a carried cache, whose rows lie with the rows of the batch."""

        def rows(leaf, axis):
            fits = leaf.ndim > axis and leaf.shape[axis] % self.topology.data == 0
            return PartitionSpec(*[None] * axis, DATA) if fits else PartitionSpec()

        layers = jax.tree.map(lambda leaf: rows(leaf, cache.row_axis), cache.layers)
        rest = jax.tree.map(lambda leaf: rows(leaf, 0), dataclasses.replace(cache, layers=()))
        return dataclasses.replace(rest, layers=layers)

    def _axes(self, name: str, leaf: Any) -> list[str | None]:
        n_layer_axes = int(bool(_STACKED.search(name)))
        if not name.startswith(_SPREAD) or leaf.ndim <= n_layer_axes:
            return []
        axes: list[str | None] = [None] * leaf.ndim
        if n_layer_axes and self._fits(LAYER, leaf.shape[0]):
            axes[0] = LAYER
        if leaf.ndim - n_layer_axes < 2:
            return axes
        for pattern, wanted in self.rules:
            if re.search(pattern, name):
                for dimension, axis in enumerate(wanted, leaf.ndim - len(wanted)):
                    is_inner = dimension >= n_layer_axes
                    if axis and is_inner and self._fits(axis, leaf.shape[dimension]):
                        axes[dimension] = axis
                break
        if DATA not in axes and self._fits(DATA, 0):
            self._add_data(axes, leaf.shape, n_layer_axes)
        return axes

    def _fits(self, axis: str, size: int) -> bool:
        n = self.topology.sizes[axis]
        return n > 1 and size % n == 0 and (axis != DATA or self.use_fsdp)

    def _add_data(self, axes: list[str | None], shape: Sequence[int], first: int) -> None:
        """Spreads the longest free dimension that divides over "data"."""
        free = [d for d in range(first, len(shape)) if axes[d] is None]
        for dimension in sorted(free, key=lambda d: -shape[d]):
            if self._fits(DATA, shape[dimension]):
                axes[dimension] = DATA
                return


def choose_layout(
    config: Any, model: ModelConfig, topology: Topology, state: TrainState, memory_bytes: int
) -> Layout:
    """Returns the layout that config.mesh asks for.

    Args:
        config: the whole config.
        model: with its pattern filled in; its mixers may have rules of their own.
        state: shapes of the state.
        memory_bytes: of a device; 0 = unknown.

    Raises:
        ValueError: an unknown config.mesh.fsdp, or a rule that is none.
    """
    if config.mesh.fsdp not in ("auto", "on", "off"):
        raise ValueError(
            f"config.mesh.fsdp must be auto, on or off: got {config.mesh.fsdp!r}; use auto"
        )
    total = sum(_bytes(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state)))
    limit = FSDP_SHARE * memory_bytes if memory_bytes else FSDP_BYTES
    use_fsdp = config.mesh.fsdp == "on" or (config.mesh.fsdp == "auto" and total > limit)
    rules = tuple(map(_parse_rule, config.mesh.rules))
    return Layout(topology, use_fsdp and topology.data > 1, rules + mixer_rules(model) + RULES)


def mixer_rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Returns the rules that the model's mixers bring, each for the layers that it is in."""
    rules = []
    for name, kind in zip(layer_names(model), model.pattern, strict=True):
        mixer = model.mixers.get(mixer_kind(model, kind))
        for pattern, axes in mixer.rules if mixer else ():
            rules.append((rf"/{re.escape(name)}/mixer/(.*/)?(?:{pattern})", axes))
    return tuple(rules)


def _parse_rule(text: str) -> Rule:
    """Returns the rule of "PATTERN=AXIS,AXIS", "-" being no axis."""
    pattern, equals, names = str(text).rpartition("=")
    axes = tuple(None if name == "-" else name for name in names.split(","))
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"config.mesh.rules must hold regular expressions: {pattern!r}: {error}; mend it"
        ) from error
    if not equals or any(axis not in (None, LAYER, DATA, MODEL) for axis in axes):
        raise ValueError(
            "config.mesh.rules must be texts like 'mlp/up/kernel$=data,model' ('-' for no axis): "
            f"got {text!r}; mend it"
        )
    return pattern, axes


def _bytes(leaf: Any) -> int:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    return leaf.size * leaf.dtype.itemsize


def _shard_bytes(leaf: Any, spec: PartitionSpec, topology: Topology) -> int:
    n = math.prod(topology.sizes[axis] for axis in spec if axis is not None)
    return _bytes(leaf) // n
