"""InAttention and full attention at equal parameters and tokens, by position scheme.

python -m scripts.sweep --sweep=configs/sweeps/inattention_quality.py --workdir=runs/inattention
python -m scripts.context runs/inattention --out=results/inattention_quality_cpu.jsonl

Numbers of cache a token, float32: full attention 1,024; with one head of 16 (the second model) 128,
as embeddings; narrow embeddings 32; near 0, as counts. d_ff makes up for parameters.
"""

from configs.sweep_tools import Sweep, chain, product, vary, zipped

BASE = "configs/inattention_quality.py"


def get_sweep() -> Sweep:
    """Eight models on pg19_mini, each with two seeds; three of them on enwik8_4m."""
    dense = zipped(
        vary("model.name", "transformer", "transformer"),
        vary("model.n_kv_heads", 4, 1),
        vary("model.n_heads", 4, 8),
        vary("model.d_ff", 352, 427),
    )
    relative = zipped(
        vary("model.inattention.memory_position", "none"),
        vary("model.inattention.score_position", "relative"),
        vary("model.d_ff", 349),
    )
    more = zipped(
        vary("model.inattention.memory_position", "sinusoid", "none", "none"),
        vary("model.inattention.score_position", "relative", "near", "alibi"),
        vary("model.d_ff", 349, 350, 351),
    )
    decoupled = zipped(
        vary("model.inattention.score_position", "decoupled"),
        vary("model.inattention.d_rotary", 16),
        vary("model.d_ff", 328),
    )
    narrow = zipped(vary("model.inattention.d_memory", 32), vary("model.d_ff", 410))
    books = product(chain(dense, relative, more, decoupled, narrow), vary("train.seed", 0, 1))
    wiki = product(vary("data.name", "enwik8_4m"), chain(dense, relative))
    return chain(books, wiki)
