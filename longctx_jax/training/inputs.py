"""What a run is trained and evaluated on, by digest: a path says where something was, not what.

`inputs.json` holds the digest of the tokenizer and of each text that the run reads, and the folder
`tokenizer/` a copy of a tokenizer that is a file. A run goes on, and is evaluated, sampled,
exported and taken weights from, only with the same ones; where the tokenizer's file has changed or
is gone, the copy takes its place. Runs of earlier versions have no such file and are not checked.
"""

import pathlib
import shutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from absl import logging

from longctx_jax import json_files, run_files

MAX_BYTES = 100_000
REMEDY = "restore it from a copy, or use another run"


class Inputs(NamedTuple):
    """Digests of what a run reads.

    Attributes:
        tokenizer: of all that a text's ids depend on; "" = bytes, which are what they are.
        texts: name of a split -> digest of its bytes and document boundaries.
        files: of the tokenizer, first the one that `config.data.tokenizer` names.
    """

    tokenizer: str = ""
    texts: Mapping[str, str] = MappingProxyType({})
    files: tuple[pathlib.Path, ...] = ()


def read_inputs(workdir: pathlib.Path) -> Inputs | None:
    """Returns what a run's folder says of its inputs; None if it says nothing.

    Raises:
        ValueError: if the file holds something else.
    """
    path = workdir / run_files.INPUTS
    if not path.is_file():
        return None
    given = json_files.read_object(path, remedy=REMEDY, max_bytes=MAX_BYTES)
    tokenizer, texts = given.get("tokenizer"), given.get("texts")
    if not isinstance(tokenizer, str) or not isinstance(texts, dict):
        raise ValueError(f"{path} must hold tokenizer and texts: it lacks one of them; {REMEDY}")
    return Inputs(tokenizer, {str(name): str(digest) for name, digest in texts.items()})


def require_same_inputs(workdir: pathlib.Path, inputs: Inputs) -> None:
    """Raises ValueError if the folder's run was trained on something else under the same names."""
    before = read_inputs(workdir)
    if before is None:
        return
    if before.tokenizer != inputs.tokenizer:
        raise ValueError(
            f"a run goes on with the tokenizer it began with: {workdir} has one with digest "
            f"{before.tokenizer[:16]!r}, and config.data.tokenizer is one with "
            f"{inputs.tokenizer[:16]!r}; set it to the copy in {workdir / run_files.TOKENIZER}, or "
            "start a new --workdir"
        )
    for split in sorted(before.texts.keys() & inputs.texts.keys()):
        require_same_text(workdir, split, before.texts[split], inputs.texts[split])


def require_same_text(workdir: pathlib.Path, split: str, before: str, now: str) -> None:
    """Raises ValueError if two digests of a split differ."""
    if before != now:
        raise ValueError(
            f"the text of split {split!r} must be the one of the run: {workdir} has digest "
            f"{before[:16]}, and the files hold one with {now[:16]} now; put the old files back, "
            "or train a new --workdir on the new ones"
        )


def write_inputs(workdir: pathlib.Path, inputs: Inputs) -> None:
    """Writes what the run reads into its folder, and the copy of its tokenizer."""
    before = read_inputs(workdir)
    texts = {**({} if before is None else before.texts), **inputs.texts}
    run_files.write_json(
        workdir / run_files.INPUTS, {"tokenizer": inputs.tokenizer, "texts": texts}
    )
    for path in inputs.files:
        copy = workdir / run_files.TOKENIZER / path.name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = copy.with_name(copy.name + ".tmp")
            shutil.copyfile(path, temporary)
            temporary.replace(copy)


def find_tokenizer(workdir: pathlib.Path, name: str, digest_of: Callable[[str], str]) -> str:
    """Returns the value of `config.data.tokenizer` that is the run's: `name`, or the copy's path.

    Args:
        workdir: of the run.
        name: as its config has it.
        digest_of: value -> digest; raises OSError or ValueError for what is no tokenizer.

    Raises:
        ValueError: if neither is the tokenizer that the run was trained with.
    """
    inputs = read_inputs(workdir)
    if inputs is None:
        return name
    copy = str(workdir.absolute() / run_files.TOKENIZER / pathlib.PurePath(name).name)
    found = []
    for place in (name, copy):
        try:
            digest = digest_of(place)
        except (OSError, ValueError) as error:
            found.append(str(error))
            continue
        if digest == inputs.tokenizer:
            if place != name:
                logging.warning("config.data.tokenizer=%s has changed; using %s", name, place)
            return place
        found.append(f"{place} has digest {digest[:16]!r}")
    raise ValueError(
        f"a run is used with the tokenizer it was trained with: {workdir} needs one with digest "
        f"{inputs.tokenizer[:16]!r}: {'; '.join(found)}; put the old file back"
    )
