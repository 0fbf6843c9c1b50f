"""Every script as a user runs it: a subprocess, on tiny real text; and its answer to mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from longctx_jax.benchmarking.rows import recorded
from longctx_jax.training.metrics import read_records
from tests.command_lines import run_all
from tests.tiny import PROJECT, TEXT, flags, tiny_config


def script(name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"scripts.{name}", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=300, env=os.environ.copy()
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def train_flags(workdir: pathlib.Path, **fields) -> list[str]:
    return ["--config=configs/quickstart.py", f"--workdir={workdir}", *flags(**fields)]


def mistake(name: str, *arguments: str) -> str:
    """Runs a script that must refuse; returns its one paragraph."""
    return refusal(script(name, *arguments, check=False))


def refusal(done: subprocess.CompletedProcess) -> str:
    """Returns the one paragraph of a command line that was refused."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    paragraph = done.stderr.strip().splitlines()[-1]
    assert paragraph.startswith("error: "), done.stderr[-2000:]
    return paragraph


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of a finished tiny run, made by scripts.train."""
    workdir = tmp_path_factory.mktemp("trained")
    done = script("train", *train_flags(workdir))
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["is_finished"] and record["step"] == 6
    assert "step=6/6" in done.stderr and "tokens_per_s=" in done.stderr
    return workdir


def test_train_leaves_metrics_config_and_checkpoints(trained):
    records = read_records(trained / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["3", "6"]
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["d_model"] == 16


@pytest.mark.slow
def test_context_lengths(trained, tmp_path):
    out = tmp_path / "context.jsonl"
    sizes = ("--lengths=16,64", "--max_bytes=128")
    script("context", trained, f"--out={out}", *sizes)
    rows = recorded(out)
    assert [(row["context_len"], row["run"]) for row in rows] == [
        (n, trained.name) for n in (16, 64)
    ]
    assert all(row["bytes"] == 128 and row["bits_per_byte"] > 0 for row in rows)
    assert [row["position_edges"] for row in rows] == [[0, 16], [0, 64]]
    assert all(row["bits_per_byte_by_position"][0] > 0 for row in rows)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "got 512" in mistake("context", trained, "--lengths=512", "--max_bytes=128")


def test_evaluate_ends_with_one_json_line(trained):
    done = script("evaluate", f"--workdir={trained}", "--split=test", "--max_bytes=700", "--step=3")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["split"] == "test" and result["step"] == 3
    assert result["bytes"] == result["tokens"] == 700
    assert 0 < result["bits_per_byte"] < 20
    assert result["nats_per_token"] == pytest.approx(result["bits_per_byte"] * 0.6931472, rel=1e-6)
    assert result["perplexity_per_word"] > 1


def sampled_text(trained, tmp_path):
    long_prompt = tmp_path / "prompt.txt"
    long_prompt.write_text("import os\n" * 20)  # longer than the training window
    options = [f"--workdir={trained}", "--max_new_tokens=8", "--top_k=5", "--top_p=0.9"]
    options += ["--prompt=def caf\udce9", f"--prompt_file={long_prompt}"]
    return script("generate", *options, "--seed=1").stdout


def test_generate_takes_bytes_and_long_prompts(trained, tmp_path):
    text = sampled_text(trained, tmp_path)
    assert "def " in text and text.count("import os") == 20


@pytest.mark.slow
def test_generate_is_reproducible(trained, tmp_path):
    assert sampled_text(trained, tmp_path) == sampled_text(trained, tmp_path)


def test_plot_draws_the_curves(trained, tmp_path):
    script("plot", trained, f"--out={tmp_path / 'curves.png'}")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def trains_resumes_evaluates_and_samples(tmp_path, fields):
    """Returns the last records of a whole run and of one in two parts, after both were used."""
    changes = [f"--config.{field}={value}" for field, value in fields.items()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script("train", *train_flags(whole), *changes)
    for n_steps in (3, 6):
        script("train", *train_flags(parts), *changes, f"--config.train.n_steps={n_steps}")
    whole, parts = (
        [r for r in read_records(folder / "metrics.jsonl") if r.get("step") == 6 and "loss" in r]
        for folder in (whole, parts)
    )
    assert parts[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-6)
    workdir = f"--workdir={tmp_path / 'parts'}"
    done = script("evaluate", workdir, "--split=test", "--max_bytes=300")
    assert json.loads(done.stdout.strip().splitlines()[-1])["tokens"] == 300
    done = script("generate", workdir, "--prompt=import", "--max_new_tokens=9", "--seed=1")
    assert done.stdout.startswith("import")
    return whole[-1], parts[-1]


@pytest.mark.slow
def test_a_model_with_state_trains_resumes_evaluates_and_samples(tmp_path):
    """Transformer-VQ with the standard scripts: codebooks are saved and restored with the rest."""
    fields = {"model.name": "transformer_vq", "model.vq.codebook_size": 8}
    fields |= {"model.vq.window_len": 6, "model.mlp": "none", "model.vq.gate": "silu"}
    whole, parts = trains_resumes_evaluates_and_samples(tmp_path, fields)
    assert parts["vq_perplexity"] == pytest.approx(whole["vq_perplexity"], rel=1e-6)
    workdir = f"--workdir={tmp_path / 'parts'}"
    picture = tmp_path / "codes.png"
    report = script("codebooks", workdir, f"--out={picture}").stdout.strip().splitlines()
    assert report[0].startswith("layer  0: ") and "of 8 codes in use" in report[0]
    assert json.loads(report[-1])["layers"][0]["perplexity"] > 1
    assert picture.read_bytes().startswith(b"\x89PNG")


CARRIED = {  # caches that are no stack of layers: carried along the stripes, and saved
    "stagformer": {"model.n_layers": 2, "model.stagformer.n_stacks": 2},
    "counts": {
        "model.name": "inattention",
        "model.inattention.memory_position": "none",
        "model.inattention.score_position": "near",
        "model.inattention.n_exact": 5,
        "model.inattention.cache": "counts",
    },
    "alibi": {
        "model.name": "inattention",
        "model.inattention.memory_position": "none",
        "model.inattention.score_position": "alibi",
        "model.inattention.cache": "counts",
    },
    "embedding": {"model.name": "inattention", "model.inattention.cache": "embedding"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CARRIED)
def test_a_model_with_one_cache_trains_resumes_evaluates_and_samples(name, tmp_path):
    fields = {"model.name": name} | CARRIED[name] | {"train.n_microbatches": 2}
    trains_resumes_evaluates_and_samples(tmp_path, fields)


@pytest.mark.slow
def test_sweep_trains_skips_and_summarises(tmp_path):
    sweep = tmp_path / "sweep.py"
    sweep.write_text(
        "from configs.sweep_tools import product, vary\n"
        "BASE = 'configs/quickstart.py'\n"
        "def get_sweep():\n"
        "    return product(vary('model.name', 'transformer', 'decay'))\n"
    )
    settings = [f"--set={flag[2:]}" for flag in flags(train__n_steps=2)]
    arguments = [f"--sweep={sweep}", f"--workdir={tmp_path / 'runs'}", *settings]
    dry = script("sweep", *arguments, "--dry_run")
    assert "scripts.train" in dry.stdout and not list((tmp_path / "runs").glob("*/DONE.json"))
    script("sweep", *arguments)
    table = (tmp_path / "runs" / "summary.csv").read_text()
    assert "decay" in table and "bits_per_byte" in table
    assert (tmp_path / "runs" / "summary.png").exists()
    again = script("sweep", *arguments)
    assert again.stdout.count("skip") >= 2 or "skip" in again.stderr


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_state(tmp_path, trained):
    """SIGKILL at any instant: ten steps, kill, ten more are twenty."""
    fields = {"train__n_steps": 20, "train__checkpoint_every": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script("train", *train_flags(whole, **fields))
    command = [sys.executable, "-m", "scripts.train", *train_flags(killed, **fields)]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step=10/" in line:
            process.kill()
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    script("train", *train_flags(killed, **fields))
    leaves = []
    for workdir in (whole, killed):
        meta = json.loads((workdir / "checkpoints/20/meta/metadata").read_text())
        leaves.append(meta["leaves"])  # with the CRC-32 of every array
    assert leaves[0] == leaves[1]
    losses = [
        [r["loss"] for r in read_records(w / "metrics.jsonl") if "loss" in r]
        for w in (whole, killed)
    ]
    assert losses[0] == losses[1]


def test_sigterm_exits_zero_with_a_checkpoint(tmp_path):
    command = [
        sys.executable,
        "-m",
        "scripts.train",
        *train_flags(tmp_path, train__n_steps=100_000),
    ]
    process = subprocess.Popen(
        command, cwd=PROJECT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "step=5/" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    time.sleep(0.1)
    assert [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


MISTAKES = {
    "indivisible sizes": (
        ["--config.model.n_heads=3"],
        ["n_heads=3", "d_model=16", "use n_heads="],
    ),
    "unknown mixer": (["--config.model.pattern=('decay','slidng')"], ["pattern", "slidng"]),
    "pattern and layers": (["--config.model.pattern=('decay','sliding')"], ["n_layers=1"]),
    "unknown model": (["--config.model.name=mamba9"], ["config.model.name", "mamba9"]),
    "empty glob": (["--config.data.files=('/nowhere/*.txt',)"], ["config.data.files", "/nowhere"]),
    "missing enwik8": (
        [
            "--config.data.name=enwik8",
            "--config.data.data_dir=/nowhere",
            "--config.data.download=False",
        ],
        ["enwik8", "/nowhere"],
    ),
    "small vocabulary": (["--config.model.vocab_size=64"], ["vocab_size", "byte"]),
    "short text": (["--config.data.seq_len=1000000"], ["config.data.seq_len"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_config_is_one_paragraph(case, tmp_path, capsys):
    """In this process, to save start-up time: what `scripts.common.run` does with such an error."""
    from configs import base
    from longctx_jax import data
    from longctx_jax.models import build_model
    from longctx_jax.runs.train import train_data
    from scripts import common
    from tests.tiny import FIELDS

    changed, expected = MISTAKES[case]
    config = base.get_config()
    config.update_from_flattened_dict(FIELDS | {"data.order": "shuffled"})
    for flag in changed:
        name, value = flag.removeprefix("--config.").split("=", 1)
        old = config.to_dict()
        for part in name.split("."):
            old = old[part]
        value = value if isinstance(old, str) else eval(value)  # noqa: S307
        config.update_from_flattened_dict({name: value})
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build_model(config.model)
        splits = data.load_source(config.data)
        _ = train_data(config, splits).dataset[0]
    assert common.is_user_error(caught.value), caught.value
    for text in expected:
        assert text in str(caught.value)


def test_the_command_line_shows_one_paragraph(trained, tmp_path):
    expected = {
        ("train", *train_flags(tmp_path), "--config.train.n_stps=3"): ["n_steps"],
        ("train", *train_flags(trained, optim__learning_rate=0.5)): [
            "config.optim.learning_rate",
            "--workdir",
        ],
        ("evaluate", f"--workdir={tmp_path / 'none'}"): ["scripts.train"],
        ("evaluate", f"--workdir={trained}", "--step=4"): ["[3, 6]"],
        ("generate", f"--workdir={trained}", "--prompt=a", "--top_p=2"): ["top_p"],
        ("generate", f"--workdir={trained}", "--prompt="): ["empty"],
    }
    for done, texts in zip(run_all(list(expected)), expected.values(), strict=True):
        paragraph = refusal(done)
        assert all(text in paragraph for text in texts), paragraph


@pytest.mark.slow
def test_debug_shows_the_traceback(trained):
    done = script("evaluate", f"--workdir={trained}", "--step=4", "--debug", check=False)
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_real_text_of_this_project_is_there():
    assert list(pathlib.Path(TEXT).parent.glob("*.py"))


@pytest.mark.slow
def test_recall_of_a_trained_run(tmp_path):
    """Train, evaluate while training, measure at lengths beyond the trained one, draw."""
    fields = {"data.name": "recall_associative", "data.order": "shuffled", "data.seq_len": 24}
    fields |= {"data.recall.segment_len": 8, "data.recall.n_rows": 12, "eval.batch_size": 4}
    fields |= {"model.name": "recurrent_memory", "model.memory.segment_len": 8}
    fields |= {"model.memory.n_memory_tokens": 2, "model.memory.d_memory": 8}
    changes = [f"--config.{name}={value}" for name, value in fields.items()]
    done = script("train", *train_flags(tmp_path / "run", eval__max_bytes=0), *changes)
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["eval"]["tokens"] == 12 and 0 <= record["eval"]["accuracy"] <= 1
    done = script("evaluate", f"--workdir={tmp_path / 'run'}", "--split=test")
    assert json.loads(done.stdout.strip().splitlines()[-1])["tokens"] == 12
    out = tmp_path / "rows.jsonl"
    options = [f"--out={out}", "--segments=2,40", "--n_rows=6", "--batch_size=4"]
    script("recall", f"--workdir={tmp_path}", *options)
    rows = recorded(out)
    totals = [row for row in rows if row["is_total"]]
    assert [(row["n_segments"], row["row_len"], row["n"]) for row in totals] == [
        (2, 24, 6),
        (40, 328, 6),
    ]
    for total in totals:
        bins = [r for r in rows if r["n_segments"] == total["n_segments"] and not r["is_total"]]
        assert sum(row["n"] for row in bins) == 6
    assert all(row["model"] == "armt" and row["train_n_segments"] == 2 for row in rows)
    assert all(row["command"].startswith("python -m scripts.recall") for row in rows)
    assert all(row["chance"] > 0 and 0 < row["trivial"] <= 1 for row in rows)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "warns"),
    [
        ({"model__memory__segment_len": 8}, False),
        ({"model__memory__segment_len": 6}, True),
        ({"model__memory__segment_len": 6, "model__name": "decay"}, False),
        ({"model__memory__segment_len": 6, "data__name": "python_source"}, False),
    ],
    ids=str,
)
def test_segments_of_the_task_that_are_not_the_models_are_a_warning(caplog, fields, warns):
    from longctx_jax import data
    from longctx_jax.models import build_model
    from longctx_jax.runs.evaluate import evaluator

    recall = {"data__name": "recall_associative", "data__recall__segment_len": 8}
    sizes = {"model__name": "recurrent_memory", "data__seq_len": 24, "data__order": "shuffled"}
    config = tiny_config(**recall | sizes | fields)
    with caplog.at_level("WARNING", logger="absl"):
        evaluator(config, build_model(config.model), data.load_source(config.data))
    assert [record.args for record in caplog.records] == ([(6, 8)] if warns else [])


@pytest.mark.slow
def test_recall_refuses_other_runs(trained):
    assert "recall_associative" in mistake("recall", f"--workdir={trained}")
    assert "got 0" in mistake("recall", f"--workdir={trained}", "--segments=2,0")
    assert "got train" in mistake("recall", f"--workdir={trained}", "--split=train")
