"""Models: stacks of blocks behind one interface. `build_model(config.model)` makes a `Decoder`."""

from longctx_jax.models.registry import build_model

__all__ = ["build_model"]
