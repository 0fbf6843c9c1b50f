"""Accuracy of recall by distance: python -m scripts.recall --workdir=RUN[,RUN] --out=FILE.jsonl.

RUN is the work directory of a run trained on a recall task, or a folder of them. Each run answers
one question a row, in held-out rows of each number of segments (those before the question's),
with the question's fact at any distance. Writes a JSON line a run, length and bin of distances, and
draws FILE with .png from all lines of FILE.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from longctx_jax import run_files
from scripts import common

_WORKDIR = flags.DEFINE_list("workdir", None, "Runs, or folders of runs.", required=True)
_OUT = flags.DEFINE_string("out", "runs/recall.jsonl", "JSON-lines file; its figure beside it.")
_SEGMENTS = flags.DEFINE_list(
    "segments", ["1", "2", "4", "8", "16"], "Segments before the question's: lengths of the rows."
)
_N_ROWS = flags.DEFINE_integer("n_rows", 200, "Rows a length.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Rows at a time.", lower_bound=1)
_WINDOW_LEN = flags.DEFINE_integer(
    "window_len", 0, "Bytes a call; 0 = whole segments of the model, about 256.", lower_bound=0
)
_STEP = flags.DEFINE_integer("step", -1, "Checkpoint to evaluate; -1 = the newest.")
_SPLIT = flags.DEFINE_string("split", "test", "validation or test.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the text; '' = as in training.")
WINDOW_LEN = 256
BIN = ("is_total", "distance_segments_min", "distance_segments_max")  # which rows of a length


def numbers_of_segments() -> list[int]:
    """Returns the numbers asked for.

    Raises:
        UsageError: if one of them is no number above 0.
    """
    for text in _SEGMENTS.value:
        if not text.isdigit() or int(text) < 1:
            raise common.UsageError(f"--segments must be numbers of at least 1: got {text}")
    return sorted(map(int, _SEGMENTS.value))


def window_len(model: Any) -> int:
    """Returns the bytes a call that was asked for, else about `WINDOW_LEN`."""
    if _WINDOW_LEN.value:
        return _WINDOW_LEN.value
    unit = model.memory.segment_len if model.recurrence != "none" else 1
    return max(1, WINDOW_LEN // unit) * unit


def model_name(model: Any) -> str:
    """Returns what the figure calls a model: its memory, else its mixers."""
    kinds = list(dict.fromkeys(model.pattern))
    return model.recurrence if model.recurrence != "none" else "-".join(kinds)


def measure(folder: pathlib.Path, lengths: list[int]) -> list[tuple[dict, dict]]:
    """Returns (case, measured) of the run in `folder`: for each length all questions, then bins."""
    import jax

    from longctx_jax import data
    from longctx_jax.evaluation import recall
    from longctx_jax.runs.evaluate import warn_of_other_segments

    run = common.restore_run(str(folder), _STEP.value)
    config, model = run.config, run.model.config
    if config.data.name not in data.RECALL_NAMES:
        raise ValueError(
            f"scripts.recall needs a run trained on one of {data.RECALL_NAMES}: {folder} was "
            f"trained on config.data.name={config.data.name!r}; name another run"
        )
    warn_of_other_segments(config, run.model)
    fields = config.data.recall
    n_trained = config.data.seq_len // fields.segment_len - 1
    trained = {
        "train_n_segments": n_trained,
        "train_max_distance": min(fields.max_distance_segments or n_trained, n_trained),
        "train_tokens": run.step * config.data.seq_len * config.data.global_batch_size,
        "n_parameters": sum(x.size for x in jax.tree.leaves(run.variables["params"])),
    }
    config.data.data_dir = _DATA_DIR.value or config.data.data_dir
    fields.max_distance_segments, fields.n_questions, fields.n_rows = 0, 1, _N_ROWS.value
    streams = {}
    for n_segments in lengths:  # all of them first: a length that is impossible costs no time
        config.data.seq_len = (n_segments + 1) * fields.segment_len
        streams[n_segments] = data.load_source(config.data)[_SPLIT.value]
    rows = []
    for n_segments, stream in streams.items():
        assert isinstance(stream, data.RowStream)
        batches = data.RowBatches(stream, _N_ROWS.value, _BATCH_SIZE.value, window_len(model))
        losses, scored = recall.evaluate_rows(run.model, run.variables, batches)
        about = {
            "suite": "recall",
            "data": config.data.name,
            "split": _SPLIT.value,
            "run": folder.name,
            "model": model_name(model),
            "pattern": model.pattern,
            "n_segments": n_segments,
            "row_len": stream.task.row_len,
            "segment_len": fields.segment_len,
            "step": run.step,
            **trained,
        }
        found = recall.accuracy_rows(scored, stream.task.chance)
        total = dict(found[0])
        found[0]["nats_per_token"] = losses["nats_per_token"]
        for row in found:
            case = about | {name: row.pop(name) for name in BIN}
            rows.append((case, row))
        print(
            f"{folder.name} {n_segments} segments: accuracy {total['accuracy']:.3f} "
            f"({total['accuracy_low']:.3f} .. {total['accuracy_high']:.3f}) of {total['n']}, "
            f"guess {max(total['chance'], total['trivial']):.3f}",
            file=sys.stderr,
        )
    return rows


def main(arguments: list[str]) -> None:
    """Measures every run, records, draws."""
    del arguments
    lengths = numbers_of_segments()
    if _SPLIT.value not in ("validation", "test"):
        raise common.UsageError(f"--split must be validation or test: got {_SPLIT.value}")
    from longctx_jax.benchmarking import environment, rows
    from longctx_jax.figures.recall import draw_recall
    from longctx_jax.figures.saving import save

    command = environment.command_line("scripts.recall", sys.argv[1:])
    where = environment.environment(command)
    out = pathlib.Path(_OUT.value)
    n_rows = 0
    for folder in run_files.find_runs(_WORKDIR.value):
        found = [rows.make(*row, where) for row in measure(folder, lengths)]
        rows.append(out, found)
        n_rows += len(found)
    picture = out.with_suffix(".png")
    save(draw_recall(rows.recorded(out)), picture, out)
    print(f"wrote {n_rows} rows to {out}, and {picture}")


if __name__ == "__main__":
    common.run(main)
