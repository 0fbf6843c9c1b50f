"""Records what a finished run reached as a row of results/.

    python -m scripts.evaluate --workdir=runs/quickstart --max_bytes=400000 | tee test.json
    python -m scripts.record_run --workdir=runs/quickstart --evaluation=test.json \
        --name=quickstart --out=results/quickstart_cpu.jsonl

Takes the last evaluation, steps and time from the run's records, and the test result from the last
line of what scripts.evaluate printed.
"""

import json
import pathlib
import sys

from absl import flags

from scripts import common

_WORKDIR = common.workdir_flag()
_EVALUATION = flags.DEFINE_string(
    "evaluation", None, "File with what scripts.evaluate printed.", required=True
)
_NAME = flags.DEFINE_string("name", None, "Of the config.", required=True)
_OUT = flags.DEFINE_string("out", None, "JSON-lines file to append to.", required=True)


def measured(workdir: pathlib.Path, evaluation: pathlib.Path) -> dict[str, float]:
    """Returns what the run's records and the evaluation say.

    Raises:
        ValueError: if the run is not finished, or the evaluation is of another step or split.
    """
    from longctx_jax import json_files, run_files
    from longctx_jax.training import metrics

    if not (workdir / run_files.DONE).is_file():
        raise ValueError(
            f"a run must be finished to be recorded: {workdir} has no {run_files.DONE}; train it on"
        )
    records = metrics.read_records(workdir / run_files.METRICS)
    newest = {key: record[key] for record in records for key in record}
    lines = evaluation.read_text().strip().splitlines()
    remedy = "run scripts.evaluate again, and keep what it prints"
    test = json_files.parse_object(lines[-1] if lines else "", str(evaluation), remedy=remedy)
    if (test.get("step"), test.get("split")) != (newest["step"], "test"):
        raise ValueError(
            f"--evaluation must be of the test split at step {newest['step']}: got "
            f"{test.get('split')} at step {test.get('step')}; {remedy}"
        )
    return {
        "validation_bits_per_byte": newest["eval/bits_per_byte"],
        "test_bits_per_byte": test["bits_per_byte"],
        "test_bytes": test["bytes"],
        "n_steps": newest["step"],
        "train_minutes": newest["seconds"] / 60,
        "train_tokens": newest["tokens"],
    }


def main(arguments: list[str]) -> None:
    """Reads, records, prints."""
    del arguments
    found = measured(pathlib.Path(_WORKDIR.value), pathlib.Path(_EVALUATION.value))
    from longctx_jax.benchmarking import environment, rows

    command = environment.command_line("scripts.record_run", sys.argv[1:])
    case = {"suite": "runs", "config": _NAME.value}
    rows.append(_OUT.value, [rows.make(case, found, environment.environment(command))])
    print(json.dumps(found))


if __name__ == "__main__":
    common.run(main)
