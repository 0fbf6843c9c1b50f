"""Mixers from outside the repository: found by --mixers, recorded, and missed by name."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import base, from_run
from longctx_jax.models import build_model
from longctx_jax.nn.mixers import MIXERS
from longctx_jax.nn.mixers.outside import default_fields, load_mixers
from tests.command_lines import run_all
from tests.laws.gla import CODE
from tests.tiny import PROJECT, flags

TINY = ["--config=configs/quickstart.py", *flags(eval__every=3)]
TINY += ["--config.model.name=transformer", "--config.model.pattern=('gla',)"]
MISTAKES = {
    "gla": "a mixer's place must be package.module:NAME: got 'gla'",
    "no_such_module:MIXER": "got 'no_such_module:MIXER', and there is no no_such_module",
    "json:loads": "a mixer's place must hold a Mixer or a mapping of them: json:loads is function",
    "longctx_jax.nn.mixers.softmax:MIXER": "every mixer needs a name of its own: got 'softmax'",
}


@pytest.mark.parametrize("place", MISTAKES)
def test_a_place_that_is_none_is_named(place):
    with pytest.raises(ValueError) as error:
        load_mixers([place])
    assert MISTAKES[place] in str(error.value)


def test_a_mapping_brings_several():
    mixers, named = load_mixers(["tests.laws.cases:OTHERS"])
    assert set(mixers) - set(MIXERS) == {"one", "two"}
    assert named == ("one=tests.laws.cases:OTHERS", "two=tests.laws.cases:OTHERS")
    assert default_fields(mixers) == {"one": {"gain": 2.0}, "two": {"gain": 2.0}}


def test_a_name_may_not_be_that_of_a_field():
    with pytest.raises(ValueError, match="no field of config.model has: got 'memory'; rename it"):
        build_model({}, {**MIXERS, "memory": MIXERS["decay"]})


def test_a_config_that_needs_a_mixer_says_so():
    fields = base.get_config().model.to_dict() | {"outside_mixers": ("gla=my.gla:MIXER",)}
    with pytest.raises(ValueError, match=r"none for 'gla=my.gla:MIXER'.*add --mixers=my.gla:MIXER"):
        build_model({**fields, "gla": {"rank": 3}, "pattern": ("gla",)})


def test_a_wrong_command_line_is_one_paragraph():
    lines = [("accounting", f"--mixers={place}") for place in MISTAKES]
    lines += [("train", *TINY, "--workdir=runs/never")]
    for done, text in zip(run_all(lines), [*MISTAKES.values(), "one of"], strict=True):
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr
        assert text in " ".join(done.stderr.split()), done.stderr


def test_a_sweep_hands_its_mixers_to_its_runs(tmp_path):
    place = "tests.laws.cases:OTHERS"
    sweep = ["--sweep=configs/sweeps/quickstart_lr.py", f"--workdir={tmp_path}", "--dry_run"]
    (done,) = run_all([("sweep", *sweep, f"--mixers={place}", "--set=model.one.gain=3.0")])
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if "scripts.train" in line]
    assert commands and all(f"--mixers={place}" in line for line in commands)


def run(folder, script, *arguments):
    """Runs a documented command with a file of one's own beside; returns what it printed."""
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", *arguments],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_page_s_mixer_goes_through_the_documented_commands(tmp_path):
    (tmp_path / "gla.py").write_text(CODE)
    workdir, given = tmp_path / "run", "--mixers=gla:MIXER"

    def must(script, *arguments):
        done = run(tmp_path, script, given, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    tiny = [*TINY, "--config.model.gla.rank=3", f"--workdir={workdir}"]
    must("train", *tiny, "--config.train.n_steps=3")
    config = json.loads((workdir / "config.json").read_text())["model"]
    assert config["gla"]["rank"] == 3 and config["outside_mixers"] == ["gla=gla:MIXER"]
    must("train", *tiny, "--config.train.n_steps=6")  # resumes
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]
    assert max(steps) == 6
    found = json.loads(must("evaluate", f"--workdir={workdir}", "--max_bytes=300").splitlines()[-1])
    assert found["step"] == 6 and found["bits_per_byte"] > 0
    assert "def " in must("generate", f"--workdir={workdir}", "--prompt=def ", "--max_new_tokens=4")
    assert "cache by context" in must("accounting", *TINY, "--contexts=16,32")
    assert "devices=8" in must("train", *tiny, "--plan_only", "--plan_devices=8")
    must("report", f"--runs={workdir}", f"--out={tmp_path / 'report'}")
    assert "gla" in (tmp_path / "report" / "index.html").read_text()
    tuned = [f"--config=configs/from_run.py:{workdir}", f"--workdir={tmp_path / 'tuned'}"]
    must("train", *tuned, "--config.train.n_steps=7")
    refused = run(tmp_path, "evaluate", f"--workdir={workdir}")
    assert refused.returncode == 1 and "add --mixers=gla:MIXER" in " ".join(refused.stderr.split())


def test_a_config_of_before_still_loads(tmp_path):
    before = PROJECT / "tests" / "golden" / "runs" / "config_before_mixers.json"
    config = from_run.read_config(before)
    assert build_model(config.model).config.pattern == ("decay",)
    fields = json.loads(before.read_text())
    assert fields["model"]["vq"]["smoothing"] == "clip"
    fields["model"]["vq"]["smoothing"] = "laplace"
    other = pathlib.Path(tmp_path / "config.json")
    other.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config.model.vq.smoothing has only one meaning left"):
        from_run.read_config(other)
