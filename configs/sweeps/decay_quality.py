"""Decay, gated decay, a hybrid and full attention at equal parameters and tokens, on two texts.

python -m scripts.sweep --sweep=configs/sweeps/decay_quality.py --workdir=runs/decay_quality
python -m scripts.context runs/decay_quality --out=results/decay_quality_cpu.jsonl
"""

from configs.sweep_tools import Sweep, product, vary, zipped

BASE = "configs/decay_quality.py"


def get_sweep() -> Sweep:
    """Four mixers on two texts; d_ff makes up for the parameters of gates."""
    mixers = zipped(
        vary(
            "model.pattern",
            ("softmax",),
            ("decay",),
            ("decay",),
            ("decay", "decay", "decay", "softmax"),
        ),
        vary("model.decay.kind", "retnet", "retnet", "gated", "gated"),
        vary("model.d_ff", 352, 308, 308, 318),
    )
    return product(vary("data.name", "enwik8_4m", "pg19_mini"), mixers)
