"""scripts.convert as a user runs it: from a checkpoint folder to a fine-tuned one, and back."""

import json
import shutil

import numpy as np
import pytest

from longctx_jax.conversion import safetensors_files as files
from tests.command_lines import run_all
from tests.conversion.conftest import GOLDEN
from tests.scripts.test_scripts import mistake, refusal, script
from tests.tiny import TEXT

CHECKPOINT = GOLDEN / "with_tokenizer"
DATA = ["--config.data.name=text", f"--config.data.files=({TEXT!r},)", "--config.data.seq_len=16"]
SMALL = ["--config.data.global_batch_size=4", "--config.eval.max_bytes=300"]
SMALL += ["--config.log.tensorboard=False"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Returns the run that the checkpoint became, and what the script printed."""
    run = tmp_path_factory.mktemp("converted") / "run"
    arguments = ["--from=hf_llama", f"--path={CHECKPOINT}", f"--workdir={run}"]
    return run, script("convert", *arguments, *DATA, *SMALL).stdout


def tensors_of(folder):
    found = files.find_tensors(folder)
    return {name: files.read_float32(found[name], name) for name in found}


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


@pytest.mark.slow
def test_a_checkpoint_becomes_a_run_and_comes_back(converted, tmp_path):
    run, text = converted
    assert text.splitlines()[0] == f"wrote {run}: 3,976 parameters in 20 tensors, step 0"
    assert f"--config=configs/from_run.py:{run}" in text
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["tokenizer"] == str(run / "tokenizer" / "tokenizer.json")
    assert config["model"]["vocab_size"] == 300
    out = tmp_path / "out"
    text = script("convert", "--to=hf_llama", f"--workdir={run}", f"--path={out}").stdout
    assert "tokenizer files: tokenizer.json, tokenizer_config.json" in text
    assert same(tensors_of(out), tensors_of(CHECKPOINT))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    given = json.loads((out / "config.json").read_text())
    assert (given["bos_token_id"], given["eos_token_id"]) == (296, 297)


@pytest.mark.slow
def test_fine_tune_evaluate_generate_export(converted, tmp_path):
    """The commands of docs/conversion.md."""
    run, _ = converted
    before = script("evaluate", f"--workdir={run}", "--max_bytes=300").stdout.splitlines()[-1]
    assert json.loads(before)["step"] == 0 and json.loads(before)["bytes"] <= 300
    script("context", run, f"--out={tmp_path / 'c.jsonl'}", "--lengths=16", "--max_bytes=64")
    tuned = tmp_path / "tuned"
    arguments = [f"--config=configs/from_run.py:{run}", f"--workdir={tuned}"]
    arguments += ["--config.train.n_steps=20", "--config.optim.warmup_steps=2"]
    record = json.loads(script("train", *arguments).stdout.splitlines()[-1])
    after = script("evaluate", f"--workdir={tuned}", "--max_bytes=300").stdout.splitlines()[-1]
    assert record["step"] == 20
    assert json.loads(after)["bits_per_byte"] < json.loads(before)["bits_per_byte"]
    options = [f"--workdir={tuned}", "--max_new_tokens=5", "--temperature=0"]
    assert script("generate", *options, "--prompt=def f").stdout.startswith("def f")
    out, again = tmp_path / "out", tmp_path / "again"
    script("convert", "--to=hf_llama", f"--workdir={tuned}", f"--path={out}")
    assert not np.array_equal(tensors_of(out)["model.norm.weight"], np.ones(8))
    assert not same(tensors_of(out), tensors_of(CHECKPOINT))
    arguments = ["--from=hf_llama", f"--path={out}", f"--workdir={again}", *DATA]
    script("convert", *arguments, "--config.model.dtype=bfloat16")
    half = tmp_path / "half"
    arguments = ["--to=hf_llama", f"--workdir={again}", f"--path={half}", "--dtype=bfloat16"]
    script("convert", *arguments)
    assert {tensor.dtype for tensor in files.find_tensors(half).values()} == {"BF16"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["decay", "sliding", "recurrent_memory"])
def test_another_scheme_starts_from_the_run(converted, tmp_path, scheme):
    run, _ = converted
    new, tuned = tmp_path / "new", tmp_path / "tuned"
    fields = ["--config.model.memory.segment_len=8", "--config.model.memory.n_memory_tokens=2"]
    text = script("convert", f"--to={scheme}", f"--from={run}", f"--workdir={new}", *fields).stdout
    assert "kept: 11 arrays\n  params/embed/table\n" in text
    assert "fresh (no counterpart in the transformer): " in text
    assert "dropped (no counterpart in the new model): 0 arrays" in text
    result = script("evaluate", f"--workdir={new}", "--max_bytes=200").stdout.splitlines()[-1]
    assert json.loads(result)["step"] == 0
    arguments = [f"--config=configs/from_run.py:{new}", f"--workdir={tuned}"]
    record = script("train", *arguments, "--config.train.n_steps=2").stdout.splitlines()[-1]
    assert json.loads(record)["step"] == 2


@pytest.mark.slow
def test_the_run_itself_is_not_trained_on(converted):
    run, _ = converted
    arguments = [f"--config=configs/from_run.py:{run}", f"--workdir={run}"]
    assert "use a new --workdir" in mistake("train", *arguments)


def test_mistakes_are_one_paragraph(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text()) | {"attention_bias": True}
    biased = shutil.copytree(CHECKPOINT, tmp_path / "biased")
    (biased / "config.json").write_text(json.dumps(config))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").write_text("")
    into, run = f"--workdir={tmp_path / 'run'}", ("convert", "--from=hf_llama")
    expected = {
        ("convert", into): ["one direction", "--from=''"],
        (*run, "--to=hf_llama", into, f"--path={folder}"): ["one direction"],
        ("convert", "--to=rnn", f"--from={folder}", into): ["one direction", "recurrent_memory"],
        ("convert", "--to=decay", f"--from={folder}", into): [
            "the folder of a run",
            "--from=hf_llama",
        ],
        ("convert", "--to=decay", "--from=x", into, "--config=configs/quickstart.py"): [
            "takes the config of --from=RUN"
        ],
        ("convert", "--to=hf_llama", into, "--path=x", "--config.data.seq_len=3"): [
            "takes the config of --workdir",
            "data.seq_len",
        ],
        (*run, f"--workdir={tmp_path / 'old'}", f"--path={folder}"): ["--workdir must be a new"],
        (*run, into, f"--path={biased}"): ["config.json: attention_bias", "got True"],
        (*run, into, f"--path={folder}", "--config.model.d_ff=32"): [
            "6 differ",
            "model.layers.0.mlp.up_proj.weight is (24, 8), not (32, 8)",
        ],
    }
    for done, texts in zip(run_all(list(expected)), expected.values(), strict=True):
        paragraph = refusal(done)
        assert all(text in paragraph for text in texts), paragraph
    assert not (tmp_path / "run").exists()
