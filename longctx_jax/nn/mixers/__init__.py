"""Sequence mixers, a file each, which holds all that the rest of the code knows of it."""

from longctx_jax.nn.mixers.registry import MIXERS as MIXERS
