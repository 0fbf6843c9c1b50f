"""Trains tiny models of every scheme on the devices at hand and prints their losses as JSON.

    python -m tests.training.mesh_runs FOLDER CASES [PROCESS PORT]

CASES are names of `CASES` with "+" and the mesh of each, e.g. "decay+data,fsdp". PROCESS is 0 or 1
of two that train together.
"""

import json
import pathlib
import sys

import jax

from longctx_jax import data
from longctx_jax.models import build_model
from longctx_jax.runs.evaluate import evaluator
from longctx_jax.runs.train import train_data
from longctx_jax.training.loop import train
from longctx_jax.training.placement import place
from longctx_jax.training.processes import start_processes
from tests.tiny import tiny_config

SCHEMES = {
    "transformer": {"name": "transformer"},
    "dropout": {"name": "transformer", "dropout": 0.1},
    "vq": {
        "name": "transformer_vq",
        "dtype": "float64",
        "vq": {"codebook_size": 8, "window_len": 4},
    },
    "decay": {"name": "decay"},
    "armt": {
        "name": "recurrent_memory",
        "memory": {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4},
    },
    "stagformer": {"name": "stagformer"},
    "inattention": {"name": "inattention"},
    "rwkv": {"name": "transformer", "pattern": ("rwkv",), "mlp": "rwkv"},
    "mamba": {"name": "transformer", "pattern": ("mamba", "softmax"), "mamba": {"head_len": 8}},
    "diagonal": {
        "name": "recurrent_memory",
        "schedule": "diagonal",
        "memory": {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4},
    },
}
MESHES = {
    "one": {},
    "data": {"data": 0},
    "fsdp": {"fsdp": "on"},
    "model": {"data": 2, "model": 0, "fsdp": "on"},
    "sequence": {"data": 2, "sequence": 4},
    "layer": {"data": 4, "layer": 2},
}


def case_config(scheme: str, mesh: str, **fields):
    """Returns the tiny config of a scheme, three steps, spread as named."""
    config = tiny_config(
        model__n_layers=2,
        model__n_heads=4,
        data__global_batch_size=8,
        eval__batch_size=4,
        **({"train__n_steps": 3} | fields),
    )
    with config.unlocked():
        config.model.update(SCHEMES[scheme])
        config.mesh.update(MESHES[mesh])
    return config


def run_case(folder: pathlib.Path, scheme: str, mesh: str, **fields) -> dict[str, float]:
    """Trains and returns the losses by step, and what evaluation found."""
    config = case_config(scheme, mesh, **fields)
    placement = place(config)
    model = placement.model(build_model(config.model))
    splits = data.load_source(config.data)
    workdir = folder / f"{scheme}-{mesh}"
    rows = placement.local_rows(config.data.global_batch_size)
    evaluate = evaluator(config, model, splits, placement.put)
    record = train(
        config,
        workdir,
        model,
        train_data(config, splits, rows),
        evaluate if scheme == "decay" else lambda state: {"bits_per_byte": 0.0},
        placement,
    )
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = {str(r["step"]): r["loss"] for r in records if "loss" in r}
    return losses | {"eval": record["eval"]["bits_per_byte"]}


def main(folder: str, cases: str, process: str = "", port: str = "") -> None:
    """Runs the cases one after another."""
    if process:
        options = {"num_processes": 2, "process_id": int(process)}
        start_processes(coordinator_address=f"localhost:{port}", **options)
    found = {"devices": jax.device_count(), "processes": jax.process_count()}
    for case in cases.split(","):
        scheme, mesh = case.split("+")
        with jax.enable_x64(SCHEMES[scheme].get("dtype") == "float64"):
            found[case] = run_case(pathlib.Path(folder), scheme, mesh)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
