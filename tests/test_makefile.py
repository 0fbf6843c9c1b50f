"""How the Makefile chooses an interpreter, with fake ones on PATH; nothing is installed."""

import os
import pathlib
import subprocess
import sys

import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent
SHIM = "#!/bin/sh\necho 'command not found' >&2\nexit 127\n"
TOOLS = ("bash", "sh", "make", "dirname", "grep", "sed", "column")

# The tests themselves may run under make, whose settings must not leak into the ones started here.
INHERITED = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV", "PYTHON", "EXTRAS")


def make(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=20
    )


def fake_python(folder, name, version="", *, has_venv=True):
    """A program that answers like an interpreter of `version`; without one, a failing shim."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    venv = "exit 0" if has_venv else "exit 1"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in\n *ensurepip*) {venv};;\nesac\necho "{version} {path}"\n'
        if version
        else SHIM
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def choose(tmp_path):
    """Runs `make print-python` with only these folders, and a few tools, on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        for folder in os.environ["PATH"].split(":"):
            if os.access(f"{folder}/{tool}", os.X_OK):
                (tools / tool).symlink_to(f"{folder}/{tool}")
                break

    def run(*folders, python=""):
        path = ":".join(map(str, (*folders, tools)))
        command = ["make", "-s", "print-python", f"PYTHON={python}"]
        environment = {"PATH": path, "HOME": str(tmp_path)}
        return subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=20
        )

    return run


def test_the_newest_supported_one_wins(tmp_path, choose):
    for version in ("3.10", "3.11", "3.13", "3.12", "3.14"):
        fake_python(tmp_path / "bin", f"python{version}", version)
    assert choose(tmp_path / "bin").stdout.strip() == str(tmp_path / "bin" / "python3.13")


def test_a_shim_that_fails_is_passed_over(tmp_path, choose):
    for name in ("python3.13", "python3.12"):
        fake_python(tmp_path / "shims", name)
    fake_python(tmp_path / "bin", "python3.12", "3.12")  # behind the shim of the same name
    found = choose(tmp_path / "shims", tmp_path / "bin")
    assert found.stdout.strip() == str(tmp_path / "bin" / "python3.12")


def test_plain_python3_counts_when_it_is_new_enough(tmp_path, choose):
    fake_python(tmp_path / "bin", "python3", "3.11")
    assert choose(tmp_path / "bin").stdout.strip() == str(tmp_path / "bin" / "python3")


def test_one_without_venv_is_passed_over(tmp_path, choose):
    fake_python(tmp_path / "bin", "python3.13", "3.13", has_venv=False)
    fake_python(tmp_path / "bin", "python3.11", "3.11")
    assert choose(tmp_path / "bin").stdout.strip() == str(tmp_path / "bin" / "python3.11")


def test_none_new_enough_says_what_was_found_and_what_to_do(tmp_path, choose):
    fake_python(tmp_path / "bin", "python3", "3.10")
    fake_python(tmp_path / "bin", "python3.13")
    fake_python(tmp_path / "bin", "python3.12", "3.12", has_venv=False)
    done = choose(tmp_path / "bin")
    assert done.returncode != 0
    for text in (
        "3.11 or 3.12 or 3.13",
        "bin/python3: is 3.10",
        "bin/python3.13: does not run",
        "python3.12: 3.12 lacks venv or pip (Debian, Ubuntu: apt install python3.12-venv)",
        "make venv PYTHON=/path/to/python3.12",
    ):
        assert text in done.stderr


def test_an_explicit_python_is_the_only_candidate(tmp_path, choose):
    fake_python(tmp_path / "bin", "python3.13", "3.13")
    other = fake_python(tmp_path / "other", "my-python", "3.11")
    old = fake_python(tmp_path / "other", "old-python", "3.9")
    assert choose(tmp_path / "bin", python=other).stdout.strip() == other
    assert "is 3.9" in choose(tmp_path / "bin", python=old).stderr


def test_the_base_of_an_active_environment_is_chosen(choose):
    found = choose(python=sys.executable)
    assert found.stdout.strip() == getattr(sys, "_base_executable", sys.executable)


@pytest.mark.parametrize(
    "target, texts",
    [
        ("venv", ['make_venv.sh ".venv" "" "cuda13"']),
        ("train", ["scripts.train --config=configs/quickstart.py", "scripts.plot"]),
        ("test", ['"cuda13,test"', '-m "not slow and not gpu and not network"']),
        ("lint", ["ruff check .", "ruff format --check .", "pyright"]),
        ("gpu-check", ["pytest -q -m gpu", "--suite=train", "--suite=decode", "cuda13,test"]),
        ("gpu-check", ["--suite=decay --peers", "--record"]),
    ],
)
def test_targets_run_what_they_say(target, texts):
    out = make("-n", target, "EXTRAS=cuda13").stdout
    for text in texts:
        assert text in out


def test_help_lists_every_documented_target():
    out = make().stdout
    for target in ("venv", "train", "test", "test-slow", "lint", "format", "gpu-check", "clean"):
        assert f"make {target} " in out


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("kept")
    done = make("-s", "venv", f"VENV={tmp_path}", f"PYTHON={sys.executable}")
    assert done.returncode != 0 and "must be a virtual environment" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "kept"
