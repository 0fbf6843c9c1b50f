"""Writing a file so that it is whole or absent."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import IO


def write_atomically(
    target: pathlib.Path,
    write: Callable[[IO[bytes]], object],
    check: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes `target` through a temporary file beside it, so that it is whole or absent.

    Args:
        target: the file; an older one is replaced.
        write: gets the open temporary file.
        check: gets the temporary file's path before it takes its place; may raise.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = pathlib.Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        if check is not None:
            check(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
