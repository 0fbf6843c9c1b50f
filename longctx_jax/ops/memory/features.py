"""DPFP: the feature map of the associative memory, non-negative and without parameters.

    r = [relu(u); relu(-u)]                        in R^2m
    phi(u) = [r * roll(r, 1); ...; r * roll(r, nu)]   in R^(2 m nu)
    roll(r, j)_i = r_((i-j) mod 2m)

Source: Schlag, Irie & Schmidhuber (2021), arXiv 2102.11174; Rodkin et al. (2024), arXiv 2407.04841.
"""

import jax
import jax.numpy as jnp

from longctx_jax.typing import Array, Float


def dpfp(x: Float[Array, "*batch width"], nu: int = 3) -> Float[Array, "*batch features"]:
    """Returns the features, 2 nu width of them: all >= 0, and phi(c x) = c^2 phi(x) for c > 0.

    Raises:
        ValueError: if nu is not in 1 .. 2 width - 1: later rolls repeat earlier products.
    """
    if not 1 <= nu < 2 * x.shape[-1]:
        raise ValueError(
            f"dpfp: nu must be in 1 .. 2 width - 1 = {2 * x.shape[-1] - 1}: got {nu}; set "
            "config.model.memory.nu lower or config.model.memory.d_memory higher"
        )
    r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return jnp.concatenate([r * jnp.roll(r, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


def n_features(width: int, nu: int) -> int:
    """Returns how many features `dpfp` gives."""
    return 2 * nu * width
