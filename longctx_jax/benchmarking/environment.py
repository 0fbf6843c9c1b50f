"""The environment of a row: device, versions, date, revision, command; nothing of a home folder."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence

import jax

from longctx_jax.benchmarking.rows import DIRTY, Fields

PACKAGES = ("jax", "jaxlib", "flax", "optax")
NO_ROWS = (":(top)", ":(top,exclude)results")  # of git: the whole tree but for results/


def environment(command: str) -> Fields:
    """Returns what every row says of where it was made, and by which command."""
    device = jax.local_devices()[0]
    versions = {f"{name}_version": importlib.metadata.version(name) for name in PACKAGES}
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "n_devices": jax.device_count(),
        "host_cpus": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python_version": platform.python_version(),
        **versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": git_revision(),
        "command": command,
    }


def git_revision(folder: str | os.PathLike[str] = pathlib.Path(__file__).parent) -> str:
    """Returns the commit of the checkout that holds `folder`, "-dirty" if changed, or "unknown".

    Rows recorded since, in results/, are no change of what measures.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.fspath(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *NO_ROWS)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return revision + (DIRTY if changed else "")


def command_line(script: str, arguments: Sequence[str]) -> str:
    """Returns the command for rows, which say nothing about this machine's folders.

    A path inside the working folder is relative to it; of any other its last name is left.
    """
    here = pathlib.Path.cwd().resolve()

    def shorten(text: str) -> str:
        if not text.startswith(("/", "..", "~")):
            return text
        path = pathlib.Path(text).expanduser().resolve()
        return str(path.relative_to(here)) if path.is_relative_to(here) else path.name

    def shorten_argument(argument: str) -> str:
        name, equals, value = argument.rpartition("=")
        return name + equals + ",".join(map(shorten, value.split(",")))

    return shlex.join(["python", "-m", script, *map(shorten_argument, arguments)])


def without_paths(text: str) -> str:
    """Returns the first line of a text, folders of paths left out: rows say nothing about homes."""
    first = next(iter(text.strip().splitlines()), "")
    return re.sub(r"(?<![\w.])(/[\w.+~-]+)+/", "", first)[:300]
