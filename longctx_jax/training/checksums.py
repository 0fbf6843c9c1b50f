"""A checksum of an array that does not depend on how it is spread over devices and processes.

    sum over elements i of  bits(x_i) * w(i)   modulo 2^64,   w(i) odd

An odd weight makes every change of one element visible, whatever it is, and weights that look
random leave other changes a chance of about 2^-63 to cancel. Sums come in any order: each process
adds up what it holds, and the results are added.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
_CHUNK = 1 << 18  # elements whose weights exist at once


def checksums(leaves: Sequence[Any]) -> list[int]:
    """Returns a checksum a leaf, the same on all processes; all of them must call this.

    Args:
        leaves: arrays, of which each process holds a part or everything.
    """
    sums = np.array([_local(leaf) for leaf in leaves], np.uint64)
    if jax.process_count() > 1:
        halves = sums.view(np.uint32)  # 64-bit types are off on devices
        gathered = np.asarray(multihost_utils.process_allgather(halves))
        gathered = np.ascontiguousarray(gathered.reshape(jax.process_count(), -1))
        sums = np.sum(gathered.view(np.uint64), axis=0, dtype=np.uint64)
    return list(map(int, sums.ravel()))


def _local(leaf: Any) -> int:
    """Returns what this process adds to the checksum: of each part, one process's copy."""
    shards = getattr(leaf, "addressable_shards", None)
    if shards is None:
        whole = np.asarray(leaf)
        return _part(whole, [slice(None)] * whole.ndim, whole.shape)
    total = 0
    for shard in shards:
        if shard.replica_id == 0:
            total += _part(np.asarray(shard.data), shard.index, leaf.shape)
    return total % (1 << 64)


def _part(part: np.ndarray, index: Sequence[slice], shape: Sequence[int]) -> int:
    """Returns the weighted sum over a part that lies at `index` of an array of this shape."""
    if not part.size:
        return 0
    bits = np.ascontiguousarray(part).view(_unsigned(part.dtype)).reshape(-1)
    total = 0
    for start in range(0, bits.size, _CHUNK):
        places = np.arange(start, min(start + _CHUNK, bits.size), dtype=np.uint64)
        weights = _weights(_global(places, part.shape, index, shape))
        here = bits[start : start + _CHUNK].astype(np.uint64)
        total += int(np.sum(here * weights, dtype=np.uint64))
    return total % (1 << 64)


def _global(
    places: np.ndarray, part_shape: Sequence[int], index: Sequence[slice], shape: Sequence[int]
) -> np.ndarray:
    """Returns where elements of a part stand in the whole array, both counted row by row."""
    if tuple(part_shape) == tuple(shape):
        return places
    found, stride = np.zeros_like(places), 1
    for size, at, whole in zip(
        reversed(part_shape), reversed(tuple(index)), reversed(shape), strict=True
    ):
        found += (places % np.uint64(size) + np.uint64(at.start or 0)) * np.uint64(stride)
        places = places // np.uint64(size)
        stride *= whole
    return found


def _weights(index: np.ndarray) -> np.ndarray:
    """Returns an odd number for each index, well mixed."""
    mixed = (index + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MULTIPLIER
    return mixed | np.uint64(1)


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")
