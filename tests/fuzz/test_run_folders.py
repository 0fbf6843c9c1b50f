"""Files of a run's or a sweep's folder: config.json, metrics.jsonl, DONE.json, sweep.json."""

import json
import math

import pytest
from hypothesis import strategies as st

from configs import base, from_run
from longctx_jax import json_files
from longctx_jax.benchmarking import rows
from longctx_jax.models import build_model
from longctx_jax.training import launch, metrics, start
from longctx_jax.training import sweep as sweeps
from tests.fuzz import hostile

CONFIG = start.resolved(base.get_config())
DONE = {"step": 5, "is_finished": True, "eval": {"split": "test", "bits_per_byte": 1.5}}
PLAN = {"rate=1": ["--config=configs/base.py", "--config.rate=1"], "rate=2": []}
RECORD = {"step": 3, "loss": 1.25, "tokens": 4096, "eval/bits_per_byte": None}

pytestmark = pytest.mark.parametrize("n_examples", hostile.SIZES)


@pytest.fixture
def run(tmp_path):
    command = ("train", "--config=configs/base.py", "--config.rate=1")
    return sweeps.Run("rate=1", {"rate": 1}, tmp_path / "rate=1", command)


def test_any_object(tmp_path, n_examples):
    path = tmp_path / "object.json"

    def check(raw):
        path.write_bytes(raw)
        if not hostile.refused(lambda: json_files.read_object(path, remedy="r"), path, "; r"):
            assert isinstance(json.loads(raw), dict)

    hostile.fuzz(n_examples, hostile.json_files({"a": [1, {"b": None}], "c": "d"}), check)


def test_config_of_a_run(tmp_path, n_examples):
    path = tmp_path / "config.json"

    def check(raw):
        path.write_bytes(raw)
        if not hostile.refused(lambda: start.read_config(path), path):
            assert start.read_config(path)["train"]["ema_decay"] is not None
        if not hostile.refused(lambda: from_run.read_config(path), path):
            config = from_run.read_config(path)
            assert type(config.train.n_steps) is int and type(config.model.name) is str
            hostile.refused(lambda: build_model(config.model), "config.model.")

    optim = {"beta1": 10**400}
    always = [json.dumps(CONFIG | {"optim": optim}).encode(), b'{"model": {}, "train": null}']
    hostile.fuzz(n_examples, hostile.json_files(CONFIG), check, always)


def test_model_of_a_config(n_examples):
    def check(fields):
        hostile.refused(lambda: build_model(fields), "config.model.")

    hostile.fuzz(n_examples, hostile.damaged_objects(CONFIG["model"]), check)


def test_records_of_metrics(tmp_path, n_examples):
    path = tmp_path / "metrics.jsonl"
    lines = st.lists(hostile.json_files(RECORD), min_size=1, max_size=4)

    def check(raw):
        path.write_bytes(b"\n".join(raw))
        records = metrics.read_records(path)
        for record in records:
            assert type(record["step"]) is int
            assert all(math.isnan(v) or float(v) == v for v in record.values())
        metrics.JsonLinesWriter(path, resume_step=10).close()
        kept = [r for r in records if r["step"] <= 10]
        assert [str(r) for r in metrics.read_records(path)] == [str(r) for r in kept]

    hostile.fuzz(n_examples, lines, check)


def test_rows_of_results(tmp_path, n_examples):
    path = tmp_path / "rows.jsonl"

    def check(raw):
        path.write_bytes(b'{"a": 1}\n' + raw)
        hostile.refused(lambda: rows.read(path), path, "line")

    hostile.fuzz(n_examples, hostile.json_files(RECORD), check)


def test_end_of_a_run(run, n_examples):
    run.workdir.mkdir()

    def check(raw):
        (run.workdir / "DONE.json").write_bytes(raw)
        rows = sweeps.summary_rows([run], {})
        sweeps.format_table(rows, ["rate", "status", *sweeps.RESULT_COLUMNS])
        sweeps.write_csv(rows, ["rate"], run.workdir / "summary.csv")

    always = [json.dumps({"step": step}).encode() for step in ("\ud800", 10**400, [], {})]
    hostile.fuzz(n_examples, hostile.json_files(DONE), check, always)


def test_plan_of_a_sweep(run, tmp_path, n_examples):
    path = tmp_path / "sweep.json"

    def check(raw):
        path.write_bytes(raw)
        is_refused = hostile.refused(lambda: sweeps.check_plan([run], tmp_path), tmp_path)
        if not is_refused:
            sweeps.save_plan([run], tmp_path)
            assert json.loads(path.read_text())[run.name] == list(run.command[1:])

    hostile.fuzz(n_examples, hostile.json_files(PLAN), check)


def test_jobs_of_a_sweep(tmp_path, n_examples):
    path = tmp_path / "jobs.json"

    def check(raw):
        path.write_bytes(raw)
        if not hostile.refused(lambda: launch._read_jobs(tmp_path), path):
            ids = launch._read_jobs(tmp_path).values()
            assert all(part.isdecimal() for job in ids for part in job.split("_"))

    jobs = {"rate=1": "12_0", "rate=2": "7"}
    always = [json.dumps(jobs | {"rate=2": text}).encode() for text in ("12; rm", "", "-j", "7\n")]
    hostile.fuzz(n_examples, hostile.json_files(jobs), check, always)
