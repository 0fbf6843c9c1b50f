"""The mesh of devices that a run is spread over, chosen from config.mesh and the sizes of the run.

Axes, outermost first: "data" (rows of a batch, and with FSDP the parameters), "layer" (the
diagonal schedule's layers), "sequence" (tokens of a row) and "model" (heads, MLP, vocabulary:
neighbouring devices, which talk most). On one device there is no mesh, and nothing here does
anything.
"""

import dataclasses
import math
from typing import Any

import jax

AXES = ("data", "layer", "sequence", "model")
DATA, LAYER, SEQUENCE, MODEL = AXES


@dataclasses.dataclass(frozen=True)
class Topology:
    """How many devices lie along each axis."""

    data: int = 1
    layer: int = 1
    sequence: int = 1
    model: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by axis, in the order of the mesh."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def n_devices(self) -> int:
        """Devices in all."""
        return math.prod(self.sizes.values())

    def __str__(self) -> str:
        """The axes that have more than one device."""
        return " ".join(f"{n}={s}" for n, s in self.sizes.items() if s > 1) or "one device"


def choose_topology(config: Any, n_devices: int) -> Topology:
    """Returns the axes' sizes: those of config.mesh, and where they are 0, what fits.

    config.mesh.data takes all devices that the other axes leave, as far as the rows of a
    micro-batch go round; devices that are left then share out heads and MLP (model).

    Args:
        config: the whole config.
        n_devices: of the run, over all processes.

    Raises:
        ValueError: sizes that do not multiply to n_devices, or do not divide what they spread.
    """
    mesh, rows = config.mesh, config.data.global_batch_size // config.train.n_microbatches
    for field in AXES:
        if mesh[field] < 0:
            raise ValueError(f"config.mesh.{field} must not be negative: got {mesh[field]}; use 0")
    layer, sequence = max(1, mesh.layer), max(1, mesh.sequence)
    fixed = layer * sequence * max(1, mesh.model) * max(1, mesh.data)
    if n_devices % fixed:
        raise ValueError(
            f"config.mesh must divide the devices: got {_given(mesh)} for {n_devices} devices; "
            "change one of them, or set data and model to 0"
        )
    left = n_devices // fixed  # for the axes that are 0
    data, model = mesh.data, mesh.model
    if not data:
        data = math.gcd(left, rows) if not model else left
        left //= data
    model = model or left
    topology = Topology(data, layer, sequence, model)
    _require_fit(config, topology, n_devices, rows)
    return topology


def make_mesh(topology: Topology) -> jax.sharding.Mesh | None:
    """Returns the mesh over all devices of all processes; None for one device."""
    if topology.n_devices == 1:
        return None
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(topology.sizes.values()), AXES, axis_types=types)


def _require_fit(config: Any, topology: Topology, n_devices: int, rows: int) -> None:
    if topology.n_devices != n_devices:
        raise ValueError(
            f"config.mesh must use all devices: got {_given(config.mesh)} for {n_devices}; set "
            "data or model to 0 for the rest"
        )
    if rows % topology.data:
        raise ValueError(
            "the devices along config.mesh.data must divide the rows of a micro-batch: got "
            f"{topology.data} and {rows} (config.data.global_batch_size / "
            "config.train.n_microbatches); change one of them"
        )
    heads = config.model.n_heads
    if topology.model > 1 and heads % topology.model:
        raise ValueError(
            f"the devices along config.mesh.model must divide config.model.n_heads: got "
            f"{topology.model} and {heads}; with {rows} rows a micro-batch on {n_devices} devices, "
            "raise config.data.global_batch_size, or set config.mesh.sequence"
        )
    seq_len = config.data.seq_len
    if seq_len % topology.sequence:
        raise ValueError(
            "the devices along config.mesh.sequence must divide config.data.seq_len: got "
            f"{topology.sequence} and {seq_len}; change one of them"
        )


def _given(mesh: Any) -> str:
    return ", ".join(f"{name}={mesh[name]}" for name in AXES)
