"""Tokenizers by the value of `config.data.tokenizer`, and a text stream as a stream of tokens.

Another tokenizer adds a file beside `sentencepiece.py` and `hf_tokenizer.py` and a line here;
nothing downstream of `tokenize` knows which one it reads.
"""

import pathlib

from longctx_jax.data.byte_tokens import (
    ByteTokenizer,
    ByteTokenStream,
    DelimitedByteStream,
    DelimitedByteTokenizer,
)
from longctx_jax.data.hf_tokenizer import HFTokenizer
from longctx_jax.data.recall import RowStream, RowTokenStream
from longctx_jax.data.sentencepiece import SentencePieceTokenizer
from longctx_jax.data.splits import resolve_data_dir
from longctx_jax.data.streams import TextStream
from longctx_jax.data.subwords import SubwordTokenizer, load_once
from longctx_jax.data.tokens import Tokenizer, TokenStream

TOKENIZERS = {"bytes": ByteTokenizer, "delimited_bytes": DelimitedByteTokenizer}
PROBE = b"the quick brown fox jumps over the lazy dog, again and again " * 3
FILES = {".model": SentencePieceTokenizer, ".json": HFTokenizer}  # by suffix


def build_tokenizer(name: str, data_dir: str = "") -> Tokenizer:
    """Returns the tokenizer called `name`, the value of `config.data.tokenizer`.

    Args:
        name: one of `TOKENIZERS`, or the path of a SentencePiece model (*.model) or of a
            `tokenizer.json`, relative to the current folder or to the data folder.
        data_dir: `config.data.data_dir`.

    Raises:
        ValueError: for a name not in the list that is no such file's, or a file that does not fit.
        FileNotFoundError: for a file that is not there, with the command that trains one.
        ImportError: if sentencepiece or tokenizers is needed and not installed.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    path = pathlib.Path(name).expanduser()
    if path.suffix not in FILES:
        raise ValueError(
            f"config.data.tokenizer must be one of {sorted(TOKENIZERS)} or the path of a "
            f"SentencePiece model file, *.model, or of a tokenizer.json: got {name!r}; set it to "
            "one of them"
        )
    candidates = list(dict.fromkeys((path.absolute(), resolve_data_dir(data_dir) / path)))
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"config.data.tokenizer must be a file: {' and '.join(map(str, candidates))} "
            f"{'do' if len(candidates) > 1 else 'does'} not exist; train one with `python -m "
            f"scripts.train_tokenizer --config=configs/NAME.py --out={path.with_suffix('.model')} "
            "--vocab_size=32000`"
        )
    tokenizer = load_once(FILES[path.suffix], found)
    require_one_encoding(tokenizer)
    return tokenizer


def require_one_encoding(tokenizer: Tokenizer) -> None:
    """Raises ValueError if the same text is encoded in two ways: the cache would keep one draw."""
    try:
        found = {tuple(tokenizer.encode(PROBE).tolist()) for _ in range(4)}
    except ValueError:  # it cannot keep this text as it is: said of the user's text, where it is
        return
    if len(found) > 1:
        raise ValueError(
            f"config.data.tokenizer must encode a text in one way: {tokenizer.name} draws at "
            "random (dropout of merges, sampling); save it without, or set "
            "config.data.tokenizer='bytes'"
        )


def tokenize(stream: TextStream, tokenizer: Tokenizer) -> TokenStream:
    """Returns `stream` as tokens of `tokenizer`; a learned one encodes the text on first use.

    Raises:
        ValueError: for samples of one size (images) without a separator of bytes, or rows of a
            recall task with anything but bytes.
        NotImplementedError: for a tokenizer without a token stream.
    """
    if isinstance(stream, RowStream):
        return RowTokenStream(stream, tokenizer)
    if isinstance(tokenizer, DelimitedByteTokenizer):
        return DelimitedByteStream(stream, tokenizer)
    if stream.sample_bytes:
        raise ValueError(
            f"config.data.tokenizer must be 'delimited_bytes' for {stream.name}, whose documents "
            f"are samples of {stream.sample_bytes} bytes: got {tokenizer.name!r}; set it, and "
            f"config.model.vocab_size={DelimitedByteTokenizer.vocab_size}"
        )
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenStream(stream, tokenizer)
    if isinstance(tokenizer, SubwordTokenizer):
        return tokenizer.stream(stream)
    raise NotImplementedError(
        f"no token stream for tokenizer {tokenizer.name!r}; set config.data.tokenizer='bytes'"
    )
