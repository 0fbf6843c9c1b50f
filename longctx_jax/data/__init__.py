"""Text as random-access byte streams, tokens, and batches in a reproducible order."""

from longctx_jax.data.pipeline import (
    ORDERS,
    Batch,
    evaluation_stripes,
    get_state,
    make_dataset,
    make_iterator,
    position_of,
    set_state,
)
from longctx_jax.data.sources import SOURCES, load_source
from longctx_jax.data.splits import SPLIT_NAMES, Splits
from longctx_jax.data.streams import TextStream, count_words
from longctx_jax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    TokenStream,
    build_tokenizer,
    check_ids,
    tokenize,
)

__all__ = [
    "ORDERS",
    "SOURCES",
    "SPLIT_NAMES",
    "Batch",
    "ByteTokenizer",
    "Splits",
    "TextStream",
    "TokenStream",
    "Tokenizer",
    "build_tokenizer",
    "check_ids",
    "count_words",
    "evaluation_stripes",
    "get_state",
    "load_source",
    "make_dataset",
    "make_iterator",
    "position_of",
    "set_state",
    "tokenize",
]
