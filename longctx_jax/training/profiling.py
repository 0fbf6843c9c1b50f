"""A few steps of a run under JAX's profiler, for TensorBoard or Perfetto."""

import pathlib

import jax

from longctx_jax.typing import PyTree


class ProfilerWindow:
    """Profiles `n_steps` steps from step `first` on, into `folder`; n_steps = 0 does nothing.

    The first step of a run is never in it: it compiles.
    """

    def __init__(self, folder: pathlib.Path, first: int, n_steps: int):
        self._folder, self._first, self._n_steps = folder, max(first, 1), n_steps
        self._is_on = False

    def at(self, step: int) -> None:
        """Says that `step` comes next."""
        if self._n_steps and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def is_over(self, step: int) -> bool:
        """Whether the window is open and ends before `step`."""
        return self._is_on and step >= self._first + self._n_steps

    def close(self, params: PyTree) -> None:
        """Ends the window, if it is open, once `params` have been computed."""
        if self._is_on:
            jax.block_until_ready(params)
            jax.profiler.stop_trace()
            self._is_on = False
