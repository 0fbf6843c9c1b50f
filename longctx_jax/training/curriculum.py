"""Short rows first: a batch's rows are cut into equal pieces, fewer and longer as training goes on.

A recurrent memory learns to pass one segment boundary before it learns to pass many (Bulatov et al.
2022; Rodkin et al. 2024). Cutting keeps the tokens of an update and their order in the data.
"""

import bisect
from typing import Any

import numpy as np

from longctx_jax.data.recall import RECALL_NAMES


def check_curriculum(config: Any) -> None:
    """Raises ValueError unless config.train.curriculum_* fit each other and the data."""
    starts, lens = tuple(config.train.curriculum_starts), tuple(config.train.curriculum_lens)
    if len(starts) != len(lens):
        raise ValueError(
            "config.train.curriculum_starts and curriculum_lens must be equally long: got "
            f"{starts} and {lens}; give each start one length"
        )
    if not starts:
        return
    if config.data.name in RECALL_NAMES:
        raise ValueError(
            "config.train.curriculum_lens would cut questions from their facts: got "
            f"{lens} with config.data.name={config.data.name!r}; leave it empty, and go from "
            "short rows to long ones with config.data.seq_len and config.train.init_from"
        )
    if starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise ValueError(
            f"config.train.curriculum_starts must rise from 0: got {starts}; start with step 0"
        )
    for length in lens:
        if length < 1 or config.data.seq_len % length:
            raise ValueError(
                f"config.train.curriculum_lens must divide config.data.seq_len: got {length} and "
                f"{config.data.seq_len}; choose divisors"
            )
    if config.train.carry_cache and config.data.order == "stripes":
        raise ValueError(
            "config.train.curriculum_lens needs rows that start cold: got "
            "config.train.carry_cache=True with data.order='stripes'; set carry_cache to False"
        )


def row_len(config: Any, step: int) -> int:
    """Returns the tokens a row has in the update from `step` to step + 1."""
    starts = tuple(config.train.curriculum_starts)
    stage = bisect.bisect_right(starts, step) - 1
    return config.train.curriculum_lens[stage] if stage >= 0 else config.data.seq_len


def cut_rows(batch: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns the batch with rows [rows, seq] cut into [rows * seq / length, length]."""
    return {name: np.asarray(rows).reshape(-1, length) for name, rows in batch.items()}
