"""The page: what it contains, that nothing in a run's folder becomes markup, and its refusals."""

import html
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from longctx_jax.reporting import charts, contexts, markup, page, report, runs, sweeps, tables
from tests.tiny import PROJECT

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&$^{"
MADE_AT = "2026-01-01 00:00 UTC"


def load_all(folders):
    return [runs.load_run(folder, folder.name, now_s=0.0) for folder in folders]


def render(*folders):
    return page.render(load_all(folders), MADE_AT)


class Elements(html.parser.HTMLParser):
    """All elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open += [tag] if tag not in ("meta", "input", "wbr") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def tags(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


def titles(text):
    return re.findall("<h2>(.*?)</h2>", text)


def figures(text):
    """The caption and the rest of every figure."""
    pieces = re.findall("<figcaption>(.*?)</figcaption>(.*?)</figure>", text, re.DOTALL)
    return [(html.unescape(caption), rest) for caption, rest in pieces]


def test_runs_of_different_models_are_in_every_section(tmp_path, run_maker):
    text = render(
        run_maker(tmp_path / "a", model="decay", bits=2.5),
        run_maker(tmp_path / "b", model="transformer_vq", model__d_ff=12),
        run_maker(tmp_path / "subwords", is_bytes=False),
    )
    seen = Elements(text)
    assert not seen.open
    assert titles(text) == [
        "Summary",
        "Curves",
        "Throughput",
        "Differences between configs",
        "Runs",
    ]
    for word in ("decay", "transformer_vq", "finished", "2.500", "4,000", "model.name", "d_ff"):
        assert word in seen.text
    assert len(figures(text)) == 8 == len(seen.tags("figure"))
    assert len(seen.tags("details")) == 3
    # Runs of bytes are drawn as bits per byte, the others as loss.
    drawn = {c: sorted(set(re.findall(r'<g class="(run-\d)"', f))) for c, f in figures(text)}
    assert drawn["Bits per byte by steps"] == ["run-0", "run-1"]
    assert drawn["Loss, tokens that are not bytes by tokens"] == ["run-2"]
    assert drawn["Tokens/s by steps"] == ["run-0", "run-1", "run-2"]


def test_the_page_needs_nothing_else(tmp_path, run_maker):
    seen = Elements(render(run_maker(tmp_path / "a")))
    assert [s for s in seen.tags("script") if s] == [] and len(seen.tags("script")) == 1
    assert not any(seen.tags(name) for name in ("link", "img", "iframe", "object"))
    links = [value for _, given in seen.found for key, value in given.items() if "href" in key]
    assert links and all(link.startswith("#") for link in links)
    (policy,) = [m["content"] for m in seen.tags("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_ids_are_unique(tmp_path, run_maker):
    seen = Elements(render(run_maker(tmp_path / "a"), run_maker(tmp_path / "b")))
    ids = [given["id"] for _, given in seen.found if "id" in given]
    assert len(ids) == len(set(ids))


def test_children_and_attributes_are_escaped():
    child = markup.element("b", "<i>", title='"<&')
    assert child == '<b title="&quot;&lt;&amp;">&lt;i&gt;</b>'
    assert markup.element("p", child, "&") == f"<p>{child}&amp;</p>"


def test_long_curves_are_thinned_to_averages():
    xs, ys = charts.thinned(np.arange(4000.0), np.tile([0.0, 1.0], 2000))
    assert len(xs) == charts.MAX_POINTS and np.all(ys == 0.5) and xs[0] == 4.5
    assert charts.thinned(xs, ys)[0] is xs


def test_text_of_run_folders_never_becomes_markup(tmp_path, run_maker):
    name = ATTACK.replace("/", "-")
    folder = run_maker(tmp_path / "sweep" / name, model=ATTACK, **{f"train__{ATTACK}": ATTACK})
    other = run_maker(tmp_path / "sweep" / "b")
    sample = {"step": 10, "prompt": ATTACK, "text": ATTACK + "\ud800\u202e\0"}
    (folder / "samples.jsonl").write_text(json.dumps(sample))
    (folder / "log.txt").write_text(f"$ x\nerror: {ATTACK}\n")
    (folder / "DONE.json").write_text("{" + ATTACK)
    record = {"step": 41, f"stall/{ATTACK}": 1.0, f"memory/{ATTACK}": 2.0, ATTACK: 3.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    flags = [f"--config.{ATTACK.replace('=', '')}={ATTACK}"]
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({ATTACK: flags, "b": []}))
    case = {"suite": "context", "context_len": 8, "data": ATTACK, "model": ATTACK}
    row = {"case": case, "measured": {"bits_per_byte": 1.0}, "environment": {}}
    (tmp_path / "sweep/rows.jsonl").write_text(json.dumps(row))
    path = report.write_report([folder, other], tmp_path / "out")
    seen = Elements(path.read_text())
    assert not seen.open and seen.text.count(ATTACK) >= 10
    assert len(seen.tags("script")) == 1 and not seen.tags("img")
    assert not any(key.startswith("on") for _, given in seen.found for key in given)
    expected = {"Context length", "Memory", "Sweeps", "Samples", "Stalls and step times"}
    assert expected <= set(titles(path.read_text()))


def test_broken_runs_are_noted_and_stop_nothing(tmp_path, run_maker):
    whole = run_maker(tmp_path / "whole")
    for name, content in (("empty", ""), ("torn", '{"step": 1, "lo')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content)
    text = Elements(render(tmp_path / "empty", tmp_path / "torn", whole)).text
    assert "1 of 1 lines hold no JSON object" in text and "config.json is missing" in text
    assert Elements(render(tmp_path / "empty")).text  # a page about nothing but damage


def test_config_differences_are_only_the_fields_that_differ(tmp_path, run_maker):
    folders = [run_maker(tmp_path / "a"), run_maker(tmp_path / "b", train__seed=1, train__new=5)]
    found = tables.config_differences(load_all(folders))
    assert found.columns == ("run", "train.seed") and [row[1] for row in found.rows] == ["0", "1"]
    folders += [run_maker(tmp_path / "c", model="x", train__seed=3, model__d_model=1, train__new=6)]
    found = tables.config_differences(load_all(folders))
    assert found.columns == ("field", *map(tables.RunCell, range(3)))
    assert [row[0] for row in found.rows] == [
        *("model.name", "model.d_model", "train.seed", "train.new")
    ]
    assert found.rows[3] == ("train.new", None, "5", "6")
    assert tables.config_differences(load_all(folders[:1])).rows == ()


def test_a_sweep_has_a_table_of_what_varies_best_first(tmp_path, run_maker):
    run_maker(tmp_path / "lr" / "x", bits=3.0, train__seed=1)
    run_maker(tmp_path / "lr" / "y", bits=2.0, train__seed=0)
    shared = ["--config=configs/quickstart.py", "--config.train.n_steps=40"]
    plan = {
        "x": [*shared, "--config.train.seed=1"],
        "y": shared,  # the default, which its config tells
        "z": [*shared, "--config.train.seed=2"],
        "broken": None,
    }
    (tmp_path / "lr" / "sweep.json").write_text(json.dumps(plan))
    ((name, table),) = sweeps.sweep_tables(load_all([tmp_path / "lr/x", tmp_path / "lr/y"]))
    assert name == "lr" and "train.n_steps" not in table.columns
    column = {c: [row[i] for row in table.rows] for i, c in enumerate(table.columns)}
    assert column["run"] == [tables.RunCell(1), tables.RunCell(0), "z"]
    assert column["train.seed"] == ["0", "1", "2"]
    assert column["status"] == ["finished", "finished", "not started"]
    assert column["bits per byte"][:2] == [2.0, 3.0]


def test_context_rows_belong_to_the_run_they_name(tmp_path, run_maker):
    folders = [run_maker(tmp_path / "lr" / name) for name in "ab"]
    (tmp_path / "lr/sweep.json").write_text("{}")

    def row(length, bits, **fields):
        case = {"suite": "context", "data": "text", "split": "test", **fields}
        case["context_len"] = length
        found = {"bits_per_byte": bits}
        where = {"revision": "abc-dirty" if "model" in fields else "abc"}
        return json.dumps({"case": case, "measured": found, "environment": where}) + "\n"

    rows = [row(64, 2.0, run="b"), row(8, 3.0, run="b"), row(8, 2.5, run="b")]
    rows += [
        row(8, 9.0, run="gone"),
        row(8, 4.0, model="decay"),
        row("x", 1.0),
        '{"case": 1}\n',
        "{",
    ]
    (tmp_path / "context.jsonl").write_text("".join(rows))
    named, unnamed = contexts.context_curves(load_all(folders))
    assert named == contexts.ContextCurve("text test", 1, "", ((8.0, 2.5), (64.0, 2.0)))
    assert (unnamed.run, unnamed.model) == (None, "model decay")
    texts = [row[1] for row in contexts.context_table([named, unnamed]).rows]
    assert texts == ["text test", "text test, uncommitted tree"]
    text = render(*folders)
    assert "Context length" in titles(text) and "model decay" in text


def test_stalls_and_memory_have_their_worst(tmp_path, run_maker):
    folder = run_maker(tmp_path / "a")
    records = [{"step": s, "stall/n": s % 3, "memory/peak_bytes": s} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run,) = load_all([folder])
    assert tables.stalls([run]).rows == ((tables.RunCell(0), "stall/n", 3, 1.0, 2.0, 2),)
    assert tables.memory([run]).rows[0][-2:] == (3.0, 3)
    text = render(folder)
    assert "memory/peak_bytes by steps" in text and "Stalls and step times" in titles(text)


def test_more_runs_than_the_limit_are_counted(tmp_path, run_maker, monkeypatch):
    monkeypatch.setattr(report, "MAX_RUNS", 1)
    folders = [run_maker(tmp_path / name) for name in "abc"]
    text = report.write_report(folders, tmp_path / "out").read_text()
    assert "1 run;" in text and "2 more matched and are left out" in text


def test_the_command(tmp_path, run_maker):
    run_maker(tmp_path / "runs" / "a=1,b=2")
    out = tmp_path / "out"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "scripts.report", f"--runs={tmp_path / glob}", f"--out={out}"],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for glob in ("runs/*", "nothing*")
    ]
    (told, errors), (_, refusal) = (process.communicate(timeout=60) for process in processes)
    assert processes[0].returncode == 0, errors
    assert f"wrote {out}/index.html: 1 of 1 run(s)" in told
    assert [path.name for path in out.iterdir()] == ["index.html"]
    assert processes[1].returncode == 1
    assert refusal.startswith("error: --runs must match folders with metrics.jsonl")


def test_extreme_numbers_can_be_drawn(tmp_path):
    for name, values in (("large", (1e30, -1e30)), ("equal", (2.0, 2.0)), ("tiny", (1e-30, 0))):
        (tmp_path / name).mkdir()
        lines = [
            json.dumps({"step": s, "bits_per_byte": v, "tokens_per_s": v, "seconds": v})
            for s, v in zip((1, 10**30), values, strict=True)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        assert len(figures(render(tmp_path / name))) == 4


def test_in_a_browser(tmp_path, run_maker):
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("needs chromium or google-chrome on PATH")
    name = '<img src=x onerror="document.title=1">'
    folders = [run_maker(tmp_path / name, bits=3.0), run_maker(tmp_path / "b", bits=2.0)]
    path = report.write_report(folders, tmp_path / "out")
    # A second script would run if the policy allowed any other; the first one sorts and reports.
    probe = "<script>document.body.dataset.injected = 1</script></body>"
    path.write_text(path.read_text().replace("</body>", probe))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dom = done.stdout
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<title>2 training runs</title>" in dom and "data-injected" not in dom
    assert '<th scope="col" tabindex="0">' in dom  # our own script ran
    assert dom.count("<figure") == 5 and dom.count("<svg") > 5
