"""Training a SentencePiece model on the start of a text stream.

Byte-pair encoding without normalisation, with a token for every byte and every character seen: the
settings published for PG-19, plus those that keep text exact (`sentencepiece.py`). Ids: 0 padding,
1 end of sentence, 2 unknown (never produced), 3 .. 258 bytes, then sub-words.
"""

import io
from collections.abc import Iterator

from longctx_jax.data.sentencepiece import import_sentencepiece
from longctx_jax.data.streams import TextStream
from longctx_jax.data.subwords import cut_at_spaces

PIECE_BYTES = 4096  # of text, a "sentence" of the trainer
READ_BYTES = 1 << 24
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2


def train_model(
    stream: TextStream, *, vocab_size: int, max_bytes: int = 0, character_coverage: float = 1.0
) -> bytes:
    """Returns a model file trained on the first max_bytes of a stream; the same for the same input.

    Args:
        stream: the training split.
        vocab_size: number of ids, those of control tokens and bytes included.
        max_bytes: of the stream; 0 = all.
        character_coverage: share of the characters that get a token of their own; the others are
            written as bytes.

    Raises:
        ImportError: if sentencepiece is not installed.
        ValueError: if the text does not fit the vocabulary size.

    Cost: the text is held in memory several times over.
    """
    if stream.sample_bytes:
        raise ValueError(
            f"a tokenizer is trained on text: {stream.name} holds samples of {stream.sample_bytes} "
            "bytes; set config.data.tokenizer='delimited_bytes' for them"
        )
    if max_bytes < 0:
        raise ValueError(f"max_bytes must not be negative: got {max_bytes}; 0 takes all text")
    package = import_sentencepiece()
    model = io.BytesIO()
    try:
        package.SentencePieceTrainer.train(
            sentence_iterator=_pieces(stream, max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            max_sentence_length=PIECE_BYTES,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).rpartition("] ")[2].strip()  # without its source line and condition
        raise ValueError(
            f"vocab_size must suit the text: SentencePiece refuses {vocab_size} for {stream.name} "
            f"({reason}); change --vocab_size, --max_bytes or --character_coverage"
        ) from error
    return model.getvalue()


def _pieces(stream: TextStream, max_bytes: int) -> Iterator[str]:
    """Yields the text in pieces of at most `PIECE_BYTES`."""
    end = min(max_bytes, stream.n_bytes) if max_bytes else stream.n_bytes
    for start in range(0, end, READ_BYTES):
        raw = stream.read(start, min(start + READ_BYTES, end)).tobytes()
        for first, last in cut_at_spaces(raw, PIECE_BYTES):
            yield raw[first:last].decode("utf-8", "ignore")
