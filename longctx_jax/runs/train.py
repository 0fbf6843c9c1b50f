"""The training split, as a config asks for it, in the form that the loop takes."""

from typing import Any

from longctx_jax import data
from longctx_jax.training.inputs import Inputs
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
        fingerprint=_digest(stream),
        inputs=inputs_of(config, splits),
        require_unchanged=data.FilesUnchanged(stream),
    )


def inputs_of(config: Any, splits: data.Splits) -> Inputs:
    """Returns the digests of what a config's run reads: its tokenizer, and two texts at most."""
    tokenizer = data.build_tokenizer(config.data.tokenizer, config.data.data_dir)
    names = dict.fromkeys(("train", config.eval.split))
    texts = {name: _digest(splits[name]) for name in names if name in splits}
    texts = {name: digest for name, digest in texts.items() if digest}
    return Inputs(tokenizer.identity, texts, tuple(tokenizer.files))


def _digest(stream: data.TextStream) -> str:
    """Returns the digest of a text; "" for rows that are drawn from a seed."""
    return "" if isinstance(stream, data.RowStream) else data.fingerprint(stream)


def is_one_document(stream: data.TextStream) -> bool:
    """Whether a stream has no document boundaries."""
    return len(stream.document_starts) == 1
