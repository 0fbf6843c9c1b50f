"""From folders to the page: what scripts.report does."""

import datetime
import os
import pathlib
import time
from collections.abc import Sequence

from longctx_jax.reporting import discovery, page
from longctx_jax.reporting.runs import load_run

MAX_RUNS = 200
PAGE_FILE = "index.html"


def write_report(folders: Sequence[pathlib.Path], out: pathlib.Path) -> pathlib.Path:
    """Writes the page about the runs in `folders` to `out/index.html`, and returns its path.

    Args:
        folders: work directories, at least one; those after the first `MAX_RUNS` are left out.
        out: folder of the page; created if missing.
    """
    chosen = folders[:MAX_RUNS]
    now_s = time.time()
    named = zip(chosen, discovery.short_names(chosen), strict=True)
    runs = [load_run(folder, name, now_s) for folder, name in named]
    made_at = datetime.datetime.fromtimestamp(now_s).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    text = page.render(runs, made_at, n_left_out=len(folders) - len(chosen))
    out.mkdir(parents=True, exist_ok=True)
    path = out / PAGE_FILE
    temporary = path.with_suffix(".tmp")
    # Half a character, or a folder's name that is not UTF-8, becomes a question mark.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path
