"""Depth, windows, sharing and the number of stacks at equal tokens, and the missing control.

python -m scripts.sweep --sweep=configs/sweeps/stagformer_quality.py --workdir=runs/stagformer
python -m scripts.context runs/stagformer --out=results/stagformer_quality_cpu.jsonl

Twelve layers of width 96 everywhere, but for the model of six. d_ff of own weights makes up for
cross-attention, which has 37,000 parameters a layer of an upper stack, 9,000 with a window of 1.
"""

from configs.sweep_tools import Sweep, chain, product, vary, zipped

BASE = "configs/stagformer_quality.py"


def get_sweep() -> Sweep:
    """Eleven models, all with one seed, then all with the other."""
    dense = product(vary("model.name", "transformer"), vary("model.n_layers", 12, 6))
    dense = product(dense, vary("model.d_ff", 328))
    windows = zipped(  # windows of 512 are the whole training context: 0
        vary("model.stagformer.cross_window", 0, 128, 1), vary("model.d_ff", 264, 264, 312)
    )
    shared = product(
        vary("model.stagformer.share_weights", True), vary("model.stagformer.cross_window", 0, 128)
    )
    shared = product(shared, vary("model.d_ff", 264))
    added = product(
        zipped(vary("model.stagformer.share_weights", True), vary("model.d_ff", 328)),
        vary("model.stagformer.handoff", "add"),
    )
    deeper = zipped(vary("model.stagformer.n_stacks", 3, 4), vary("model.d_ff", 242, 232))
    control = product(vary("model.stagformer.stagger", False), vary("model.d_ff", 264))
    models = chain(dense, windows, shared, added, deeper, control)
    return product(vary("train.seed", 0, 1), models)
