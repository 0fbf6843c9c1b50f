"""Learning rate of the two quickstart-size models: 6 short runs, a few minutes each on a laptop.

python -m scripts.sweep --sweep=configs/sweeps/quickstart_lr.py --workdir=runs/quickstart_lr
"""

from configs.sweep_tools import Sweep, product, vary

BASE = "configs/quickstart.py"


def get_sweep() -> Sweep:
    """Three learning rates for each model."""
    return product(
        vary("model.name", "transformer", "decay"),
        vary("optim.learning_rate", 5e-3, 1e-2, 2e-2),
        vary("train.n_steps", 100),
    )
