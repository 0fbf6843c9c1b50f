"""What the pieces of ARMT's memory are for, on associative recall: the paper's ablations.

python -m scripts.sweep --sweep=configs/sweeps/armt_options.py --workdir=runs/armt_options
python -m scripts.recall --workdir=runs/armt_options --segments=3,6,12 --out=runs/armt_options.jsonl

Without the correction a key counts in the normaliser each time it is written; without the
denominator the memory recalls sums, a plain delta rule.
"""

from configs.sweep_tools import Sweep, chain, product, vary

BASE = "configs/recall/associative_armt.py"


def get_sweep() -> Sweep:
    """As published, without the correction, without the denominator."""
    without = product(
        vary("model.memory.use_denominator", False), vary("model.memory.normalize", True)
    )
    return chain(vary("model.memory.correction", True, False), without)
