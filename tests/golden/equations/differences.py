"""Derivatives of a transcription, by differences, against gradients."""

import jax
import numpy as np

from tests.helpers import make_normal

# Short ones do not step over kinks of relu, and suit stiff functions; long ones suit functions that
# cancel. The next is tried where one is not close enough.
STEPS = (5e-6, 5e-5, 2e-6)


def derivative(function, step):
    """Returns d/dh function(h) at 0: central differences, extrapolated to step 0 (Richardson)."""

    def central(h):
        return (function(h) - function(-h)) / (2.0 * h)

    return (4.0 * central(step) - central(2.0 * step)) / 3.0


def check_gradients(loss, arguments, gradients, tolerance):
    """Compares derivatives along a random direction of each leaf, and of all, with gradients.

    Args:
        loss: function of a tree like arguments; evaluated four times a leaf or more.
        arguments: float64 numpy arrays.
        gradients: a tree like arguments.
        tolerance: relative to the derivative; where that is near 0 by chance, to 3% of the RMS of
            all leaves' derivatives.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(arguments)
    values = [leaf for _, leaf in paths]
    directions = [make_normal(100 + i, *leaf.shape) for i, leaf in enumerate(values)]
    leaves = jax.tree.leaves(gradients)
    slopes = [np.sum(np.asarray(g) * d) for g, d in zip(leaves, directions, strict=True)]
    floor = 0.03 * np.sqrt(np.mean(np.square(slopes)))

    def check(name, moved, slope):
        def at(h):
            steps = [h * d if i in moved else 0.0 for i, d in enumerate(directions)]
            return loss(
                jax.tree.unflatten(tree, [v + s for v, s in zip(values, steps, strict=True)])
            )

        errors = []
        for step in STEPS:
            errors.append(abs(derivative(at, step) - slope) / max(abs(slope), floor))
            if errors[-1] <= tolerance:
                return
        raise AssertionError(f"{name}: gradient {slope}, errors by step {errors}")

    for i, (path, _) in enumerate(paths):
        check(jax.tree_util.keystr(path), {i}, slopes[i])
    check("all", set(range(len(values))), sum(slopes))
