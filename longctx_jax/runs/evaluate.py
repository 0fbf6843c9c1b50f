"""Evaluation of a split, as a config asks for it: in the training loop, and of a restored run."""

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import logging

from longctx_jax import data
from longctx_jax.evaluation.language_modeling import Observer, evaluate
from longctx_jax.models.decoder import Decoder
from longctx_jax.training.inputs import read_inputs, require_same_text
from longctx_jax.training.state import TrainState
from longctx_jax.typing import PyTree


def eval_cache_len(config: Any) -> int:
    """Returns how many tokens full attention looks back on in evaluation and generation."""
    return config.eval.cache_len or config.train.cache_len or config.data.seq_len


def evaluate_split(
    config: Any,
    model: Decoder,
    variables: dict[str, PyTree],
    stream: data.TextStream,
    *,
    max_bytes: int,
    show_progress: bool = False,
    observe: Observer | None = None,
    place: Callable = lambda tree: tree,
) -> dict[str, float]:
    """Streams (the first max_bytes of, 0 = all of) a split through the model; see `evaluate`."""
    tokenizer = data.build_tokenizer(config.data.tokenizer, config.data.data_dir)
    tokens = data.tokenize(stream, tokenizer)
    batches = data.evaluation_stripes(
        tokens,
        batch_size=config.eval.batch_size,
        seq_len=config.eval.seq_len or config.data.seq_len,
        max_bytes=max_bytes,
        vocab_size=config.model.vocab_size,
    )
    n_tokens = tokens.tokens_within(max_bytes or stream.n_bytes)
    first_token_bytes = None
    if tokenizer.separator_id < 0:
        first_token_bytes = int(tokenizer.token_bytes(tokens.read(0, 1))[0])
    is_text = not stream.sample_bytes
    return evaluate(
        model,
        variables,
        batches,
        cache_len=eval_cache_len(config),
        first_token_bytes=first_token_bytes,
        n_words=data.count_words(stream, tokens.byte_offset(n_tokens)) if is_text else 0,
        progress=progress_line(n_tokens) if show_progress else None,
        observe=observe,
        place=place,
    )


def require_text(workdir: str, split: str, stream: data.TextStream) -> None:
    """Raises ValueError if a split that the run in `workdir` has read holds another text now."""
    inputs = read_inputs(pathlib.Path(workdir))
    if inputs is not None and split in inputs.texts:
        now = data.fingerprint(stream)
        require_same_text(pathlib.Path(workdir), split, inputs.texts[split], now)


def warn_of_other_segments(config: Any, model: Decoder) -> None:
    """Logs a warning where a recall task counts other segments than the model's memory has."""
    if config.data.name not in data.RECALL_NAMES or model.config.recurrence == "none":
        return
    of_model, of_task = model.config.memory.segment_len, config.data.recall.segment_len
    if of_model != of_task:
        logging.warning(
            "distances in segments are not how often a fact crosses the memory: "
            "config.model.memory.segment_len=%d and config.data.recall.segment_len=%d; "
            "set both to one number, or read distance_bytes",
            of_model,
            of_task,
        )


def evaluator(
    config: Any,
    model: Decoder,
    splits: data.Splits,
    place: Callable = lambda tree: tree,
) -> Callable:
    """Returns state -> results on config.eval.split, for the training loop."""
    stream = splits[config.eval.split]
    warn_of_other_segments(config, model)

    def run(state: TrainState) -> dict[str, float]:
        return evaluate_split(
            config,
            model,
            state.eval_variables,
            stream,
            max_bytes=config.eval.max_bytes,
            place=place,
        )

    return run


def progress_line(n_tokens: int) -> Callable[[int, float], None]:
    """Returns a callback that prints tokens, rate and time left to stderr about once a second."""
    last = time.monotonic()

    def show(done: int, seconds: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 1.0 and done < n_tokens:
            return
        last = now
        rate = done / max(seconds, 1e-9)
        left = (n_tokens - done) / max(rate, 1e-9)
        text = f"evaluated {done:,} of {n_tokens:,} tokens, {rate:,.0f} tokens/s, {left:.0f} s left"
        end = "\n" if done >= n_tokens else "\r"
        print(f"{text:<78}", end=end, file=sys.stderr, flush=True)

    return show
