"""Bytes of a model's cache, from the shapes that `init_cache` makes; nothing is allocated.

So every model and mixer is counted, to the byte, the moment it exists. Closed forms of those that
are here stand in docs/accounting.md, and the tests hold them.
"""

import collections
import functools
from collections.abc import Iterator
from typing import Any

import jax

from longctx_jax.models.decoder import Decoder, ModelCache
from longctx_jax.nn.kv_cache import KVCache

Terms = dict[str, int]  # bytes by what they hold


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, or of their shapes."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@functools.lru_cache(maxsize=4096)
def cache_shapes(model: Decoder, batch_size: int, max_len: int) -> ModelCache:
    """Returns the shapes of `init_cache`; arguments as there."""
    return jax.eval_shape(lambda: model.init_cache(batch_size, max_len))


def cache_bytes(model: Decoder, batch_size: int, max_len: int) -> int:
    """Returns the bytes of the whole cache."""
    return tree_bytes(cache_shapes(model, batch_size, max_len))


def cache_terms(model: Decoder, batch_size: int, max_len: int) -> Terms:
    """Returns the bytes of the cache by what they hold: its fields, summed over layers.

    E.g. {"key": ..., "value": ..., "slot_positions": ...}, and "inner.key" of a layer's part inside
    a memory.
    """
    terms: collections.Counter[str] = collections.Counter()
    shapes = cache_shapes(model, batch_size, max_len)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [entry.name for entry in path if hasattr(entry, "name")]
        names = [name for name in names if name not in ("layers", "carried", "positions")]
        terms[".".join(names) or "state"] += leaf.size * leaf.dtype.itemsize
    return dict(sorted(terms.items()))


def rings(tree: Any) -> Iterator[KVCache]:
    """Yields the rings of keys and values in a tree of caches."""
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, KVCache)):
        if isinstance(node, KVCache):
            yield node
