"""Associative retrieval by models of about equal size: recurrent memories, and their baselines.

python -m scripts.sweep --sweep=configs/sweeps/recall_models.py --workdir=runs/recall_models
python -m scripts.recall --workdir=runs/recall_models --out=runs/recall_models.jsonl
"""

from configs.sweep_tools import Sweep, chain, product, vary, zipped

BASE = "configs/recall/associative_armt.py"


def get_sweep() -> Sweep:
    """Three kinds of memory; decay, a sliding window of two segments, full attention.

    d_ff makes up for what each has besides or instead of ARMT's memory.
    """
    armt = vary("model.memory.kind", "armt")
    tokens = product(vary("model.memory.kind", "rmt", "layerwise"), vary("model.d_ff", 224))
    decay = zipped(vary("model.name", "decay"), vary("model.d_ff", 203))
    attention = zipped(
        vary("model.name", "transformer", "transformer"),
        vary("model.pattern", ("sliding",), ("softmax",)),
        vary("model.d_ff", 224, 224),
        vary("model.sliding.window_len", 12, 12),
    )
    return chain(armt, tokens, decay, attention)
