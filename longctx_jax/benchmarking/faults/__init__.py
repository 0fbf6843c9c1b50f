"""What happens to a run when something goes wrong: faults injected into real runs, and counted."""

from longctx_jax.benchmarking.faults.cases import FAULTS
from longctx_jax.benchmarking.faults.victims import Outcome, Victims

__all__ = ["FAULTS", "Outcome", "Victims"]
