"""Trains a model and saves it.

    python -m scripts.train --config=configs/NAME.py --workdir=DIR [--config.field=value ...]
        [--plan_only [--plan_devices=N] [--plan_memory_gb=G]]
        [--coordinator_address=HOST:PORT --num_processes=N --process_id=I]

Started again with the same command, it resumes; SIGTERM saves and exits 0. It uses all devices, of
all processes that a cluster or the flags speak of (docs/distributed.md); --plan_only says how, for
any number of devices, and trains nothing.
"""

import json
import sys

from absl import flags

from scripts import common

CONFIG = common.config_flag()
WORKDIR = common.workdir_flag()
PLAN_ONLY = flags.DEFINE_bool("plan_only", False, "Say how the run would be spread, and stop.")
PLAN_DEVICES = flags.DEFINE_integer(
    "plan_devices", 0, "With --plan_only: of so many devices; 0 = those that are here."
)
PLAN_MEMORY_GB = flags.DEFINE_float(
    "plan_memory_gb", 0.0, "With --plan_only: memory of a device; 0 = as they tell."
)
DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "on", "off"], "Whether other processes take part in the run."
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", "", "host:port of process 0; '' = from the environment."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "0 = from the environment.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "From 0; -1 = from the environment.")


def main(arguments: list[str]) -> None:
    """Trains, evaluates, saves; prints the final record as one JSON line."""
    del arguments
    from longctx_jax import data
    from longctx_jax.models import build_model
    from longctx_jax.runs.evaluate import evaluator
    from longctx_jax.runs.sample import sampler
    from longctx_jax.runs.train import train_data
    from longctx_jax.training.loop import train
    from longctx_jax.training.placement import place
    from longctx_jax.training.plan import plan_here, run_line
    from longctx_jax.training.processes import is_main_process, start_processes

    config, mixers = CONFIG.value, common.mixers()
    if PLAN_ONLY.value:
        model = build_model(config.model, mixers)
        print(plan_here(config, model, PLAN_DEVICES.value, PLAN_MEMORY_GB.value).table())
        return
    start_processes(
        DISTRIBUTED.value,
        coordinator_address=COORDINATOR_ADDRESS.value,
        num_processes=NUM_PROCESSES.value,
        process_id=PROCESS_ID.value,
    )
    placement = place(config)
    model = build_model(config.model, mixers)
    if is_main_process() and (line := run_line(config, model, placement)):
        print(line, file=sys.stderr, flush=True)
    model = placement.model(model)
    splits = data.load_source(config.data)
    rows = placement.local_rows(config.data.global_batch_size)
    record = train(
        config,
        WORKDIR.value,
        model,
        train_data(config, splits, rows),
        evaluator(config, model, splits, placement.put),
        placement,
        sampler(config, model),
    )
    if is_main_process():
        print(json.dumps(record))


if __name__ == "__main__":
    common.run(main)
