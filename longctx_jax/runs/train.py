"""The training split, as a config asks for it, in the form that the loop takes."""

from typing import Any

from longctx_jax import data
from longctx_jax.training.loop import TrainData


def train_data(config: Any, splits: data.Splits, rows: tuple[int, int] | None = None) -> TrainData:
    """Returns the training split as the loop wants it; `rows` of a step as in `make_dataset`."""
    tokenizer = data.build_tokenizer(config.data.tokenizer, config.data.data_dir)
    stream = splits["train"]
    sizes = {
        "seq_len": config.data.seq_len,
        "global_batch_size": config.data.global_batch_size,
        "seed": config.train.seed,
        "order": config.data.order,
    }
    dataset = data.make_dataset(
        stream, tokenizer, **sizes, vocab_size=config.model.vocab_size, rows=rows
    )
    tokens = data.tokenize(stream, tokenizer)
    seq_len, order = config.data.seq_len, config.data.order
    if is_one_document(stream) or data.rows_lie_within_samples(tokens, seq_len, order):
        # No boundary to mask, so fused kernels apply; a wrap at the end of the text goes unmarked.
        dataset = dataset.map(lambda batch: {k: v for k, v in batch.items() if k != "segment_ids"})
    return TrainData(
        dataset=dataset,
        position_of=lambda step: data.position_of(stream, tokenizer, step, **sizes),
        is_bytes=data.each_token_is_a_byte(tokens),
        fingerprint="" if isinstance(stream, data.RowStream) else data.fingerprint(stream),
    )


def is_one_document(stream: data.TextStream) -> bool:
    """Whether a stream has no document boundaries."""
    return len(stream.document_starts) == 1
