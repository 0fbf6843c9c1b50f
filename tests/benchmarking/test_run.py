"""The door of all suites: rows, tables, pictures, requests; and what a new suite costs."""

import subprocess
import sys

import pytest

from configs import base
from longctx_jax.benchmarking import decode, registry, rows, run, train
from longctx_jax.benchmarking.suite import Option, Request, RequestError, Suite, checked
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.figures.panels import Group, Lines
from tests.tiny import PROJECT

QUICK = Limits(n_runs=1, n_warmup=0, is_quick=True)
WHERE = {"device": "cpu", "jax_version": "0", "date": "2026-11-22T00:00:00+00:00"}


def measure_tiny(request):
    for seq in request.limits.lengths or (1, 2):
        case = {"name": "tiny", "part": request.parts[0], "seq_len": seq}
        yield rows.make(case, {"median_ms": 1.0 * seq, "tokens_per_s": 5.0, "told": seq})


def tiny_panels(recorded):
    lines = Lines("all", recorded, "seq_len", "median_ms", lambda row: row["name"])
    return [Group([lines])]


TINY = Suite(
    parts=("only",),
    rows=measure_tiny,
    panels=tiny_panels,
    summary=lambda row: f"it took {row['median_ms']} ms" if row["seq_len"] == 2 else "",
    options=(Option("colours", "Which.", words=("red", "blue"), default=("red",)),),
    columns=("told",),
)
DOOR = """
import runpy, sys
from longctx_jax.benchmarking import registry
from tests.benchmarking.test_run import TINY
registry.SUITES["mine"] = TINY
sys.argv[0] = "scripts/benchmark.py"
runpy.run_module("scripts.benchmark", run_name="__main__", alter_sys=True)
"""


def test_a_suite_costs_a_value_and_a_line_of_the_registry(tmp_path):
    out = tmp_path / "mine.jsonl"
    command = [sys.executable, "-c", DOOR, "--suite=mine", "--colours=blue", f"--out={out}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [row["case"] for row in rows.read(out)] == [
        {"suite": "mine", "name": "tiny", "part": "only", "seq_len": n} for n in (1, 2)
    ]
    assert "told" in done.stdout and "it took 2.0 ms" in done.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_suite_declares_what_the_door_needs():
    for name, suite in registry.SUITES.items():
        assert suite.parts and callable(suite.rows), name
        assert suite.summary({"name": "x", "part": suite.parts[0]}) == "", name
        names = [option.name for option in suite.options]
        assert len(set(names)) == len(names), name


def test_requests_are_checked_against_the_suite():
    suites = {"tiny": TINY, "train": train.SUITE}
    request = checked(suites, "tiny", Request(None, QUICK, ()))
    assert (request.parts, request.options) == (("only",), {"colours": ("red",)})
    with pytest.raises(RequestError, match="--colours must be among red, blue .*tiny: got green"):
        checked(suites, "tiny", Request(None, QUICK, (), options={"colours": ["green"]}))
    with pytest.raises(RequestError, match="belongs to --suite=tiny: got --suite=train; leave"):
        checked(suites, "train", Request(None, QUICK, (), options={"colours": ["red"]}))
    with pytest.raises(RequestError, match="--parts must be among only in the suite tiny: got x"):
        checked(suites, "tiny", Request(None, QUICK, ("x",)))
    shapes = {"1b": {}, "160m": {}}
    request = Request(None, QUICK, (), shapes, {"shapes": ["1b"]})
    assert checked({"decode": decode.SUITE}, "decode", request).options == {"shapes": ["1b"]}


def test_pictures_and_tables_show_the_newest_row(tmp_path, without_clock):
    path, picture = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    request = checked(registry.SUITES, "train", Request(base.get_config(), QUICK, ("models",)))
    measured = list(run.measure("train", train.SUITE, request, WHERE, path))
    slow = measured[0]["measured"] | {"median_ms": 50.0, "quartile_3_ms": 60.0}
    again = measured[0] | {"measured": slow}
    rows.append(path, [again])
    (group,) = train.SUITE.panels(rows.recorded(path))
    assert group.panels[0].rows[0]["median_ms"] == 50.0
    run.draw(train.SUITE, path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table, *sentences = run.told(train.SUITE, measured)
    assert "transformer" in table and any("tokens/s for tokens/s" in text for text in sentences)
    assert "decay" in run.progress(rows.flat(measured[4]))


def test_a_picture_is_of_one_suite_and_device(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, [rows.make({"suite": name, "name": "a"}, {}, WHERE) for name in "ab"])
    with pytest.raises(ValueError, match="rows of one suite: got a, b"):
        run.draw(TINY, path, tmp_path / "x.png")
    path.write_text("")
    with pytest.raises(ValueError, match="rows of one suite: got none"):
        run.draw(TINY, path, tmp_path / "x.png")
