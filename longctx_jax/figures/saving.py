"""Pictures in files: a PNG says which rows it was drawn from, so that a stale one is noticed."""

import hashlib
import os
import pathlib

from matplotlib.figure import Figure

KEY = "Rows"  # of the PNG's texts


def save(
    figure: Figure, path: str | os.PathLike[str], rows: str | os.PathLike[str] | None = None
) -> None:
    """Writes a figure, making the folder if need be; the ending of the path sets the format.

    Args:
        figure: what to write.
        path: where.
        rows: the file it was drawn from, whose digest a PNG then holds.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_marked = rows is not None and path.suffix == ".png"
    figure.savefig(path, metadata={KEY: digest(rows)} if is_marked and rows else None)


def digest(rows: str | os.PathLike[str]) -> str:
    """Returns the digest of a file of rows."""
    return hashlib.sha256(pathlib.Path(rows).read_bytes()).hexdigest()


def drawn_from(picture: str | os.PathLike[str]) -> str:
    """Returns the digest of the rows that a PNG was drawn from; "" if it does not say."""
    from PIL import Image  # matplotlib's own dependency

    with Image.open(picture) as image:
        return str(image.info.get(KEY, ""))
