"""Sampling text from a model."""

from longctx_jax.decoding.generate import generate

__all__ = ["generate"]
