"""Batches in an order that is a function of (seed, step, global batch size) alone.

Grain gives the order: an index dataset whose item `i` is where row `i` starts (row `b` of step `s`
is item `s * global_batch_size + b`); a process reads the rows of its devices. So neither the number
of processes, nor threads, nor a restart changes what a step contains. Two
orders exist: "stripes", where row b of a batch continues row b of the last one, and "shuffled"
windows. Evaluation has its own walk over a split, `evaluation_stripes`. Rows of a recall task are
made, item i of the order being row i. Not here: moving batches to devices.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from longctx_jax.data.recall import RowBatches, RowTokenStream, training_row
from longctx_jax.data.streams import TextStream
from longctx_jax.data.tokenizers import tokenize
from longctx_jax.data.tokens import (
    Tokenizer,
    TokenStream,
    as_inputs,
    check_ids,
    check_vocab_size,
)

# Fields of a batch, each [rows, seq_len]: tokens int32 (inputs), targets int32 (the next tokens),
# weights float32 (1 = counts), segment_ids int32 (document of each input token: constant within a
# document, growing along a row's stream). Evaluation adds target_bytes int32 (text bytes a target).
Batch = dict[str, np.ndarray]

ORDERS = ("stripes", "shuffled")
MAX_SEED = 2**32 - 1
_N_STRIPE_ROWS = 2**62  # "for ever"
_SEGMENT_MODULUS = 2**31  # segment ids stay non-negative int32
DEFAULT_THREADS = 4  # a row costs a copy from a memory map: more threads only contend
PREFETCH_PER_THREAD = 2  # batches held ready


def make_dataset(
    stream: TextStream,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    order: str,
    vocab_size: int,
    rows: tuple[int, int] | None = None,
) -> grain.MapDataset[Batch]:
    """Returns an endless dataset whose item `s` is this process's batch of step `s`.

    stripes: row b is the cyclic stream that starts at token (offset(seed) + b * (N // B)) mod N,
    for ever; step s has its tokens s * seq_len onwards. Each return to the start of the stream adds
    the number of documents to the segment ids. shuffled: the (N - 1) // seq_len windows of seq_len
    inputs are put in a fresh order each epoch; a batch may span two epochs. Where seq_len divides
    the bytes of a sample (`TokenStream.sample_len` - 1), windows are aligned: the first one of each
    sample has the separator before it as its first input, and no separator is a target. A recall
    task has no segment_ids and only the order "shuffled"; its rows depend on the seed, too.

    Args:
        stream: text of one split.
        tokenizer: how to cut it.
        seq_len: tokens a row.
        global_batch_size: rows a step, over all processes.
        seed: of the order.
        order: "stripes" or "shuffled".
        vocab_size: number of ids the model knows; a batch with others raises ValueError.
        rows: first row of a step to read, and the one after the last; None = all.

    Returns:
        A random-access dataset of `Batch` with these rows.

    Raises:
        ValueError: for settings that contradict each other or a stream too short for one batch.
    """
    check_vocab_size(tokenizer, vocab_size)
    tokens = tokenize(stream, tokenizer)
    starts = _row_starts(tokens, seq_len, global_batch_size, seed, order)
    if isinstance(tokens, RowTokenStream):
        read = functools.partial(training_row, tokens.rows, seed, vocab_size)
    else:
        read = functools.partial(_read_row, tokens, seq_len, vocab_size)
    first, stop = rows or (0, global_batch_size)
    if not 0 <= first < stop <= global_batch_size:
        raise ValueError(
            f"rows must lie in 0 .. {global_batch_size} (config.data.global_batch_size): got "
            f"{first} .. {stop}; read at least one"
        )

    def read_rows(starts: np.ndarray) -> Batch:
        batch = [read(start) for start in starts[first:stop]]
        return {field: np.stack([row[field] for row in batch]) for field in batch[0]}

    return starts.batch(global_batch_size).map(read_rows)


def rows_lie_within_samples(tokens: TokenStream, seq_len: int, order: str) -> bool:
    """Whether training rows are aligned with samples, so that no row crosses a boundary."""
    is_cut_whole = tokens.sample_len > 0 and (tokens.sample_len - 1) % seq_len == 0
    return order == "shuffled" and is_cut_whole


def position_of(
    stream: TextStream,
    tokenizer: Tokenizer,
    step: int,
    *,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    order: str,
) -> str:
    """Returns words for a message: where row 0 of a step lies; arguments as `make_dataset`."""
    tokens = tokenize(stream, tokenizer)
    start = _row_starts(tokens, seq_len, global_batch_size, seed, order)[step * global_batch_size]
    assert start is not None, "the dataset of starts is endless"
    if isinstance(tokens, RowTokenStream):
        return f"source={tokens.name} step={step} row={start} seed={seed}"
    position = start % tokens.n_tokens
    return (
        f"source={tokens.name} step={step} row=0 byte_offset={tokens.byte_offset(position)} "
        f"document={int(tokens.document_index(position))} order={order} seed={seed}"
    )


def make_iterator(
    dataset: grain.MapDataset[Batch], start_step: int = 0, n_workers: int = 0
) -> grain.DatasetIterator[Batch]:
    """Returns an iterator over steps `start_step`, `start_step + 1`, ... that reads ahead.

    Its state is `{"next_index": step}`, so it starts at any step at no cost.

    Args:
        dataset: from `make_dataset`.
        start_step: the first step.
        n_workers: threads, `config.data.n_workers`; 0 = `DEFAULT_THREADS`.
    """
    if n_workers < 0:
        raise ValueError(
            f"config.data.n_workers must be at least 0: got {n_workers}; 0 is the library's choice"
        )
    n_threads = n_workers or DEFAULT_THREADS
    options = grain.ReadOptions(
        num_threads=n_threads, prefetch_buffer_size=PREFETCH_PER_THREAD * n_threads
    )
    iterator = iter(dataset.to_iter_dataset(options))
    set_state(iterator, {"next_index": start_step})
    return iterator


def get_state(iterator: grain.DatasetIterator[Batch]) -> dict[str, int]:
    """Returns where the iterator stands: `{"next_index": step}` of the batch it gives next."""
    return dict(iterator.get_state())


def set_state(iterator: grain.DatasetIterator[Batch], state: dict[str, Any]) -> None:
    """Moves the iterator to a state from `get_state`, at no cost.

    Raises:
        ValueError: if the state is not `{"next_index": step}` with a step >= 0.
    """
    step = state.get("next_index")
    if set(state) != {"next_index"} or not isinstance(step, int) or step < 0:
        raise ValueError(f'a data state must be {{"next_index": step >= 0}}: got {state}')
    iterator.set_state(state)


def _row_starts(
    tokens: TokenStream, seq_len: int, global_batch_size: int, seed: int, order: str
) -> grain.MapDataset[int]:
    """Returns the dataset of the token positions where rows start, counted on past the end.

    Item `s * global_batch_size + b` is row b of step s over all processes.
    """
    for field, value in (("seq_len", seq_len), ("global_batch_size", global_batch_size)):
        if value < 1:
            raise ValueError(f"config.data.{field} must be at least 1: got {value}; raise it")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"config.train.seed must lie in 0 .. {MAX_SEED}: got {seed}; change it")
    if isinstance(tokens, RowTokenStream):
        _require_rows(tokens, seq_len, order)
        return grain.MapDataset.range(tokens.n_documents)
    if order == "stripes":
        if tokens.n_tokens < 2 * global_batch_size:
            raise _too_short(tokens, seq_len, global_batch_size, order, 2 * global_batch_size)
        start = functools.partial(
            _stripe_start, tokens.n_tokens, seq_len, global_batch_size, _offset(tokens, seed)
        )
        return grain.MapDataset.range(_N_STRIPE_ROWS).map(start)
    if order == "shuffled":
        is_aligned = rows_lie_within_samples(tokens, seq_len, order)
        sample_len = tokens.sample_len if is_aligned else tokens.n_tokens
        n_windows = (tokens.n_tokens // sample_len) * ((sample_len - 1) // seq_len)
        if n_windows < global_batch_size:
            needed = seq_len * global_batch_size + 1
            raise _too_short(tokens, seq_len, global_batch_size, order, needed)
        windows = grain.MapDataset.range(n_windows).seed(seed).shuffle().repeat()
        first = -1 if is_aligned else 0  # -1: the separator before the first sample
        return windows.map(functools.partial(_window_start, first, sample_len, seq_len))
    raise ValueError(
        f"config.data.order must be one of {ORDERS}: got {order!r}; set it to one of them"
    )


def _require_rows(tokens: RowTokenStream, seq_len: int, order: str) -> None:
    """Checks what the rows of a recall task are read with."""
    if order != "shuffled":
        raise ValueError(
            f"config.data.order must be 'shuffled' for {tokens.name}, whose rows stand alone: got "
            f"{order!r}; set it"
        )
    if seq_len != tokens.sample_len:
        raise ValueError(
            f"the rows of {tokens.name} were made with config.data.seq_len={tokens.sample_len}: "
            f"got seq_len={seq_len}; load the source with this config.data"
        )


def _too_short(
    tokens: TokenStream, seq_len: int, global_batch_size: int, order: str, needed: int
) -> ValueError:
    return ValueError(
        f"{tokens.name} must have at least {needed} tokens for one batch in order {order!r}: it "
        f"has {tokens.n_tokens}, with seq_len={seq_len}, global_batch_size={global_batch_size}; "
        "lower config.data.global_batch_size or config.data.seq_len, or give more text"
    )


def _offset(tokens: TokenStream, seed: int) -> int:
    """Returns where stripe 0 begins; a hash, so that it never depends on a library's version."""
    digest = hashlib.sha256(f"stripes {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % tokens.n_tokens


def _stripe_start(
    n_tokens: int, seq_len: int, global_batch_size: int, offset: int, index: int
) -> int:
    """Returns where row `index` starts, counting on past the end of the cyclic stream.

    A stripe that begins beyond the end begins on the next lap; laps only ever count up along it.
    """
    step, row = divmod(int(index), global_batch_size)
    return offset + row * (n_tokens // global_batch_size) + step * seq_len


def _window_start(first: int, sample_len: int, seq_len: int, index: int) -> int:
    """Returns where window `index` starts: each sample has (sample_len - 1) // seq_len of them."""
    sample, window = divmod(int(index), (sample_len - 1) // seq_len)
    return first + sample * sample_len + window * seq_len


def _read_row(tokens: TokenStream, seq_len: int, vocab_size: int, start: int) -> Batch:
    """Returns one row, fields [seq_len], of the cyclic stream from `start` on."""
    row, segments = _read_cyclic(tokens, start, seq_len + 1, vocab_size)
    return {
        "tokens": as_inputs(tokens.tokenizer, row[:-1]),
        "targets": row[1:],
        "weights": _weights(tokens, row[1:]),
        "segment_ids": (segments[:-1] % _SEGMENT_MODULUS).astype(np.int32),
    }


def _read_cyclic(
    tokens: TokenStream, start: int, count: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids int32 and documents int64 [count] of the cyclic stream from `start` on.

    Position -1 is the last token of the lap before: a separator that begins document 0, if the
    tokenizer has separators. vocab_size 0 = ids are not checked.
    """
    lap, position = divmod(start, tokens.n_tokens)
    ids, documents = [], []
    while count:
        stop = min(position + count, tokens.n_tokens)
        piece = tokens.read(position, stop)
        if vocab_size:
            check_ids(piece, vocab_size, tokens.name, position)
        ids.append(piece)
        index = tokens.document_index(np.arange(position, stop))
        documents.append(index + lap * tokens.n_documents)
        count -= stop - position
        lap, position = lap + 1, 0
    return np.concatenate(ids), np.concatenate(documents)


def _weights(tokens: TokenStream, targets: np.ndarray) -> np.ndarray:
    """Returns 1 for each target that counts, float32: all but the separators of samples."""
    if tokens.sample_len:
        return (targets != tokens.tokenizer.separator_id).astype(np.float32)
    return np.ones(targets.shape, np.float32)


def evaluation_stripes(
    tokens: TokenStream,
    *,
    batch_size: int,
    seq_len: int,
    max_bytes: int = 0,
    vocab_size: int = 0,
) -> Iterator[Batch] | RowBatches:
    """Returns an iterator of batches whose targets are the tokens of a split, each once.

    The targets are cut into `batch_size` contiguous stripes whose lengths differ by at most one
    token (one sample, where the stream has samples); row b of each batch continues row b of the
    last, and the first input of a stripe is the token before its first target. Before token 0
    stands a separator, if the tokenizer has one; otherwise token 0 is no target and the caller
    charges it, and N = 1 gives no batch. Padding, at the ends of rows, is 0 in `weights` and
    `target_bytes`; so is the weight of a sample's separator. The rows of a recall task stand alone,
    batch_size at a time: `RowBatches`, for `evaluate` as well.

    Args:
        tokens: from `tokenize`.
        batch_size: number of stripes, `config.eval.batch_size`.
        seq_len: tokens a call, `config.eval.seq_len`.
        max_bytes: of the split, `config.eval.max_bytes`; 0 = all.
        vocab_size: number of ids the model knows; others raise ValueError. 0 = not checked.

    Raises:
        ValueError: for a setting out of range, or max_bytes below the first token.
    """
    for field, value, least in (
        ("config.eval.batch_size", batch_size, 1),
        ("config.eval.seq_len (or config.data.seq_len)", seq_len, 1),
        ("config.eval.max_bytes", max_bytes, 0),
    ):
        if value < least:
            raise ValueError(f"{field} must be at least {least}: got {value}; raise it")
    if vocab_size:
        check_vocab_size(tokens.tokenizer, vocab_size)
    n_tokens = tokens.tokens_within(max_bytes) if max_bytes else tokens.n_tokens
    if n_tokens < 1:
        raise ValueError(
            f"config.eval.max_bytes must reach the end of the first token of {tokens.name}: got "
            f"{max_bytes}; raise it"
        )
    if isinstance(tokens, RowTokenStream):
        n_rows = n_tokens // tokens.sample_len
        return RowBatches(tokens.rows, n_rows, batch_size, seq_len)
    first = 1 if tokens.tokenizer.separator_id < 0 else 0
    unit = tokens.sample_len or 1
    short, n_longer = divmod(-(-(n_tokens - first) // unit), batch_size)
    rows = np.arange(batch_size)
    lengths = (short + (rows < n_longer)) * unit
    starts = first + (rows * short + np.minimum(rows, n_longer)) * unit  # each stripe's targets
    stops = np.minimum(starts + lengths, n_tokens)
    n_batches = -(-max(0, int(np.max(stops - starts))) // seq_len)
    return (
        _evaluation_batch(tokens, starts + k * seq_len, stops, seq_len, vocab_size)
        for k in range(n_batches)
    )


def _evaluation_batch(
    tokens: TokenStream, starts: np.ndarray, stops: np.ndarray, seq_len: int, vocab_size: int
) -> Batch:
    """Returns one batch: row b has targets starts[b] .. min(starts[b] + seq_len, stops[b]) - 1."""
    shape = (starts.size, seq_len)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "target_bytes": np.zeros(shape, np.int32),
    }
    for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        n_targets = min(seq_len, stop - start)
        if n_targets <= 0:
            continue
        ids, segments = _read_cyclic(tokens, start - 1, n_targets + 1, vocab_size)
        batch["tokens"][row, :n_targets] = as_inputs(tokens.tokenizer, ids[:-1])
        batch["targets"][row, :n_targets] = ids[1:]
        batch["weights"][row, :n_targets] = _weights(tokens, ids[1:])
        # Padding stays in the last document, so that it resets nothing.
        batch["segment_ids"][row, :n_targets] = segments[:-1]
        batch["segment_ids"][row, n_targets:] = segments[-2]
        batch["target_bytes"][row, :n_targets] = tokens.tokenizer.token_bytes(ids[1:])
    return batch
