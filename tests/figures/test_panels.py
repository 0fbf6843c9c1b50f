"""What a suite declares and what is drawn of it; pictures in files."""

import pytest

from longctx_jax.figures import saving
from longctx_jax.figures.panels import Bars, Group, Lines, draw_groups
from longctx_jax.units import number_text, tokens_text
from tests.command_lines import run_all
from tests.tiny import PROJECT


def row(name, seq, ms, **fields):
    times = {"quartile_1_ms": ms - 1, "quartile_3_ms": ms + 1, "device": "cpu"}
    return {"name": name, "seq_len": seq, "median_ms": ms} | times | fields


def lines(rows, **options):
    return Lines("time", rows, "seq_len", "median_ms", lambda row: row["name"], **options)


def test_a_line_a_label_and_one_legend_a_group():
    rows = [row(name, seq, 2.0 * seq) for name in "ab" for seq in (1024, 256, 4096)]
    figure = draw_groups([Group([lines(rows), lines(rows[:3])], "both")], rows)
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["a", "b"] and len(right.lines) == 1
    assert list(left.lines[0].get_xdata()) == [256, 1024, 4096]
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["256", "1k", "4k"]
    (part,) = figure.subfigs
    assert [text.get_text() for text in part.legends[0].get_texts()] == ["a", "b"]
    assert left.lines[0].get_color() == right.lines[0].get_color()


def test_two_points_at_one_x_are_refused_by_name():
    rows = [row("a", 256, 1.0), row("a", 256, 2.0), row("a", 512, 2.0)]
    with pytest.raises(ValueError, match="'time: a' has several at seq_len=256"):
        draw_groups([Group([lines(rows)])], rows)
    with pytest.raises(ValueError, match="'bars' has several called 'a'"):
        draw_groups([Group([Bars("bars", rows, lambda row: row["name"])])], rows)


def test_panels_without_points_are_left_out_and_points_at_one_place_are_bars():
    rows = [row(name, 256, ms) for name, ms in (("a", 1.0), ("b", 3.0))]
    empty = lines([{"name": "c", "seq_len": 1, "skipped": "why"}])
    (axes,) = draw_groups([Group([empty]), Group([empty, lines(rows)])], rows).axes
    assert [patch.get_width() for patch in axes.patches] == [1.0, 3.0]
    assert "at 256 tokens a row" in axes.get_title()
    with pytest.raises(ValueError, match="needs timed rows"):
        draw_groups([Group([empty])], rows)


def test_rows_of_an_uncommitted_tree_are_marked():
    rows = [row("a", n, 1.0, revision=f"abc{end}") for n, end in ((1, ""), (2, "-dirty"))]
    figure = draw_groups([Group([lines(rows)])], rows)
    assert "1 of 2 rows recorded on an uncommitted tree" in figure.get_suptitle()


def test_a_picture_knows_its_rows(tmp_path):
    rows = [row("a", n, 1.0) for n in (1, 2)]
    source, picture = tmp_path / "rows.jsonl", tmp_path / "new" / "rows.png"
    source.write_text("one")
    saving.save(draw_groups([Group([lines(rows)])], rows), picture, source)
    assert saving.drawn_from(picture) == saving.digest(source)
    source.write_text("two")
    assert saving.drawn_from(picture) != saving.digest(source)
    saving.save(draw_groups([Group([lines(rows)])], rows), tmp_path / "plain.png")
    assert saving.drawn_from(tmp_path / "plain.png") == ""


def test_committed_pictures_are_of_the_committed_rows(tmp_path):
    stray = tmp_path / "rows.jsonl"
    stray.write_bytes((PROJECT / "results" / "train_cpu.jsonl").read_bytes())
    every, other = run_all([("figures", "--check"), ("figures", "--check", str(stray))])
    assert every.returncode == 0, every.stderr
    assert other.returncode == 1 and "run python -m scripts.figures" in " ".join(
        other.stderr.split()
    )


@pytest.mark.parametrize(
    ("n", "text"),
    [(1, "1"), (300, "300"), (512, "512"), (1024, "1k"), (65_536, "64k"), (2**20, "1M")],
)
def test_places_of_powers_of_two_are_short(n, text):
    assert tokens_text(n) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.002, "0.002"), (9.5, "9.5"), (20_000, "20k"), (1.25e9, "1.25G")]
)
def test_values_are_short(value, text):
    assert number_text(value) == text
