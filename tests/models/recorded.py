"""What tiny models of every kind compute: parameter trees, losses of an update, saved beside it.

    python -m tests.models.recorded        # writes recorded.json anew

A difference means that models, configs or checkpoints changed their meaning. Write it anew only if
that was intended, and say so in the commit.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from longctx_jax.models import build_model
from longctx_jax.training.state import init_state
from longctx_jax.training.step import make_train_step
from tests.models.tiny_models import MODELS, TINY

FILE = pathlib.Path(__file__).resolve().with_name("recorded.json")
BATCH, SEQ = 2, 12
MEMORY = {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4}
ARMT = {"name": "recurrent_memory", "memory": MEMORY}
CASES = {
    **MODELS,
    "armt": ARMT,
    "armt_diagonal": {**ARMT, "schedule": "diagonal", "memory": {**MEMORY, "n_heads": 2}},
    "armt_among_others": {"pattern": ("armt", "sliding"), "memory": MEMORY},
    "rmt": {**ARMT, "memory": {**MEMORY, "kind": "rmt"}},
    "layerwise_vq": {
        **ARMT,
        "memory": {**MEMORY, "kind": "layerwise", "mixer": "vq"},
        "vq": {"codebook_size": 7, "window_len": 5},
    },
    "stagformer_shared": {
        "name": "stagformer",
        "stagformer": {"share_weights": True, "cross_window": 3, "combine": "linear"},
    },
    "inattention_narrow": {
        "name": "inattention",
        "inattention": {"score_position": "decoupled", "d_rotary": 4, "d_memory": 6},
    },
    "dropout": {"dropout": 0.2, "layer_drop": 0.1, "embed_dropout": 0.1, "norm": "layer"},
}


def record(name: str) -> dict:
    """Returns the parameters' paths and shapes, and what one update of plain descent computes."""
    model = build_model({**TINY, **CASES[name]})
    variables = model.init(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    tree = {jax.tree_util.keystr(p, simple=True, separator="/"): list(x.shape) for p, x in leaves}
    tokens = np.random.default_rng(1).integers(0, TINY["vocab_size"], (BATCH, SEQ + 1), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((BATCH, SEQ), np.float32),
        "segment_ids": np.arange(SEQ)[None] // np.array([[5], [7]]),
    }
    batch["segment_ids"] = batch["segment_ids"].astype(np.int32)
    tx = optax.sgd(0.1)
    sizes = {"batch_size": BATCH, "cache_len": 2 * SEQ}
    state = init_state(model, tx, seed=0, use_ema=False, **sizes)
    step = make_train_step(model, tx)
    numbers = []
    for _ in range(2):
        state, metrics = step(state, batch)
        numbers.append({key: float(metrics[key]) for key in ("loss", "grad_norm")})
    norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(state.params))))
    return {"tree": tree, "updates": numbers, "parameter_norm": norm}


def main() -> None:
    """Writes what all models compute."""
    rows = []
    for name in CASES:
        rows.append(f"  {json.dumps(name)}: {json.dumps(record(name))}")
        print(name, flush=True)
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
