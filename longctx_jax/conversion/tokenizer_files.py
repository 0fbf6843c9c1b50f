"""The tokenizer files of a checkpoint folder: which one to use, and copies of them."""

import pathlib
import shutil

# In order of preference; the others say how the reference library uses them.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
MAX_BYTES = 200_000_000  # a file; larger ones are no tokenizers


def find_tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the file that `config.data.tokenizer` can name, None if a folder has none."""
    paths = [folder / name for name in TOKENIZERS]
    return next((path for path in paths if path.is_file()), None)


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies the tokenizer files of a folder into another, made if missing; returns their names.

    Raises:
        ValueError: if a file is too large to be one.
    """
    paths = [source / name for name in (*TOKENIZERS, *COMPANIONS)]
    paths = [path for path in paths if path.is_file()]
    for path in paths:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"a tokenizer file must be at most {MAX_BYTES} bytes: {path} has "
                f"{path.stat().st_size}; move it out of the folder"
            )
    if paths:
        target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in paths]
