"""One run: what a launcher starts for a config as it is, for instance on several nodes.

python -m scripts.sweep --sweep=configs/sweeps/single.py --config=configs/enwik8/decay_small.py \
    --workdir=runs/decay --launcher=slurm --slurm_nodes=2
"""

from configs.sweep_tools import Sweep

BASE = "configs/quickstart.py"


def get_sweep() -> Sweep:
    """The base config alone."""
    return [{}]
