"""What is read from run folders, whole and damaged, and how patterns find them."""

import json
import math
import os
import time

import pytest

from longctx_jax.reporting import discovery, files, runs

NOW_S = time.time()


def load(folder):
    return runs.load_run(folder, folder.name, NOW_S)


def test_a_finished_run_is_read_whole(tmp_path, run_maker):
    run = load(run_maker(tmp_path / "a"))
    assert (run.status, run.notes, len(run.records)) == ("finished", (), 5)
    assert run.config["model.d_model"] == 64 and run.result["bits_per_byte"] == 3.0
    assert run.last("loss") == 3.25 and math.isnan(run.last("learning_rate"))
    assert run.is_bytes and run.n_parameters is None


def test_a_torn_line_costs_itself_and_is_noted(tmp_path, run_maker):
    folder = run_maker(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "loss": 1')
    run = load(folder)
    assert len(run.records) == 5
    assert run.notes == ("metrics.jsonl: 1 of 6 lines hold no JSON object",)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"step": 1, "a": ' + b'{"b": ' * 900 + b"1" + b"}" * 901,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1e400}',
        b"[1, 2]",
    ],
    ids=["not_utf8", "torn_lists", "deep", "digits", "bool", "negative", "infinite", "list"],
)
def test_lines_that_are_no_records_are_skipped(tmp_path, run_maker, line):
    folder = run_maker(tmp_path / "a")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    run = load(folder)
    assert len(run.records) == 5 and len(run.notes) == 1


def test_values_that_are_no_measurements_become_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": {10**400}, "a": 1e300, "b": NaN, "c": "text", "d": true}}\n'
    )
    (record,) = load(tmp_path).records
    assert record["step"] == 1 and all(math.isnan(record[name]) for name in ("loss", "a", "b"))
    assert "c" not in record


def test_files_are_read_up_to_their_limits(tmp_path, run_maker, monkeypatch):
    folder = run_maker(tmp_path / "a")
    size = (folder / "metrics.jsonl").stat().st_size
    objects, notes = files.read_lines(folder / "metrics.jsonl", max_bytes=size - 5)
    assert len(objects) == 4 and len(notes) == 2 and "only the first" in notes[0]
    assert "not read" in files.read_object(folder / "config.json", max_bytes=5)[1][0]
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    assert len(files.read_lines(folder / "metrics.jsonl")[0]) == 1  # the evaluation


def test_missing_and_strange_files_are_noted(tmp_path):
    os.mkfifo(tmp_path / "config.json")  # reading it would never end
    (tmp_path / "DONE.json").write_text("[]")
    run = load(tmp_path)
    assert run.status == "unfinished" and run.records == ()
    assert run.notes == (
        "config.json is missing",
        "metrics.jsonl is missing",
        "DONE.json holds no whole JSON object",
    )


def test_status_tells_running_failed_and_unfinished_apart(tmp_path, run_maker):
    folder = run_maker(tmp_path / "a")
    (folder / "DONE.json").unlink()
    assert load(folder).status == "running"
    os.utime(folder / "metrics.jsonl", (0, NOW_S - runs.RUNNING_S - 1))
    assert load(folder).status == "unfinished"
    log = folder / "log.txt"
    log.write_text("$ python -m scripts.train\nerror: loss and gradient must be finite\n")
    assert load(folder).status == "failed" and "must be finite" in load(folder).notes[-1]
    with log.open("a") as file:
        file.write("$ python -m scripts.train\nstep=10/40 loss=3\n")  # another attempt
    assert load(folder).status == "unfinished"


def test_samples_are_the_newest_cut_to_a_length(tmp_path, run_maker):
    folder = run_maker(tmp_path / "a")
    lines = [{"step": n, "prompt": "p", "text": f"text {n}"} for n in range(30)]
    lines += [{"step": 31, "text": "x" * 10_000}, {"prompt": "without a step"}, "no object"]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load(folder)
    assert [s.step for s in run.samples] == [*range(11, 30), 31]
    assert run.samples[-1].prompt == "" and len(run.samples[-1].text) < 4_010
    assert len(run.notes) == 3


def test_parameters_are_counted_from_the_checkpoint_description(tmp_path, run_maker):
    folder = run_maker(tmp_path / "a")

    def leaf(name, shape):
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape}
        return {"key_metadata": [{"key": name}], "value_metadata": value}

    for step in (5, 40):
        state = folder / "checkpoints" / str(step) / "state"
        state.mkdir(parents=True)
        leaves = {"a": leaf("params", [step, 10]), "b": leaf("params", [2]), "c": leaf("opt", [7])}
        (state / "_METADATA").write_text(json.dumps({"tree_metadata": leaves}))
    assert load(folder).n_parameters == 402
    (state / "_sharding").write_text('{"a": "NamedSharding"}')
    assert load(folder).n_parameters is None
    (state / "_sharding").unlink()
    (state / "_METADATA").write_text('{"tree_metadata": {"a": {"key_metadata": []}}}')
    assert load(folder).n_parameters is None


def test_patterns_find_runs_sweeps_and_names_with_commas(tmp_path, run_maker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/plain", "runs/lr/a=1,b=2", "runs/lr/a=1,b=3", "runs/[odd]"):
        run_maker(tmp_path / name)
    (tmp_path / "runs/report").mkdir()

    def names(patterns):
        return [folder.as_posix() for folder in discovery.find_runs(patterns)]

    everything = ["runs/[odd]", "runs/lr/a=1,b=2", "runs/lr/a=1,b=3", "runs/plain"]
    assert names("runs") == names("runs/*") == everything
    assert names("runs/lr/a=1,b=3,runs/plain") == ["runs/lr/a=1,b=3", "runs/plain"]
    assert names("runs/plain,runs/lr") == ["runs/plain", *everything[1:3]]
    assert names("runs/[odd]") == ["runs/[odd]"]
    short = discovery.short_names([tmp_path / name for name in ("runs/plain", "other/plain")])
    assert short == ["runs/plain", "other/plain"]


@pytest.mark.parametrize(
    ("patterns", "why"),
    [("nothing*", "matches nothing"), ("empty", "holds none"), ("", "matches nothing")],
)
def test_a_pattern_without_runs_is_refused(tmp_path, monkeypatch, patterns, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"--runs must .*got '{patterns[:5]}.*{why}; give"):
        discovery.find_runs(patterns)
