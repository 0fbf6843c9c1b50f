"""One HTML page about runs: python -m scripts.report --runs=GLOB[,GLOB ...] --out=DIR.

GLOB matches work directories, or folders of them such as a sweep's; quote it. The page,
DIR/index.html, needs no network and no other file. docs/report.md tells what it shows.
"""

import pathlib

from absl import flags

from scripts import common

_RUNS = flags.DEFINE_string("runs", None, "Folders or globs of runs, e.g. 'runs/*'.", required=True)
_OUT = flags.DEFINE_string("out", "runs/report", "Folder of the page, index.html.")


def main(arguments: list[str]) -> None:
    """Finds the runs, writes the page, says where."""
    del arguments
    from longctx_jax.reporting import discovery, report

    folders = discovery.find_runs(_RUNS.value)
    path = report.write_report(folders, pathlib.Path(_OUT.value))
    print(f"wrote {path}: {min(len(folders), report.MAX_RUNS)} of {len(folders)} run(s)")


if __name__ == "__main__":
    common.run(main)
