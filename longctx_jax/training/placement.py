"""Where the arrays of a run lie: everything on one device, or spread over a mesh.

The loop asks a Placement for the context to run in, for the shardings of its state, and to put
batches on the devices. Every process calls the same functions with the same arguments; each brings
only the rows that its devices hold.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder, ModelCache
from longctx_jax.nn.partition import ROWS, TOKENS
from longctx_jax.training.mesh import AXES, LAYER, SEQUENCE, Topology, choose_topology, make_mesh
from longctx_jax.training.sharding import Layout, choose_layout
from longctx_jax.training.state import TrainState
from longctx_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Placement:
    """A topology on real devices. Without a mesh every method does nothing."""

    topology: Topology
    mesh: jax.sharding.Mesh | None = None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Returns what the run happens in: the mesh, for code that asks for its axes."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def model(self, model: Decoder) -> Decoder:
        """Returns the model with its layers or segments spread over their axes."""
        return spread_model(model, self.topology)

    def layout(self, config: Any, model: Decoder, state: TrainState) -> Layout | None:
        """Returns how config.mesh spreads a state of these shapes."""
        if self.mesh is None:
            return None
        return choose_layout(config, model.config, self.topology, state, device_memory())

    def local_rows(self, n_rows: int) -> tuple[int, int]:
        """Returns the rows [first, stop) of a global batch that this process's devices hold."""
        if self.mesh is None:
            return 0, n_rows
        sharding = NamedSharding(self.mesh, PartitionSpec(ROWS))
        places = sharding.addressable_devices_indices_map((n_rows,)).values()
        slices = [at[0] for at in places if at is not None]
        return min(at.start or 0 for at in slices), max(at.stop or n_rows for at in slices)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns a step's batch [rows, seq] on the devices, of the rows that this process read."""
        if self.mesh is None:
            return batch
        # Rows may have been cut into several: whatever they are, this process has its share.
        here = next(iter(batch.values())).shape[0]
        first, stop = self.local_rows(self.topology.data)
        n_rows = here * self.topology.data // (stop - first)
        offset = first * n_rows // self.topology.data
        return {
            name: self._put(rows, (n_rows, *rows.shape[1:]), offset, PartitionSpec(ROWS, TOKENS))
            for name, rows in batch.items()
        }

    def put(self, tree: PyTree) -> PyTree:
        """Returns values that every process has, on the devices: rows spread where they divide.

        Args:
            tree: a cache, or arrays with leading rows.
        """
        if self.mesh is None:
            return tree
        if isinstance(tree, ModelCache):
            specs = Layout(self.topology, use_fsdp=False).cache_specs(tree)
        else:
            specs = jax.tree.map(self._rows_spec, tree)

        def put(leaf, spec):
            return self._put(np.asarray(leaf), leaf.shape, 0, spec)

        return jax.tree.map(put, tree, specs)

    def vote(self, wants: bool) -> jax.Array | None:
        """Returns this process's vote, to be summed over all; None where there is one process."""
        if self.mesh is None or jax.process_count() == 1:
            return None
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))
        n = self.topology.n_devices
        return jax.make_array_from_callback((n,), sharding, lambda at: np.full(1, wants, np.int32))

    def _rows_spec(self, leaf: Any) -> PartitionSpec:
        fits = leaf.ndim > 0 and leaf.shape[0] % self.topology.data == 0
        return PartitionSpec(ROWS) if fits else PartitionSpec()

    def _put(self, here: np.ndarray, shape, offset: int, spec: PartitionSpec) -> jax.Array:
        """Returns a global array whose rows from `offset` on are `here`, as far as needed."""
        assert self.mesh is not None
        if here.ndim > 1 and len(spec) > 1 and shape[1] % self.topology.sequence:
            spec = PartitionSpec(spec[0])
        sharding = NamedSharding(self.mesh, spec)

        def part(at):
            if not at:
                return here
            start = (at[0].start or 0) - offset
            stop = (shape[0] if at[0].stop is None else at[0].stop) - offset
            return here[(slice(start, stop), *at[1:])]

        return jax.make_array_from_callback(shape, sharding, part)


ONE_DEVICE = Placement(Topology())


def place(config: Any) -> Placement:
    """Returns the placement that config.mesh chooses on the devices of this run."""
    topology = choose_topology(config, jax.device_count())
    return Placement(topology, make_mesh(topology))


def spread_model(model: Decoder, topology: Topology) -> Decoder:
    """Returns the model as a topology runs it.

    Raises:
        ValueError: the model's layers or segments cannot be spread.
    """
    if topology.layer > 1:
        model = build_model(dataclasses.replace(model.config, layer_axis=LAYER))
    if topology.sequence > 1:
        model = build_model(dataclasses.replace(model.config, sequence_axis=SEQUENCE))
    return model


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Returns shapes that say where their arrays lie, for restoring into."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


@functools.cache
def device_memory() -> int:
    """Returns the bytes of a local device's memory; 0 where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0))
