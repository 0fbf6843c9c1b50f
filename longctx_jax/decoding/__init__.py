"""Sampling text from a model."""

from longctx_jax.decoding.generate import NonFiniteLogitsError, generate
from longctx_jax.decoding.weights import cast_weights

__all__ = ["NonFiniteLogitsError", "cast_weights", "generate"]
