"""How scripts fail: one paragraph for the user's mistakes, a traceback for ours."""

import pathlib
import subprocess
import sys

import pytest

from configs import base
from scripts import common, overrides

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent
SCRIPT = """
import sys
from scripts import common
CONFIG = common.config_flag()
WORKDIR = common.workdir_flag()
def main(arguments):
    config = CONFIG.value
    if config.train.seed == 1:
        common.load_module(WORKDIR.value, "notes file")  # raises on purpose, in our code
    if config.train.seed == 2:
        raise RuntimeError("a bug")
    if config.train.seed == 3:
        {}["missing"]
    if config.train.seed == 4:
        open(WORKDIR.value)
    print("n_steps", config.train.n_steps, config.model.pattern)
common.run(main)
"""


def run_script(*arguments, config="configs/base.py"):
    command = [sys.executable, "-c", SCRIPT, f"--config={config}", "--workdir=no/dir", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_overrides_reach_main():
    done = run_script("--config.train.n_steps=7", "--config.model.pattern=('decay', 'softmax')")
    assert (done.returncode, done.stdout) == (0, "n_steps 7 ('decay', 'softmax')\n")


@pytest.mark.parametrize(
    "argument, texts",
    [
        ("--config.train.n_stps=3", ["train.n_stps", "did you mean n_steps", "n_steps=3"]),
        ("--config.trian.n_steps=3", ["did you mean train.n_steps"]),
        ("--config.n_steps=3", ["did you mean train.n_steps"]),
        ("--config.train.n_steps=abc", ["config.train.n_steps must be int", "'abc'", "1000"]),
        ("--config.train.n_steps=2.5", ["must be int", "'2.5'"]),
        ("--config.log.wandb=maybe", ["config.log.wandb must be bool", "'maybe'"]),
        ("--config.train=3", ["config.train is a group", "n_steps"]),
        ("--workdr=x", ["unknown flag", "--workdr", "did you mean workdir"]),
        ("stray", ["flags only", "'stray'"]),
        ("--workdir", ["--workdir"]),
    ],
)
def test_a_wrong_command_line_is_one_paragraph(argument, texts):
    done = run_script(argument)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for text in texts:
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_config_file_names_the_closest():
    done = run_script(config="configs/bass.py")
    assert done.returncode == 1
    assert "configs/bass.py; did you mean configs/base.py?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_file_that_misspells_a_field_names_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import base\n"
        "def get_config(arg=''):\n"
        "    config = base.get_config(arg)\n"
        "    config.train.n_stps = 3\n"
        "    return config\n"
    )
    done = run_script(config=str(path))
    assert done.returncode == 2
    assert "mine.py fails" in done.stderr and '"n_steps"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seed, text", [(1, "the notes file must exist"), (4, "no such file")])
def test_errors_for_the_user_have_no_traceback_unless_asked(seed, text):
    done = run_script(f"--config.train.seed={seed}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and text in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run_script(f"--config.train.seed={seed}", "--debug").stderr


@pytest.mark.parametrize("seed", [2, 3])
def test_bugs_keep_their_traceback(seed):
    done = run_script(f"--config.train.seed={seed}")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_value_errors_from_elsewhere_are_bugs():
    with pytest.raises(ValueError) as planned:
        common.load_config(str(PROJECT / "scripts" / "__init__.py"))
    with pytest.raises(ValueError) as unplanned:
        common.PROJECT.relative_to("/nowhere/at/all")
    assert common.is_user_error(planned.value)
    assert not common.is_user_error(unplanned.value)
    with pytest.raises(ValueError) as expression:
        int("x")  # in a file of ours, but not a `raise`
    assert not common.is_user_error(expression.value)


def test_override_problem_accepts_what_the_parser_accepts():
    config = base.get_config()
    for field, value in [
        ("train.n_steps", "5"),
        ("optim.learning_rate", "1"),
        ("log.wandb", "true"),
        ("model.pattern", "('decay',)"),
        ("data.data_dir", ""),
    ]:
        assert overrides.override_problem(config, field, value) == ""
    assert "is a value" in overrides.override_problem(config, "train.n_steps.x", "1")
