"""Text as random-access byte streams, tokens, and batches in a reproducible order."""

from longctx_jax.data.byte_tokens import ByteTokenizer
from longctx_jax.data.pipeline import (
    ORDERS,
    Batch,
    evaluation_stripes,
    get_state,
    make_dataset,
    make_iterator,
    position_of,
    rows_lie_within_samples,
    set_state,
)
from longctx_jax.data.recall import RECALL_NAMES, RowBatches, RowStream
from longctx_jax.data.sources import SOURCES, load_source
from longctx_jax.data.splits import SPLIT_NAMES, Splits
from longctx_jax.data.streams import FilesUnchanged, TextStream, count_words
from longctx_jax.data.token_cache import fingerprint
from longctx_jax.data.tokenizers import build_tokenizer, tokenize
from longctx_jax.data.tokens import (
    Tokenizer,
    TokenStream,
    check_ids,
    each_token_is_a_byte,
    prompt_ids,
    until_separator,
)

__all__ = [
    "ORDERS",
    "RECALL_NAMES",
    "SOURCES",
    "SPLIT_NAMES",
    "Batch",
    "ByteTokenizer",
    "FilesUnchanged",
    "RowBatches",
    "RowStream",
    "Splits",
    "TextStream",
    "TokenStream",
    "Tokenizer",
    "build_tokenizer",
    "check_ids",
    "count_words",
    "each_token_is_a_byte",
    "fingerprint",
    "evaluation_stripes",
    "get_state",
    "load_source",
    "make_dataset",
    "make_iterator",
    "position_of",
    "prompt_ids",
    "rows_lie_within_samples",
    "set_state",
    "tokenize",
    "until_separator",
]
