"""What a half of a block adds, dropped at random: by numbers, and all that a row gets."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def drop(
    module: nn.Module, x: jax.Array, rate: float, layer_rate: float, *, train: bool
) -> jax.Array:
    """Returns x [batch, ...] with numbers and whole rows left out, the rest scaled up.

    Args:
        module: whose stream "dropout" the random numbers come from.
        x: what is added to the residual stream.
        rate: probability of a number.
        layer_rate: probability of a row.
        train: False = x.
    """
    if not train:
        return x
    row = (x.shape[0], *[1] * (x.ndim - 1))
    for probability, shape in ((rate, x.shape), (layer_rate, row)):
        if probability > 0.0:
            keep = 1.0 - probability
            mask = jax.random.bernoulli(module.make_rng("dropout"), keep, shape)
            x = jnp.where(mask, x / keep, 0).astype(x.dtype)
    return x
