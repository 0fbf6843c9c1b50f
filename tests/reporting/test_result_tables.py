"""Tables of README and docs: filled between markers, and equal to what the rows say."""

import json

import pytest

from longctx_jax.benchmarking import rows
from longctx_jax.reporting.result_tables import TABLES, VALUES, pages, source
from tests.command_lines import run_all
from tests.tiny import PROJECT

PAGE = """before
<!-- table: one -->
old
<!-- /table -->
it took <!-- value: n -->9<!-- /value --> s
"""


def one(found):
    row = found.one("r", name="a")
    return source.markdown(["x"], [[source.number(row, "x")]])


@pytest.fixture
def folder(tmp_path):
    where = {"device": "cpu", "revision": "abc"}
    found = [rows.make({"name": "a"}, {"x": x}, where) for x in (1.0, 2.5)]
    found += [rows.make({"name": "b", "seed": s}, {"x": 1.0 * s}, where) for s in (1, 0)]
    found.append(rows.make({"name": "c"}, {"x": 3.0}, where | {"revision": "abc-dirty"}))
    rows.append(tmp_path / "r.jsonl", found)
    source._read.cache_clear()
    return tmp_path


def fill(text, folder, tables=None, values=None):
    values = values or {"n": lambda found: str(len(found.rows("r")))}
    return pages.fill(text, folder, tables or {"one": one}, values)


def test_pages_are_filled_with_the_newest_rows(folder):
    filled = fill(PAGE, folder)
    assert "\n| x |\n| --- |\n| 2.50 |\n" in filled and "old" not in filled
    assert "it took <!-- value: n -->4<!-- /value --> s\n" in filled
    assert filled.startswith("before\n<!-- table: one -->") and fill(filled, folder) == filled
    assert pages.named(filled) == [("table", "one"), ("value", "n")]


def test_a_table_of_rows_of_an_uncommitted_tree_says_so(folder):
    tables = {"one": lambda found: str(len(found.rows("r", name={"a", "c"})))}
    assert "1 of 2 of these rows were recorded on an uncommitted tree" in fill(PAGE, folder, tables)
    tables = {"one": lambda found: str(len(found.rows("r", name="c")))}
    assert "All of these rows" in fill(PAGE, folder, tables)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: two --><!-- /table -->", "a table must be one of one: got 'two'"),
        ("<!-- value: one --><!-- /value -->", "a value must be one of n: got 'one'"),
        ("<!-- table: one -->\n| x |\n", "must be closed"),
        ("<!-- table: one --> <!-- value: n -->1<!-- /value -->", "must be closed"),
        ("<!-- table: one --><!-- /value -->", "must be closed"),
    ],
)
def test_markers_that_cannot_be_filled_are_named(folder, text, message):
    with pytest.raises(ValueError, match=message):
        fill(text, folder)


def test_a_cell_is_of_one_row_and_a_mean_of_one_a_seed(folder):
    found = source.Source(folder)
    assert found.one("r", name="nobody") is None and found.rows("no_such_file") == []
    with pytest.raises(ValueError, match="r.jsonl has 2 with {'name': 'b'}; say which"):
        found.one("r", name="b")
    assert source.mean(found.rows("r", name="b"), "x", each=True) == "0.500 (0.000, 1.000)"
    assert len(found.rows("r", seed=source.MISSING)) == 2
    with pytest.raises(ValueError, match="a mean is over seeds"):
        source.mean(found.rows("r", name={"a", "c"}), "x")


def test_every_table_stands_on_a_page():
    named = [one for path in pages.pages(PROJECT) for one in pages.named(path.read_text())]
    tables = [name for kind, name in named if kind == "table"]
    assert sorted(tables) == sorted(TABLES)
    values = {name for kind, name in named if kind == "value"}
    assert {name for name in VALUES if not name.startswith("cache ")} <= values <= set(VALUES)


def make_run(folder, n_steps=5, is_finished=True):
    folder.mkdir()
    records = [
        {"step": n_steps, "seconds": 120.0, "tokens": 640, "bits_per_byte": 2.0},
        {"step": n_steps, "eval/bits_per_byte": 1.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if is_finished:
        (folder / "DONE.json").write_text("{}")
    test = {"split": "test", "step": 5, "bits_per_byte": 1.5, "bytes": 100}
    (folder / "test.json").write_text("some lines\n" + json.dumps(test) + "\n")
    return f"--workdir={folder}", f"--evaluation={folder / 'test.json'}"


def test_pages_say_what_results_say_and_runs_are_recorded(tmp_path):
    out = tmp_path / "quickstart_cpu.jsonl"
    options = ("--name=quickstart", f"--out={out}")
    lines = [("tables", "--check")]
    lines.append(("record_run", *make_run(tmp_path / "done"), *options))
    lines.append(("record_run", *make_run(tmp_path / "other", n_steps=6), *options))
    lines.append(("record_run", *make_run(tmp_path / "unfinished", is_finished=False), *options))
    check, done, other, unfinished = run_all(lines)
    assert check.returncode == 0, check.stderr
    assert done.returncode == 0, done.stderr
    assert "test split at step 6: got test at step 5" in " ".join(other.stderr.split())
    assert "must be finished" in unfinished.stderr
    (row,) = rows.recorded(out)
    wanted = {"validation_bits_per_byte": 1.75, "test_bits_per_byte": 1.5, "n_steps": 5}
    assert row["config"] == "quickstart" and row["train_minutes"] == 2.0
    assert {name: row[name] for name in wanted} == wanted
    text = VALUES["quickstart"](source.Source(tmp_path))
    assert "**1.50 bits per byte**" in text and "(5 steps)" in text
