"""The tables of README and docs: made from results/*.jsonl, and nothing else.

A table stands between `<!-- table: name -->` and `<!-- /table -->`; what the name stands for is a
function from a `Source` to Markdown. A text within a sentence stands between `<!-- value: name -->`
and `<!-- /value -->`. `pages.py` fills them in, python -m scripts.tables runs it.
"""

import functools
from collections.abc import Callable

from longctx_jax.reporting.result_tables import quality, runs, sizes, speed
from longctx_jax.reporting.result_tables.source import Source

Table = Callable[[Source], str]

TABLES: dict[str, Table] = {
    "train": speed.train,
    "vq_layer": speed.vq_layer,
    "vq_more": speed.vq_more,
    "vq_decode": speed.vq_decode,
    "decode_mixers": speed.decode_mixers,
    "decode_initial": speed.decode_initial,
    "prefill_initial": speed.prefill_initial,
    "decode_stacks": speed.decode_stacks,
    "memory_prefill": speed.memory_prefill,
    "decay_quality": quality.decay,
    "vq_quality": quality.vq,
    "inattention_quality": quality.inattention,
    "inattention_quality_enwik8": quality.inattention_enwik8,
    "stagformer_quality": quality.stagformer,
    "longer_context": quality.longer,
    "longer_context_positions": quality.longer_positions,
    "accounting_caches": sizes.caches,
    "accounting_contexts": sizes.contexts,
    "accounting_models": sizes.models,
    "accounting_accuracy": sizes.accuracy,
    "accounting_updates": sizes.updates,
    "recall": runs.recall,
    "recall_members": runs.members,
    "faults": runs.faults,
    "uncommitted": runs.uncommitted,
}

VALUES: dict[str, Table] = {
    "quickstart": runs.quickstart,
    "saves": speed.saves,
    "about caches": sizes.about_caches,
}
VALUES |= {f"cache {n}": functools.partial(sizes.cache_of, name=n) for n in sizes.SCHEMES}
