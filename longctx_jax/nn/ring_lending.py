"""Rings of keys and values are lent to the layers that read them, and written in place afterwards.

A loop over layers that gave back a whole ring a layer would copy the rings at every call, at every
token when decoding. So a stack lends its rings (`lend`): attention then hands back what is to be
appended, `NewTokens`, and the stack writes those of all layers in place (`settle`). Nor does the
loop cut the rings into layers when a single token comes (`keep_whole`, `at_layer`): a kernel reads
a layer's part where it lies. The memory traffic of a token is one reading of the rings.
"""

import dataclasses
from typing import Any

import jax

from longctx_jax.nn.kv_cache import KVCache, NewTokens, extend


def lend(caches: Any, *, stays_whole: bool = False) -> Any:
    """Returns a tree of caches whose rings will be settled: see the head of this file.

    Args:
        caches: of all layers.
        stays_whole: whether the loop over layers is to use `keep_whole`. For single tokens: with
            more of them the copy of a layer's keys is little beside the work on them.
    """
    changes = {"is_lent": True, "stays_whole": stays_whole}
    return _map_rings(lambda ring: dataclasses.replace(ring, **changes), caches)


def settle(before: Any, after: Any) -> Any:
    """Returns the caches after a call with lent rings.

    Args:
        before: the caches that were lent, with any leading axes.
        after: what came back for them: NewTokens or a ring in the place of each.
    """

    def take_back(ring: KVCache, new: NewTokens | KVCache) -> KVCache:
        if isinstance(new, KVCache):
            return dataclasses.replace(new, is_lent=False, stays_whole=False)
        write = extend
        for _ in range(ring.key.ndim - 4):
            write = jax.vmap(write)
        return write(ring, new.key, new.value, new.documents)

    return _map_rings(take_back, before, after)


def keep_whole(caches: Any) -> tuple[Any, list[tuple[jax.Array, jax.Array]]]:
    """Takes keys and values out of rings that stay whole, before a loop over layers.

    Returns:
        What the loop may cut into layers, and keys and values in the order of the rings.
    """
    whole = []

    def take(ring: KVCache) -> KVCache:
        if not ring.stays_whole:
            return ring
        whole.append((ring.key, ring.value))
        return dataclasses.replace(ring, key=None, value=None)

    return _map_rings(take, caches), whole


def at_layer(caches: Any, whole: list[tuple[jax.Array, jax.Array]], layer: jax.Array) -> Any:
    """Returns the caches of a layer, cut by a loop, with keys and values of all layers again.

    Args:
        caches: of the layer.
        whole: as `keep_whole` returned them.
        layer: number of the layer in them.
    """
    rest = iter(whole)

    def give(ring: KVCache) -> KVCache:
        if not ring.stays_whole:
            return ring
        key, value = next(rest)
        return dataclasses.replace(ring, key=key, value=value, layer=layer)

    return _map_rings(give, caches)


def _map_rings(change, tree, *others):
    def is_ring(node):
        return isinstance(node, KVCache)

    def at(node, *nodes):
        return change(node, *nodes) if is_ring(node) else nodes[0] if nodes else node

    return jax.tree.map(at, tree, *others, is_leaf=is_ring)
