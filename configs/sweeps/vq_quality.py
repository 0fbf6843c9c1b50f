"""Quantised keys against full attention at equal parameters and tokens; codebook sizes; no cache.

python -m scripts.sweep --sweep=configs/sweeps/vq_quality.py --workdir=runs/vq_quality
python -m scripts.context runs/vq_quality --out=results/vq_quality_cpu.jsonl --lengths=512,2048,8192
"""

from configs.sweep_tools import Sweep, chain, product, vary, zipped

BASE = "configs/vq_quality.py"


def get_sweep() -> Sweep:
    """All on enwik8_4m, also with cold windows and sequences of 4; the main ones on pg19_mini.

    d_ff makes up for the positions' parameters.
    """
    attention = zipped(vary("model.pattern", ("softmax",)), vary("model.d_ff", 352))
    sizes = vary("model.vq.codebook_size", 128, 256, 512, 1024)
    window = zipped(vary("model.vq.codebook_size", 256), vary("model.vq.use_table", False))
    cold = zipped(vary("model.vq.codebook_size", 256), vary("train.carry_cache", False))
    sequences = zipped(vary("model.vq.codebook_size", 256), vary("train.cold_start_every", 4))
    main = chain(attention, vary("model.vq.codebook_size", 512), window)
    return chain(
        product(vary("data.name", "enwik8_4m"), chain(attention, sizes, window, cold, sequences)),
        product(vary("data.name", "pg19_mini"), main),
    )
