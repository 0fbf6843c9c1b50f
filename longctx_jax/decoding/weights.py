"""Weights for decoding in a narrow dtype: cast once, instead of at every token.

Parameters are float32, and each product rounds its matrix to `config.model.dtype`. A token reads
every weight once, so in bfloat16 that is twice the bytes, and a cast a token, for the same result.
Which parameters are rounded, and which are computed with in float32 (gains, rates, biases), is read
off the program that `apply` traces to: a parameter is cast if everything that uses it casts it.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from longctx_jax.models.decoder import Decoder
from longctx_jax.typing import PyTree

# Operations that only move numbers: what is done to their result is done to their first operand.
MOVES = frozenset(
    ("broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "expand_dims", "gather")
    + ("optimization_barrier", "pad", "reshape", "rev", "sharding_constraint", "slice", "squeeze")
    + ("transpose",)
)
CALLS = frozenset(("checkpoint", "closed_call", "custom_jvp_call", "jit", "pjit", "remat2"))


class _Result(NamedTuple):
    """A variable is a result of its jaxpr."""

    place: int


def cast_weights(model: Decoder, variables: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns the variables with those parameters in config.model.dtype that `apply` rounds to it.

    The embedding table is among them: rows are scaled after it then, equal to rounding.

    Cost: one reading of the weights; the same arrays where nothing is narrower.
    """
    dtype = jnp.dtype(model.config.dtype)
    if dtype.itemsize >= 4:
        return variables
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    leaves, tree = jax.tree.flatten(shapes)
    is_cast = _rounded(model, tuple(leaves), tree)
    arrays = jax.tree.leaves(variables)
    cast = [x.astype(dtype) if c else x for x, c in zip(arrays, is_cast, strict=True)]
    return jax.tree.unflatten(tree, cast)


@functools.lru_cache(maxsize=64)
def _rounded(model: Decoder, leaves: tuple[Any, ...], tree: Any) -> tuple[bool, ...]:
    """Returns of each leaf whether it is wider than the model's dtype and all uses round it."""
    variables = jax.tree.unflatten(tree, leaves)
    cache = jax.eval_shape(lambda: model.init_cache(1, 1))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    closed = jax.make_jaxpr(model.apply)(variables, token, cache)
    dtype = jnp.dtype(model.config.dtype)
    n = len(leaves)
    uses = [list(_uses(closed.jaxpr, var)) for var in closed.jaxpr.invars[:n]]
    table = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    return tuple(
        leaf.dtype == jnp.float32
        and (_is_table(path) or (bool(found) and all(use == dtype for use in found)))
        for leaf, path, found in zip(leaves, table, uses, strict=True)
    )


def _is_table(path: Any) -> bool:
    """Whether the leaf is an embedding table or output matrix, which are rounded after scaling."""
    return [getattr(key, "key", None) for key in path[:2]] == ["params", "embed"]


def _uses(jaxpr: core.Jaxpr, var: Any) -> Iterator[Any]:
    """Yields a dtype for each use that casts the variable, and None for each that computes.

    A place among the results, where the variable is one, is a `_Result`.
    """
    for place, out in enumerate(jaxpr.outvars):
        if out is var:
            yield _Result(place)
    for equation in jaxpr.eqns:
        for place, operand in enumerate(equation.invars):
            if operand is not var:
                continue
            name = equation.primitive.name
            if name == "convert_element_type":
                yield equation.params["new_dtype"]
            elif name in MOVES and place == 0:
                yield from _uses(jaxpr, equation.outvars[0])
            elif name in CALLS or name == "scan":
                yield from _uses_inside(jaxpr, equation, place)
            else:
                yield None


def _uses_inside(jaxpr: core.Jaxpr, equation: Any, place: int) -> Iterator[Any]:
    """As `_uses`, of the operand of a call, or of a loop that reads it whole or by slices."""
    is_loop = equation.primitive.name == "scan"
    found = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(found, "jaxpr", found)
    if is_loop and place in _carried(equation, inner):
        yield None
        return
    for use in _uses(inner, inner.invars[place]):
        if not isinstance(use, _Result):
            yield use
        elif is_loop:  # stacked, or carried on: not the weight any more
            yield None
        else:
            yield from _uses(jaxpr, equation.outvars[use.place])


def _carried(equation: Any, inner: core.Jaxpr) -> range:
    """Returns the places of the operands that a loop carries, between its constants and slices.

    By ranks: slices and stacked results have one axis fewer inside. (How the parameters of the
    primitive say it changes with the version of JAX.)
    """
    n_slices = sum(
        _rank(outside) > _rank(within)
        for outside, within in zip(equation.invars, inner.invars, strict=True)
    )
    n_carried = sum(
        _rank(outside) == _rank(within)
        for outside, within in zip(equation.outvars, inner.outvars, strict=True)
    )
    stop = len(equation.invars) - n_slices
    return range(stop - n_carried, stop)


def _rank(var: Any) -> int:
    return len(var.aval.shape)
