"""SentencePiece models as tokenizers, exact to the byte (`subwords.py`).

U+2581, SentencePiece's own stand-in for a space, is written as byte tokens, and no space is put
before a text, whatever the model says: it would belong to no byte. Not here: training a model
(`sentencepiece_training.py`).
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from longctx_jax import json_files
from longctx_jax.data.subwords import NOT_UTF8, SubwordTokenizer

FILE_MAX_BYTES = 200_000_000
REMEDY = "copy it again, or train one with scripts.train_tokenizer"
SPACE = "\u2581"  # how SentencePiece writes a space
# Appended to a model: normalizer_spec.add_dummy_prefix = false (fields of a message merge).
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def import_sentencepiece() -> Any:
    """Returns the package `sentencepiece`; raises ImportError naming the extra that has it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            "a SentencePiece model in config.data.tokenizer needs the package sentencepiece, which "
            f'cannot be imported ({error}); run `pip install "longctx_jax[text]"`, or set '
            "config.data.tokenizer='bytes'"
        ) from error
    return sentencepiece


class SentencePieceTokenizer(SubwordTokenizer):
    """The tokens of a SentencePiece model with byte fallback."""

    kind = "a SentencePiece model"
    remedy = "use a model without normalisation, as scripts.train_tokenizer makes"

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the model file.

        Raises:
            ImportError: if sentencepiece is not installed.
            ValueError: if it is no model, or one without byte fallback or end-of-sentence token.
        """
        model = json_files.read_limited(path, FILE_MAX_BYTES, remedy=REMEDY)
        self._processor = _open_model(model, str(path))
        separator_id, start_id = self._processor.eos_id(), self._processor.bos_id()
        byte_ids = _byte_ids(self._processor, str(path))
        if separator_id < 0:
            raise ValueError(
                f"a SentencePiece model must have an end-of-sentence token: {path} has none; "
                "train one with scripts.train_tokenizer"
            )
        super().__init__(
            pathlib.Path(path),
            digest=hashlib.sha256(model).hexdigest(),
            texts=_texts(self._processor, str(path)),
            byte_ids=byte_ids,
            separator_id=separator_id,
            start_id=separator_id if start_id < 0 else start_id,
            as_bytes=SPACE + NOT_UTF8,
        )

    def _encode_parts(self, parts: list[str]) -> Iterable[Sequence[int]]:
        try:
            return self._processor.encode(parts, out_type=int)
        except RuntimeError as error:
            raise ValueError(
                f"a SentencePiece model must cut every text: {self.name} does not ({error}); "
                f"{REMEDY}"
            ) from error


def _open_model(model: bytes, name: str) -> Any:
    processor = import_sentencepiece().SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model + NO_DUMMY_PREFIX)
    except (RuntimeError, UnicodeDecodeError) as error:  # messages of the library hold raw bytes
        raise ValueError(
            f"config.data.tokenizer must be a SentencePiece model file: {name} cannot be read "
            f"({error}); {REMEDY}"
        ) from error
    return processor


def _byte_ids(processor: Any, name: str) -> np.ndarray:
    """Returns the id of each byte's token, int32 [256]."""
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    if not all(processor.is_byte(index) for index in ids):
        raise ValueError(
            f"a SentencePiece model must have byte fallback, so that it covers every text: {name} "
            "has none; train one with scripts.train_tokenizer"
        )
    return np.array(ids, np.int32)


def _texts(processor: Any, name: str) -> list[bytes]:
    """Returns the bytes that each token stands for."""
    try:
        return [_text_of(processor, index) for index in range(processor.vocab_size())]
    except ValueError as error:  # pieces that are not UTF-8, or name no byte
        raise ValueError(
            f"the pieces of a SentencePiece model must be text: {name} has others ({error}); "
            f"{REMEDY}"
        ) from error


def _text_of(processor: Any, index: int) -> bytes:
    """Returns the bytes that the token `index` stands for; none for a control token."""
    piece = processor.id_to_piece(index)
    if processor.is_byte(index):
        return bytes([int(piece[3:5], 16)])
    if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
        return b""
    return piece.replace(SPACE, " ").encode("utf-8")
