"""Rows: their file, what makes two of them the same case, and what is refused."""

import json

import pytest

from longctx_jax.benchmarking import rows

CASE = {"suite": "s", "name": "a", "pattern": ("x", "y")}


def test_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows.append(path, [rows.make({"name": "a"}, {"median_ms": 1.5}, {"device": "cpu"})])
    rows.append(path, [rows.make({"name": "b"}, {}), rows.make({"name": "c"}, {})])
    found = rows.read(path)
    assert [row["case"]["name"] for row in found] == ["a", "b", "c"]
    assert rows.flat(found[0]) == {"name": "a", "median_ms": 1.5, "device": "cpu"}


def test_the_newest_row_of_a_case_and_device_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    one = rows.make(CASE, {"x": 1}, {"device": "cpu", "date": "old"})
    other = rows.make(CASE | {"name": "b"}, {"x": 2}, {"device": "cpu"})
    elsewhere = rows.make(CASE, {"x": 3}, {"device": "gpu"})
    again = rows.make(CASE, {"x": 4, "new": 1}, {"device": "cpu", "date": "new"})
    rows.append(path, [one, other, elsewhere, again])
    assert [row["x"] for row in rows.recorded(path)] == [4, 2, 3]
    assert rows.identity(again) == rows.identity(rows.read(path)[0])  # a tuple is a list in a file


def test_cases_get_fields_in_front():
    (row,) = rows.within([rows.make({"part": "own"}, {"x": 1})], suite="s", part="all")
    assert row["case"] == {"suite": "s", "part": "own"}


def test_a_field_is_of_the_case_or_measured():
    with pytest.raises(ValueError, match="belongs to one of .*: got name in two"):
        rows.make(CASE, {"name": 1})


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("[1]", "line 2 must hold a JSON object"),
        ("{", "line 2 must be JSON"),
        (
            json.dumps({"suite": "train", "name": "a"}),
            "line 2: must be an object .* got name, suite",
        ),
        (json.dumps({"case": {}, "measured": 1, "environment": {}}), "line 2: must be an object"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows.make(CASE, {})) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=text):
        rows.read(path)


def test_rows_of_an_uncommitted_tree_say_so():
    assert rows.is_dirty({"revision": "abc-dirty"})
    assert not rows.is_dirty({"revision": "abc"}) and not rows.is_dirty({})
