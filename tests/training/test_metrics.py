"""Metric writers: what is on disk after writes, kills and resumes."""

import io
import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest

from longctx_jax.training import metrics


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_on_disk_after_each_write(tmp_path):
    writer = metrics.JsonLinesWriter(tmp_path / "m.jsonl")
    writer.write(20, {"loss": np.float32(1.5), "tokens": 4096})
    assert lines(tmp_path / "m.jsonl") == [{"step": 20, "loss": 1.5, "tokens": 4096.0}]
    writer.close()
    writer.close()


def test_non_finite_numbers_are_strict_json_and_read_as_nan(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics.JsonLinesWriter(path).write(1, {"loss": math.nan, "grad_norm": math.inf})

    def refuse(constant):
        raise AssertionError(f"not strict JSON: {constant}")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "grad_norm": None}
    assert math.isnan(metrics.read_records(path)[0]["loss"])


@pytest.mark.parametrize(
    "resume_step, kept", [(None, [10, 20, 30]), (20, [10, 20]), (0, []), (99, [10, 20, 30])]
)
def test_resume_drops_later_records_and_a_torn_line(tmp_path, resume_step, kept):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"step": {s}, "loss": 1}}\n' for s in (10, 20, 30)) + '{"step": 4')
    writer = metrics.JsonLinesWriter(path, resume_step=resume_step)
    writer.write(40, {})
    assert [record["step"] for record in lines(path)] == [*kept, 40]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]  # no temporary file stays


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n')

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(metrics.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        metrics.JsonLinesWriter(path, resume_step=10)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n'


def test_read_records_skips_what_is_not_a_record(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n[3]\n{"loss": 2}\n\n{"step": 2}\n{"st')
    assert [r["step"] for r in metrics.read_records(path)] == [1, 2]


def test_console_line_order_and_time_left():
    now = [0.0]
    stream = io.StringIO()
    writer = metrics.ConsoleWriter(1000, stream=stream, clock=lambda: now[0])
    for step in (20, 120):
        now[0] = step * 0.5  # half a second a step
        writer.write(
            step, {"tokens": 9.0, "tokens_per_s": 12345.6, "loss": 1.23412, "learning_rate": 3e-4}
        )
    assert stream.getvalue().splitlines() == [
        "step=20/1000 loss=1.234 tokens_per_s=12346 learning_rate=0.0003",
        "step=120/1000 loss=1.234 tokens_per_s=12346 learning_rate=0.0003 eta=7m20s",
    ]


def test_console_time_left_follows_the_recent_speed():
    now = [0.0]
    stream = io.StringIO()
    writer = metrics.ConsoleWriter(2000, stream=stream, clock=lambda: now[0])
    for step in range(100, 2000, 100):
        now[0] += 1000 if step <= 500 else 1  # a slow start is forgotten
        writer.write(step, {})
    assert stream.getvalue().splitlines()[-1] == "step=1900/2000 eta=1s"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.6, "1m00s"), (190, "3m10s"), (7500, "2h05m"), (97200, "1d03h")]
)
def test_format_duration(seconds, text):
    assert metrics.format_duration(seconds) == text


def test_make_writer_writes_everywhere(tmp_path, capsys):
    writer = metrics.make_writer(tmp_path / "run", n_steps=10)
    writer.write(5, {"loss": np.float32(2.0)})
    writer.close()
    assert metrics.read_records(tmp_path / "run" / "metrics.jsonl") == [{"step": 5, "loss": 2.0}]
    events = list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert len(events) == 1 and b"train/loss" in events[0].read_bytes()
    assert capsys.readouterr().err == "step=5/10 loss=2\n"


def test_a_fresh_run_drops_old_records_and_a_resumed_one_keeps_them(tmp_path):
    metrics.make_writer(tmp_path, tensorboard=False).write(0, {"loss": 1.0})
    metrics.make_writer(tmp_path, tensorboard=False).write(0, {"loss": 2.0})
    metrics.make_writer(tmp_path, tensorboard=False, resume_step=7).write(8, {"loss": 3.0})
    records = metrics.read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [(0, 2.0), (8, 3.0)]


def test_composite_closes_all_writers_when_one_fails():
    closed = []

    class Fails:
        def close(self):
            closed.append("fails")
            raise OSError("full")

    class Works:
        def close(self):
            closed.append("works")

    with pytest.raises(OSError, match="full"):
        metrics.CompositeWriter(Fails(), Works()).close()
    assert closed == ["fails", "works"]


def test_missing_wandb_names_the_extra_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="make venv EXTRAS=wandb"):
        metrics.make_writer(tmp_path, wandb=True)
    assert not list(tmp_path.iterdir())


def test_wandb_resumes_the_run_of_the_work_directory(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finish")

    ids = iter(["first", "second"])
    fake = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: next(ids)),
        init=lambda **options: calls.append((options["id"], options["resume"])) or Run(),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer = metrics.make_writer(tmp_path, wandb=True, tensorboard=False, resume_step=1)
        writer.write(3, {"loss": 1.0})
        writer.close()
    assert calls == [("first", "allow"), (3, {"loss": 1.0}), "finish"] * 2


def test_import_loads_neither_jax_nor_a_backend():
    code = (
        "import sys, longctx_jax.training.metrics; "
        "print({'jax', 'flax', 'tensorboardX', 'wandb'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
