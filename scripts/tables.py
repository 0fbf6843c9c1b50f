"""Fills the tables of README and docs from results/: python -m scripts.tables [--check].

Between `<!-- table: name -->` and `<!-- /table -->` stands what the rows say; --check writes
nothing, and fails where a page says something else. Definitions:
`longctx_jax/reporting/result_tables/`.
"""

import pathlib

from absl import flags

from longctx_jax.reporting.result_tables import pages
from scripts import common

_CHECK = flags.DEFINE_bool("check", False, "Only say which pages differ from the rows.")


def main(arguments: list[str]) -> None:
    """Fills, or checks."""
    del arguments
    root = pathlib.Path.cwd()
    changed = []
    for path in pages.pages(root):
        text = path.read_text()
        try:
            filled = pages.fill(text, root / "results")
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)}: {error}") from error
        if filled != text:
            changed.append(str(path.relative_to(root)))
            if not _CHECK.value:
                path.write_text(filled)
    if _CHECK.value and changed:
        raise ValueError(
            f"tables must say what results/ says: {', '.join(changed)} do not; run python -m "
            "scripts.tables"
        )
    print(f"{', '.join(changed) or 'no page'} changed")


if __name__ == "__main__":
    common.run(main)
