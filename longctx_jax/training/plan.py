"""What a run's spreading over devices comes to, for any topology, with or without the devices."""

import dataclasses
from typing import Any

import jax

from longctx_jax.models.decoder import Decoder
from longctx_jax.training.mesh import Topology, choose_topology
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.placement import Placement, device_memory, spread_model
from longctx_jax.training.sharding import Layout, choose_layout
from longctx_jax.training.start import carried_cache_len, check_config
from longctx_jax.training.state import TrainState, init_state

FIELDS = ("params", "opt_state", "ema", "model_state", "cache")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run would lie on its devices."""

    topology: Topology
    layout: Layout
    shapes: TrainState
    rows: int  # of a step, on a device
    tokens: int  # of a row, on a device

    @property
    def total_bytes(self) -> dict[str, int]:
        """Bytes of the state by field, on one device that held everything."""
        return _named(Layout(Topology(), use_fsdp=False).bytes_per_device(self.shapes))

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes of the state by field, on the device that holds most."""
        return _named(self.layout.bytes_per_device(self.shapes))

    def line(self) -> str:
        """The decision in one line."""
        total, here = (sum(b.values()) for b in (self.total_bytes, self.device_bytes))
        how = "spread over data (FSDP)" if self.layout.use_fsdp else "whole along data"
        return (
            f"devices={self.topology.n_devices} mesh: {self.topology}; state {how}: "
            f"{_size(here)} a device of {_size(total)}; {self.rows} rows x {self.tokens} tokens a "
            "device and step"
        )

    def table(self) -> str:
        """The state's parts, and its largest arrays with where they lie."""
        lines = [self.line(), "", f"{'state':<12} {'all':>10} {'a device':>10}"]
        for name, total in self.total_bytes.items():
            lines.append(f"{name:<12} {_size(total):>10} {_size(self.device_bytes[name]):>10}")
        lines += ["", f"{'array':<48} {'shape':<22} spread over"]
        specs = self.layout.specs(self.shapes)
        leaves = zip(
            jax.tree_util.tree_leaves_with_path(self.shapes.params),
            jax.tree.leaves(specs.params, is_leaf=lambda x: isinstance(x, jax.P)),
            strict=True,
        )
        for (path, leaf), spec in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            where = ", ".join(str(axis or "-") for axis in spec) if any(spec) else "(whole)"
            lines.append(f"{name:<48} {leaf.shape!s:<22} {where}")
        return "\n".join(lines)


def make_plan(config: Any, model: Decoder, n_devices: int, memory_bytes: int = 0) -> Plan:
    """Returns the plan of a config for a number of devices, which need not be here.

    Args:
        config: whole.
        model: of config.model.
        n_devices: to spread over.
        memory_bytes: of a device, for config.mesh.fsdp="auto"; 0 = unknown.

    Raises:
        ValueError: the config cannot run on so many devices; names the fields.
    """
    if n_devices < 1:
        raise ValueError(f"a plan needs at least one device: got {n_devices}; give more")
    check_config(config)
    topology = choose_topology(config, n_devices)
    model = spread_model(model, topology)
    tx, _ = make_optimizer(config.optim, config.train.n_steps)

    def fresh():
        return init_state(
            model,
            tx,
            seed=config.train.seed,
            batch_size=config.data.global_batch_size,
            cache_len=carried_cache_len(config),
            use_ema=bool(config.train.ema_decay),
        )

    shapes = jax.eval_shape(fresh)
    layout = choose_layout(config, model.config, topology, shapes, memory_bytes)
    rows = config.data.global_batch_size // topology.data
    return Plan(topology, layout, shapes, rows, config.data.seq_len // topology.sequence)


def plan_here(config: Any, model: Decoder, n_devices: int = 0, memory_gb: float = 0.0) -> Plan:
    """Returns `make_plan` with zeros filled in: the devices that are here, and their memory."""
    memory = int(memory_gb * 1e9) or (0 if n_devices else device_memory())
    return make_plan(config, model, n_devices or jax.device_count(), memory)


def run_line(config: Any, model: Decoder, placement: Placement) -> str:
    """Returns one line on how a run lies on its devices; "" where there was no choice."""
    if placement.mesh is None:
        return ""
    plan = make_plan(config, model, placement.topology.n_devices, device_memory())
    kind, n = jax.devices()[0].device_kind, jax.process_count()
    return f"{plan.line()} ({kind}, {n} process{'es' * (n > 1)})"


def _named(counts: dict[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in FIELDS if counts[name]}


def _size(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
