"""A digit hidden in the text of books, by models of about equal size: memories and baselines.

python -m scripts.sweep --sweep=configs/sweeps/recall_models.py --workdir=runs/recall_models
python -m scripts.recall --workdir=runs/recall_models --segments=2,5,10,20,50,100 --n_rows=200 \
    --out=runs/recall_models.jsonl
"""

from configs.sweep_tools import Sweep, chain, product, vary, zipped

BASE = "configs/recall/passkey_armt.py"


def get_sweep() -> Sweep:
    """Three kinds of memory; recurrent mixers; a sliding window of a segment; full attention.

    All train on two segments, for fewer updates than the config's. d_ff makes up for what each has
    besides or instead of ARMT's memory.
    """
    armt = vary("model.memory.kind", "armt")
    tokens = product(vary("model.memory.kind", "rmt", "layerwise"), vary("model.d_ff", 224))
    decay = zipped(vary("model.name", "decay"), vary("model.d_ff", 203))
    mixers = product(vary("model.name", "transformer"), vary("model.sliding.window_len", 48))
    patterns = vary("model.pattern", ("rwkv",), ("mamba",), ("sliding",), ("softmax",))
    widths = vary("model.d_ff", 51, 130, 224, 224)
    models = chain(armt, tokens, decay, product(mixers, zipped(patterns, widths)))
    return product(models, vary("train.n_steps", 300))
