"""scripts.train_tokenizer as a user runs it, and a run on sub-words from training to sampling."""

import json

import pytest

from tests.scripts.test_scripts import mistake, script
from tests.tiny import TEXT, flags

TEXT_FLAGS = [
    "--config=configs/quickstart.py",
    "--config.data.name=text",
    f"--config.data.files=({TEXT!r},)",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns the model file and what the script printed."""
    out = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    done = script("train_tokenizer", *TEXT_FLAGS, f"--out={out}", "--vocab_size=500")
    return out, done.stdout


def test_it_says_what_it_made_and_how_to_use_it(made):
    out, text = made
    lines = text.splitlines()
    assert lines[0] == f"wrote {out}: vocab_size=500"
    assert lines[1].startswith("text/validation: ") and "bytes a token" in lines[1]
    assert 1.5 < float(lines[1].split()[1]) < 6
    assert f"--config.data.tokenizer={out} --config.model.vocab_size=500" in lines[2]


def test_an_old_file_is_kept(made):
    out, _ = made
    before = out.read_bytes()
    error = mistake("train_tokenizer", *TEXT_FLAGS, f"--out={out}")
    assert "--out must be a new file" in error and str(out) in error
    assert out.read_bytes() == before


@pytest.mark.slow
def test_sub_words_from_training_to_sampling(made, tmp_path):
    out, _ = made
    fields = {"data__tokenizer": str(out), "model__vocab_size": 512}
    settings = ["--config=configs/quickstart.py", *flags(**fields)]
    record = json.loads(script("train", *settings, f"--workdir={tmp_path}").stdout.splitlines()[-1])
    assert record["eval"]["bytes"] > 1.2 * record["eval"]["tokens"]
    assert "bits_per_byte" not in (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    options = [f"--workdir={tmp_path}", "--max_bytes=1000"]
    result = json.loads(script("evaluate", *options, "--split=test").stdout.splitlines()[-1])
    assert 985 <= result["bytes"] <= 1000 and result["perplexity_per_word"] > 1
    options = [f"--workdir={tmp_path}", "--max_new_tokens=20", "--temperature=1.5"]
    sampled = script("generate", *options, "--prompt=def f", "--prompt=").stdout
    assert "def f" in sampled
    kept = out.read_bytes()
    script("train_tokenizer", *TEXT_FLAGS, f"--out={tmp_path / 'b.model'}", "--vocab_size=400")
    try:  # another vocabulary under the same path
        out.write_bytes((tmp_path / "b.model").read_bytes())
        evaluate = ["evaluate", f"--workdir={tmp_path}", "--max_bytes=1000", "--split=test"]
        assert json.loads(script(*evaluate).stdout.splitlines()[-1]) == result
        again = mistake("train", *settings, f"--workdir={tmp_path}", "--config.train.n_steps=99")
        assert "the tokenizer it began with" in again
    finally:
        out.write_bytes(kept)
    fields["model__vocab_size"] = 256
    settings = ["--config=configs/quickstart.py", *flags(**fields)]
    error = mistake("train", *settings, f"--workdir={tmp_path / 'other'}")
    assert "config.model.vocab_size=256, and 500 ids" in error
