"""Three updates of every mixer on the devices that are here, spread in every way; prints losses.

python -m tests.laws.mesh NAME[,NAME]
"""

import json
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp

from longctx_jax import data
from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder
from longctx_jax.runs.train import train_data
from longctx_jax.training.loop import train
from longctx_jax.training.metrics import read_records
from longctx_jax.training.placement import place
from tests.laws.cases import MIXERS, config_of
from tests.tiny import PROJECT

MESHES = {"by rows": {"fsdp": "on"}, "by tokens": {"data": 2, "sequence": 4}}


def run_all(names, n_devices):
    """Returns losses by step of each "name spread", found by a process with so many devices."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.laws.mesh", ",".join(names)],
        cwd=PROJECT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(n_devices)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Float64(Decoder):
    """A model of float64 weights: float32 ones would be rounded to others by a sum's order."""

    def init(self, key):
        fresh = super().init(key)
        return {**fresh, "params": jax.tree.map(jnp.float64, fresh["params"])}


def run_case(name, spread):
    """Returns the losses of three updates."""
    config = config_of(name, train__n_steps=3, data__global_batch_size=8)
    config.model.dtype = "float64"  # codes of float32 keys differ by rounding
    if jax.device_count() > 1:
        config.mesh.update(MESHES[spread])
    placement = place(config)
    model = Float64(placement.model(build_model(config.model, MIXERS)).config)
    rows = placement.local_rows(config.data.global_batch_size)
    of_config = train_data(config, data.load_source(config.data), rows)
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder, model, of_config, lambda state: {"bits_per_byte": 0.0}, placement)
        records = read_records(f"{folder}/metrics.jsonl")
    return [record["loss"] for record in records if "loss" in record]


def main(names):
    """Runs every case."""
    found = {}
    with jax.enable_x64(True):
        for name in names.split(","):
            for spread in MESHES:
                found[f"{name} {spread}"] = run_case(name, spread)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
