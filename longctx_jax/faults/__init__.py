"""What happens to a run when something goes wrong: faults injected into real runs, and counted."""

from longctx_jax.faults.cases import FAULTS
from longctx_jax.faults.victims import Outcome, Victims

__all__ = ["FAULTS", "Outcome", "Victims"]
