"""Sweeps: combining overrides, naming, command lines, and the pool with a fake training script."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from configs.sweep_tools import chain, product, vary, zipped
from longctx_jax.training import sweep as sweeps

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent

# Stands in for scripts.train: fails, stops early or waits when told to by a config field.
FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
print("training", flags.get("config.mode", "ok"))
def stop(number, frame):
    time.sleep(0.8 if mode == "linger" else 0)
    (workdir / "saved").write_text("checkpoint")
    sys.exit(0)
mode = flags.get("config.mode", "ok")
signal.signal(signal.SIGTERM, stop)
if mode == "fail" and not os.path.exists(workdir / "repaired"):
    sys.exit("error: out of luck")
if mode == "quit":
    sys.exit(0)
if mode in ("wait", "linger"):
    (workdir / "waiting").touch()
    time.sleep(30)
done = {"step": 5, "eval": {"split": "validation", "bits_per_byte": float(flags["config.rate"])}}
(workdir / "DONE.json").write_text(json.dumps(done))
"""


@pytest.fixture
def plan(tmp_path):
    """Plans runs of the fake training script below `tmp_path`."""
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE_TRAIN)

    def make(sweep, settings=None):
        return sweeps.plan_runs(
            sweep,
            tmp_path / "sweep",
            base="configs/base.py",
            settings=settings or {},
            command_prefix=(sys.executable, str(script)),
        )

    return make


def test_product_is_every_combination_last_fastest():
    assert product(vary("a", 1, 2), vary("b", 3, 4)) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]


def test_zipped_pairs_and_chain_concatenates():
    pairs = zipped(vary("a", 1, 2), vary("b", 3, 4))
    assert pairs == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert chain(vary("a", 1), pairs) == [{"a": 1}, *pairs]


def test_combining_refuses_unequal_lengths_and_repeated_fields():
    with pytest.raises(ValueError, match=r"one length: got \[2, 1\]"):
        zipped(vary("a", 1, 2), vary("b", 3))
    for combine in (product, zipped):
        with pytest.raises(ValueError, match="got a twice"):
            combine(vary("a", 1), vary("a", 2))


@pytest.mark.parametrize(
    "overrides, name",
    [
        (
            {"optim.learning_rate": 1e-3, "model.name": "decay"},
            "model.name=decay,optim.learning_rate=0.001",
        ),
        ({"a": 1e-5, "b": True, "c": ("decay", "softmax"), "d": ()}, None),
        ({}, "base"),
    ],
)
def test_run_name(overrides, name):
    expected = name or "a=1e-05,b=true,c=decay+softmax,d=none"
    assert sweeps.run_name(overrides) == expected
    assert sweeps.run_name(dict(reversed(overrides.items()))) == expected


def test_run_names_are_safe_short_and_distinct():
    unsafe = [sweeps.run_name({"data.files": text}) for text in ("a/b c", "a-b-c", "a b/c")]
    long = [sweeps.run_name({f"field_{i}": i for i in range(n)}) for n in (60, 61)]
    assert len({*unsafe, *long}) == 5
    for name in (*unsafe, *long):
        assert len(name) <= sweeps.MAX_NAME_LEN and not set(name) & set("/ '\"()$&")


@pytest.mark.parametrize(
    "value, text",
    [
        (1e-3, "0.001"),
        (3, "3"),
        (True, "true"),
        ("decay", "decay"),
        (("a",), "('a',)"),
        ([1, 2], "(1, 2)"),
        ((), "()"),
    ],
)
def test_config_flag(value, text):
    assert sweeps.config_flag("x.y", value) == f"--config.x.y={text}"


def test_config_flags_reach_the_config_with_their_types():
    values = {"model.pattern": ("decay",), "log.wandb": True, "optim.learning_rate": 1e-3}
    flags = [sweeps.config_flag(field, value) for field, value in values.items()]
    code = (
        "from scripts import common; C = common.config_flag();"
        "common.run(lambda _: print((C.value.model.pattern, C.value.log.wandb,"
        " C.value.optim.learning_rate)))"
    )
    command = [sys.executable, "-c", code, "--config=configs/base.py", *flags]
    out = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "(('decay',), True, 0.001)"


def test_config_flag_refuses_what_no_flag_can_carry():
    with pytest.raises(TypeError, match=r"got a=\{\} \(dict\)"):
        sweeps.config_flag("a", {})


@pytest.mark.parametrize("text", ["config.a.b=1=2", "a.b=1=2", "--config.a.b=1=2"])
def test_parse_setting(text):
    assert sweeps.parse_setting(text) == ("a.b", "1=2")


def test_parse_setting_needs_a_value():
    with pytest.raises(ValueError, match=r"takes config\.field=value: got 'a\.b'"):
        sweeps.parse_setting("a.b")


def test_plan_has_one_command_a_run_and_refuses_doubles(plan):
    run = plan(vary("rate", 1), settings={"train.seed": "3"})[0]
    assert run.command[2:] == (
        "--config=configs/base.py",
        f"--workdir={run.workdir}",
        "--config.rate=1",
        "--config.train.seed=3",
    )
    with pytest.raises(ValueError, match="rate=1 occurs twice"):
        plan(vary("rate", 1, 1))
    with pytest.raises(ValueError, match="swept field: got rate"):
        plan(vary("rate", 1), settings={"rate": "3"})
    with pytest.raises(ValueError, match="at least one run"):
        plan([])


def test_a_folder_keeps_its_settings(plan, tmp_path):
    first = plan(vary("rate", 1), settings={"train.seed": "3"})
    sweeps.save_plan(first, tmp_path / "sweep")
    sweeps.check_plan(first, tmp_path / "sweep")
    sweeps.check_plan(plan(vary("rate", 2)), tmp_path / "sweep")  # another run may join
    with pytest.raises(ValueError, match=r"with --config\.train\.seed=3, now has --config.*=4"):
        sweeps.check_plan(plan(vary("rate", 1), settings={"train.seed": "4"}), tmp_path / "sweep")


def test_pool_goes_on_after_a_failure_and_a_second_call_resumes(plan):
    runs = plan(chain(vary("mode", "fail", "quit"), vary("rate", 1.5)), settings={"train.n": "1"})
    runs[0].workdir.mkdir(parents=True)
    lines = []
    outcomes = sweeps.run_pool(runs, 2, lines.append)
    assert list(outcomes.values()) == ["failed", "incomplete", "finished"]
    assert "error: out of luck" in sweeps.log_tail(runs[0])
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        ["started"] * 3 + ["failed", "incomplete", "finished"]
    )
    assert sweeps.result(runs[2])["bits_per_byte"] == 1.5
    assert sweeps.result(runs[0]) is None


def test_pool_keeps_to_its_number_of_processes(plan):
    runs = plan(vary("rate", 1, 2, 3))
    active, most = 0, 0

    def count(line):
        nonlocal active, most
        active += 1 if line.startswith("started") else -1
        most = max(most, active)

    assert set(sweeps.run_pool(runs, 2, count).values()) == {"finished"}
    assert most == 2


def test_termination_reaches_the_runs_which_save(plan):
    runs = plan(vary("mode", "wait", "linger", "ok"))
    waiting = [run.workdir / "waiting" for run in runs[:2]]

    def terminate_when_ready():
        while not all(path.exists() for path in waiting):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate_when_ready)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    outcomes = sweeps.run_pool(runs, 2, lambda line: None)
    thread.join()
    assert list(outcomes.values()) == ["interrupted", "interrupted", "not started"]
    assert all((run.workdir / "saved").exists() for run in runs[:2])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("text", ["", '{"step": 1', "[]"])
def test_a_torn_done_file_is_not_finished(plan, text):
    run = plan(vary("rate", 1))[0]
    run.workdir.mkdir(parents=True)
    (run.workdir / "DONE.json").write_text(text)
    assert sweeps.result(run) is None


def test_summary_has_overrides_status_and_results(plan, tmp_path):
    runs = plan(chain(vary("rate", 1.25), vary("mode", "fail")))
    rows = sweeps.summary_rows(runs, sweeps.run_pool(runs, 2, lambda line: None))
    fields = sweeps.swept_fields(runs)
    sweeps.write_csv(rows, fields, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["rate"], first["status"], first["bits_per_byte"]) == ("1.25", "finished", "1.25")
    assert (second["mode"], second["status"], second["bits_per_byte"]) == ("fail", "failed", "")
    table = sweeps.format_table(rows, [*fields, "status", "bits_per_byte"]).splitlines()
    assert table[1].split() == ["1.25", "-", "finished", "1.25"]


class TestScript:
    """`python -m scripts.sweep`, with everything but training."""

    def run(self, tmp_path, *arguments, sweep="configs/sweeps/quickstart_lr.py"):
        command = [sys.executable, "-m", "scripts.sweep", f"--sweep={sweep}"]
        command += [f"--workdir={tmp_path / 'out'}", "--config=configs/base.py", *arguments]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)

    def test_dry_run_prints_commands_and_starts_nothing(self, tmp_path):
        done = self.run(tmp_path, "--dry_run", "--set=config.train.seed=2")
        assert done.returncode == 0, done.stderr
        commands = [line for line in done.stdout.splitlines() if "scripts.train" in line]
        assert len(commands) == 6 and all("--config.train.seed=2" in line for line in commands)
        assert not (tmp_path / "out").exists()

    def test_finished_runs_are_summarised_without_training(self, tmp_path):
        listed = self.run(tmp_path, "--dry_run").stdout
        for rate, line in enumerate(listed.splitlines()[:6]):
            folder = pathlib.Path(line.split("--workdir=")[1].split(" ")[0])
            folder.mkdir(parents=True)
            done = {"step": 100, "eval": {"bits_per_byte": 2.0 + rate}}
            (folder / "DONE.json").write_text(json.dumps(done))
        done = self.run(tmp_path)
        assert done.returncode == 0, done.stderr
        assert "6 finished, 0 to run" in done.stdout
        assert (tmp_path / "out" / "summary.png").stat().st_size > 5_000
        assert len((tmp_path / "out" / "summary.csv").read_text().splitlines()) == 7

    @pytest.mark.parametrize(
        "content, text",
        [
            ("BASE = 'configs/base.py'", "lacks get_sweep"),
            ("def get_sweep(): return []", "lacks BASE"),
            ("BASE = ''\ndef get_sweep(): return 3", "must return a list of dicts"),
            ("BASE = ''\ndef get_sweep(): return [{'optim.lerning_rate': 1}]", "learning_rate"),
        ],
    )
    def test_a_wrong_sweep_file_is_one_paragraph(self, tmp_path, content, text):
        path = tmp_path / "s.py"
        path.write_text(content)
        done = self.run(tmp_path, sweep=str(path))
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and text in done.stderr
        assert "Traceback" not in done.stderr
