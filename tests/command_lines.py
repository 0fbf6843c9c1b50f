"""Runs many command lines of the scripts at the price of one start.

A process imports what all scripts need and forks a child for each command line, which then runs
exactly as `python -m scripts.<name>`. Only for command lines that end before jax computes anything:
a process with threads must not fork.
"""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

PROJECT = pathlib.Path(__file__).resolve().parent.parent


def run_all(
    command_lines: list[tuple[str, ...]], timeout: float = 120
) -> list[subprocess.CompletedProcess]:
    """Returns what became of each (script name, *arguments), in order."""
    command = [sys.executable, "-m", "tests.command_lines"]
    given = json.dumps([[str(part) for part in line] for line in command_lines])
    done = subprocess.run(
        command, cwd=PROJECT, input=given, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return [subprocess.CompletedProcess(*one) for one in zip(command_lines, *found, strict=True)]


def _run_forked(name: str, arguments: list[str], folder: pathlib.Path) -> tuple[int, str, str]:
    paths = folder / "stdout", folder / "stderr"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, path in zip((1, 2), paths, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = [f"scripts/{name}.py", *arguments]
            runpy.run_module(f"scripts.{name}", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), paths[0].read_text(), paths[1].read_text()


def main() -> None:
    """Reads command lines as JSON from stdin, writes [exit codes, stdouts, stderrs]."""
    command_lines = json.load(sys.stdin)
    import longctx_jax.models  # noqa: F401, PLC0415  the slow imports, once

    with tempfile.TemporaryDirectory() as folder:
        done = [_run_forked(name, rest, pathlib.Path(folder)) for name, *rest in command_lines]
    json.dump(list(zip(*done, strict=True)), sys.stdout)


if __name__ == "__main__":
    main()
