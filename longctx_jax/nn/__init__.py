"""Linen modules: they own parameters and call ops. Used through `init` and `apply` only."""
