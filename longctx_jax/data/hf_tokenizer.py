"""`tokenizer.json` of the library `tokenizers`, exact to the byte (`subwords.py`).

Two kinds cover every text: byte-level ones (GPT-2, LLaMA 3, Qwen), whose pieces are bytes written
as characters, and those with byte fallback (LLaMA 1 and 2, Mistral), which write a space as U+2581.
What would change the text is taken out: a space before it, canonical composition (text that is not
composed keeps its bytes), and special tokens, which no text contains. So is what draws at random:
dropout of merges. The tokens that begin and end
a document are those of `tokenizer_config.json` beside the file. Not here: chat templates.

Source: the file's description at huggingface.co/docs/tokenizers; characters of bytes: Radford et
al. (2019), encoder.py.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from longctx_jax import json_files
from longctx_jax.data.subwords import NOT_UTF8, SubwordTokenizer

SPACE = "\u2581"
CONFIG_FILE = "tokenizer_config.json"
DROPPED_NORMALIZERS = ("Prepend", "NFC")
FILE_MAX_BYTES = 64_000_000  # parsed, it takes up to 30 times as much memory
MAX_IDS = 1 << 22
# where tokenizer_config.json does not say
USUAL_ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


def import_tokenizers() -> Any:
    """Returns the package `tokenizers`; raises ImportError naming the extra that has it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "a tokenizer.json in config.data.tokenizer needs the package tokenizers, which cannot "
            f'be imported ({error}); run `pip install "longctx_jax[hf]"`, or set '
            "config.data.tokenizer='bytes'"
        ) from error
    return tokenizers


class HFTokenizer(SubwordTokenizer):
    """The tokens of a `tokenizer.json` that covers all bytes."""

    kind = "a tokenizer.json"
    companions = (CONFIG_FILE,)
    remedy = "use one whose normaliser keeps text, or set config.data.tokenizer='bytes'"

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the file and, for the ends of documents, `tokenizer_config.json` beside it.

        Raises:
            ImportError: if tokenizers is not installed.
            ValueError: if it is no such file, does not cover all bytes, or ends no document.
        """
        path = pathlib.Path(path)
        package = import_tokenizers()
        raw = json_files.read_limited(path, FILE_MAX_BYTES, remedy="download it again")
        with _named(f"config.data.tokenizer must be a tokenizer.json: {path} cannot be read"):
            spec = json_files.parse_object(raw, str(path), remedy="download it again")
            is_byte_level = _is_byte_level(spec)
            has_fallback = bool(spec["model"].get("byte_fallback"))
            self._library = package.Tokenizer.from_str(json.dumps(_exact(spec)))
            added = {token["content"]: token["special"] for token in spec.get("added_tokens") or ()}
            added = {spec["model"].get("unk_token"): True} | added
        self._library.encode_special_tokens = True  # as text
        ids = self._library.get_vocab(with_added_tokens=True)
        if is_byte_level:
            byte_names = [BYTE_CHARACTERS[byte] for byte in range(256)]
        else:
            byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
        if not (is_byte_level or has_fallback) or any(name not in ids for name in byte_names):
            raise ValueError(
                "a tokenizer.json must be byte-level or have byte fallback, so that it covers "
                f"every text: {path} is not; use another one"
            )
        separator_id, start_id = _ends(path, ids)
        digest = hashlib.sha256(raw + f"{separator_id}".encode()).hexdigest()
        super().__init__(
            path,
            digest=digest,
            texts=_texts(
                ids,
                added,
                path,
                _bytes_of if is_byte_level else _fallback_text,
            ),
            byte_ids=np.array([ids[name] for name in byte_names], np.int32),
            separator_id=separator_id,
            start_id=start_id,
            as_bytes=NOT_UTF8 if is_byte_level else SPACE + NOT_UTF8,
        )

    def _encode_parts(self, parts: list[str]) -> Iterable[Sequence[int]]:
        with _named(f"a tokenizer.json must cut every text: {self.name} does not"):
            return [e.ids for e in self._library.encode_batch_fast(parts, add_special_tokens=False)]


@contextlib.contextmanager
def _named(problem: str) -> Iterator[None]:
    """Whatever a description makes the library raise becomes a ValueError with this message.

    The library raises plain Exception, and where its code panics an exception that is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{problem} ({error}); download it again") from error
        raise


def _texts(
    ids: dict[str, int],
    added: dict[str, bool],
    path: pathlib.Path,
    text_of: Callable[[str], bytes],
) -> list[bytes]:
    """Returns the bytes each id stands for, none for special tokens and ids without a token.

    Args:
        ids: of all tokens.
        added: tokens beside the vocabulary, and that for unknown text: whether they are special.
        path: of the file, for the message.
        text_of: from the name of a token of the vocabulary.
    """
    n_ids = max(ids.values()) + 1
    if n_ids > MAX_IDS:
        raise ValueError(
            f"a tokenizer.json must have ids below {MAX_IDS}: {path} has {n_ids - 1}; use another "
            "one"
        )
    texts = [b""] * n_ids
    for name, index in ids.items():
        if not added.get(name):
            texts[index] = name.encode("utf-8") if name in added else text_of(name)
    return texts


def _byte_characters() -> list[str]:
    """Returns the character that stands for each byte in byte-level pieces."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(b) if b in others else b) for b in range(256)]


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def _bytes_of(piece: str) -> bytes:
    return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else b""


def _fallback_text(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode("utf-8")


def _steps(component: Any) -> list[dict[str, Any]]:
    """Returns the steps of a normaliser, pre-tokenizer or decoder, which may be a sequence."""
    if not component:
        return []
    if component["type"] != "Sequence":
        return [component]
    (inner,) = (value for value in component.values() if isinstance(value, list))
    return [step for part in inner for step in _steps(part)]


def _is_byte_level(spec: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(spec.get("pre_tokenizer")))


def _exact(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the description without what changes or cuts text."""
    normalizers = _steps(spec.get("normalizer"))
    normalizers = [step for step in normalizers if step["type"] not in DROPPED_NORMALIZERS]
    cutters = []
    for step in _steps(spec.get("pre_tokenizer")):
        if step["type"] == "ByteLevel":
            step = step | {"add_prefix_space": False}
        elif step["type"] == "Metaspace":
            step = {k: v for k, v in step.items() if k != "add_prefix_space"}
            step |= {"prepend_scheme": "never"}
        cutters.append(step)
    model = spec["model"]
    if model.get("dropout"):  # of merges, in training: a text would have other tokens each time
        model = model | {"dropout": None}
    return spec | {
        "model": model,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutters} if cutters else None,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _ends(path: pathlib.Path, ids: dict[str, int]) -> tuple[int, int]:
    """Returns the ids of the separator, and of what begins a document.

    Raises:
        ValueError: if no token ends a document, or a named one is not in the vocabulary.
    """
    config: dict[str, Any] = {}
    beside = path.with_name(CONFIG_FILE)
    if beside.is_file():
        config = json_files.read_object(beside, remedy="download it again")

    def index_of(name: str) -> int:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return -1
        if not isinstance(token, str) or token not in ids:
            raise ValueError(
                f"{beside}: {name} must be a token of {path.name}: got {token!r:.100}, which has "
                "no id there; name another one, or take the field out"
            )
        return ids[token]

    end = index_of("eos_token")
    if end < 0:
        end = next((ids[name] for name in USUAL_ENDS if name in ids), -1)
    if end < 0:
        raise ValueError(
            f"a tokenizer.json must have a token that ends a document: {path} has none of "
            f"{list(USUAL_ENDS)}; name it as eos_token in {CONFIG_FILE} beside the file"
        )
    start = index_of("bos_token") if config.get("add_bos_token", True) is not False else -1
    return end, start if start >= 0 else end
