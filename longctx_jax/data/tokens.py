"""What a tokenizer and a stream of tokens are, and checks of the ids against the model.

Bits per byte need the number of raw text bytes behind each token, so a tokenizer reports it. A
separator is a token of 0 bytes between documents. As a target it ends a document and is predicted
from all of it; as an input it begins the next one, so the first token of a document is predicted
from the separator with nothing before it.
"""

import pathlib
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """A reversible map between text bytes and token ids `0 .. vocab_size-1`.

    Attributes:
        name: what messages call it.
        vocab_size: number of ids.
        separator_id: the token that follows each document of a token stream; -1 = none.
        start_id: what stands for it as an input, where it begins a document: a vocabulary may have
            a token of its own for that; separator_id otherwise.
        identity: digest of all that ids and their meaning depend on; "" = bytes.
        files: that the tokenizer was read from.
    """

    name: str
    vocab_size: int
    separator_id: int
    start_id: int
    identity: str
    files: tuple[pathlib.Path, ...]

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the ids of `text` (a `str` is taken as UTF-8), int32 [n_tokens]."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the text bytes that `ids` stand for."""
        ...

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns how many raw text bytes each id stands for, int64, shape of `ids`."""
        ...


class TokenStream(Protocol):
    """A stream of token ids with random access and document boundaries.

    Attributes:
        name: the text stream's.
        n_tokens, n_documents: sizes, at least 1.
        tokenizer: what cut the text.
        sample_len: tokens of each document, its separator included, if documents are samples of one
            size (`TextStream.sample_bytes`); 0 = text. The separator of a sample is no target:
            where a sample ends is known. Evaluation never cuts a sample.
    """

    name: str
    n_tokens: int
    n_documents: int
    tokenizer: Tokenizer
    sample_len: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start .. stop-1`, int32 [stop - start]."""
        ...

    def document_index(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns the document each token position belongs to as an input, int64.

        A separator belongs to the document after it, the last one of the stream to `n_documents`.
        """
        ...

    def byte_offset(self, position: int) -> int:
        """Returns where in the text the token at `position`, 0 .. n_tokens, begins, bytes."""
        ...

    def tokens_within(self, n_bytes: int) -> int:
        """Returns how many whole tokens lie within the first `n_bytes` of the text."""
        ...


def check_ids(ids: np.ndarray, vocab_size: int, what: str, first_position: int = 0) -> None:
    """Raises ValueError unless every id lies in `0 .. vocab_size-1`.

    Args:
        ids: token ids, any shape.
        vocab_size: number of ids the model knows.
        what: where they were read, for the message.
        first_position: position of `ids[0]` in that place.
    """
    ids = np.asarray(ids).ravel()
    if ids.size == 0 or (ids.max() < vocab_size and ids.min() >= 0):
        return
    index = int(np.argmax((ids < 0) | (ids >= vocab_size)))
    raise ValueError(
        f"every token id must lie in 0 .. vocab_size-1: got {int(ids[index])} at position "
        f"{first_position + index} of {what}, vocab_size={vocab_size}; set "
        f"config.model.vocab_size above the largest value (256 covers all bytes)"
    )


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the model knows fewer ids than the tokenizer gives.

    Plain bytes are exempt: a text of few byte values may have a smaller model, see `check_ids`.
    """
    if tokenizer.name != "bytes" and vocab_size < tokenizer.vocab_size:
        raise ValueError(
            "config.model.vocab_size must be at least the tokenizer's: got "
            f"config.model.vocab_size={vocab_size}, and {tokenizer.vocab_size} ids of "
            f"config.data.tokenizer={tokenizer.name!r}; set "
            f"config.model.vocab_size={tokenizer.vocab_size}"
        )


def each_token_is_a_byte(tokens: TokenStream) -> bool:
    """Whether each token that counts in the loss is one byte of text."""
    tokenizer = tokens.tokenizer
    is_bytes = tokenizer.separator_id < 0 or tokens.sample_len > 0
    return is_bytes and tokenizer.name in ("bytes", "delimited_bytes")


def as_inputs(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Returns the ids as a model reads them: where a separator begins a document, `start_id`."""
    if tokenizer.start_id == tokenizer.separator_id:
        return ids
    return np.where(ids == tokenizer.separator_id, np.int32(tokenizer.start_id), ids)


def prompt_ids(tokenizer: Tokenizer, text: bytes | str) -> np.ndarray:
    """Returns the ids of the beginning of a document as a model sees it in training, int32."""
    lead = [tokenizer.start_id] if tokenizer.separator_id >= 0 else []
    return np.concatenate([np.array(lead, np.int32), tokenizer.encode(text)])


def until_separator(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Returns the ids before the first separator, without those the tokenizer does not have.

    Args:
        tokenizer: of the model's training text.
        ids: drawn from the model, [n_tokens]; its vocabulary may be larger than the tokenizer's.
    """
    ids = np.asarray(ids)
    ends = np.flatnonzero(ids == tokenizer.separator_id)
    ids = ids[: ends[0]] if ends.size else ids
    return ids[ids < tokenizer.vocab_size]
