"""One trainer a work directory: a lock that the system lets go of when its holder dies."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from longctx_jax import run_files


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the folder for the time of the context.

    Raises:
        BlockingIOError: another process trains there; says which.
    """
    path = workdir / run_files.LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise BlockingIOError(
                f"a work directory belongs to one trainer at a time: {workdir} is in use by "
                f"{holder}; wait for it, stop it, or choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
