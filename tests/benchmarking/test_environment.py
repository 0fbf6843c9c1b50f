"""What a row says of where it was made."""

import json
import subprocess

import jax

from longctx_jax.benchmarking import environment


def test_environment_says_where_and_with_what():
    row = environment.environment("python -m x")
    assert (row["platform"], row["command"]) == (jax.default_backend(), "python -m x")
    assert row["jax_version"] == jax.__version__ and row["date"].endswith("+00:00")
    assert row["device"] and row["host_cpus"] >= 1
    json.dumps(row)


def test_revision_is_unknown_outside_a_checkout(tmp_path):
    assert environment.git_revision(tmp_path) == "unknown"


def test_revision_says_when_files_changed(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = environment.git_revision(tmp_path)
    assert len(clean) == 12
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows").write_text("recorded since")
    git("add", "results")
    assert environment.git_revision(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert environment.git_revision(tmp_path) == clean + "-dirty"


def test_commands_in_rows_name_no_folders_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ["--suite=vq", f"--peers={tmp_path}/a/b,../c", "--out=runs/x.jsonl", str(tmp_path)]
    arguments += [f"--out={tmp_path}/here/y", "--config.model.pattern=('vq',)"]
    text = environment.command_line("scripts.benchmark", arguments)
    assert text.startswith(
        f"python -m scripts.benchmark --suite=vq --peers=b,c --out=runs/x.jsonl {tmp_path.name} "
    )
    assert "--out=y " in text and text.count("/") == 1


def test_paths_are_left_out_of_errors():
    assert environment.without_paths("OSError: /home/me/x.so: no\nmore") == "OSError: x.so: no"
