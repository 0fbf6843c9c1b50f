"""Long-context language models in JAX: five published schemes, one contract."""

__version__ = "0.1.0"
