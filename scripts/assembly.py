"""From a config, or from the folder of a run, to the objects that the scripts work with."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import ml_collections
from absl import logging

from configs import from_run
from longctx_jax import data
from longctx_jax.decoding import generate
from longctx_jax.decoding.sampling import Sampling
from longctx_jax.evaluation.language_modeling import Observer, evaluate
from longctx_jax.models import build_model
from longctx_jax.models.base import Decoder
from longctx_jax.training.checkpoint import Checkpointer
from longctx_jax.training.loop import TrainData
from longctx_jax.training.placement import Placement, device_memory
from longctx_jax.training.plan import make_plan
from longctx_jax.training.start import CONFIG_FILE
from longctx_jax.training.state import TrainState
from longctx_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run restored for use: its config, model, weights and step."""

    config: ml_collections.ConfigDict
    model: Decoder
    variables: dict[str, PyTree]
    step: int


def train_data(
    config: ml_collections.ConfigDict, splits: data.Splits, rows: tuple[int, int] | None = None
) -> TrainData:
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


def print_plan(config: ml_collections.ConfigDict, n_devices: int, memory_gb: float) -> None:
    """Prints how a run would lie on n_devices, 0 = those that are here."""
    memory = int(memory_gb * 1e9) or (0 if n_devices else device_memory())
    print(make_plan(config, n_devices or jax.device_count(), memory).table())


def say_plan(config: ml_collections.ConfigDict, placement: Placement) -> None:
    """Prints what was decided, where there is a choice."""
    if placement.mesh is not None and jax.process_index() == 0:
        plan = make_plan(config, placement.topology.n_devices, device_memory())
        kind, n = jax.devices()[0].device_kind, jax.process_count()
        print(f"{plan.line()} ({kind}, {n} process{'es' * (n > 1)})", file=sys.stderr, flush=True)


def is_one_document(stream: data.TextStream) -> bool:
    """Whether a stream has no document boundaries."""
    return len(stream.document_starts) == 1


def eval_cache_len(config: ml_collections.ConfigDict) -> int:
    """Returns how many tokens full attention looks back on in evaluation and generation."""
    return config.eval.cache_len or config.train.cache_len or config.data.seq_len


def evaluate_split(
    config: ml_collections.ConfigDict,
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


def warn_of_other_segments(config: ml_collections.ConfigDict, model: Decoder) -> None:
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
    config: ml_collections.ConfigDict,
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


def sampler(config: ml_collections.ConfigDict) -> Callable | None:
    """Returns state -> samples of config.eval.sample_prompts, for the loop; None if off."""
    if not config.eval.sample_every:
        return None
    if jax.process_count() > 1:
        logging.warning("config.eval.sample_every does nothing in a run of several processes")
        return None
    model = build_model(config.model)
    tokenizer = data.build_tokenizer(config.data.tokenizer, config.data.data_dir)
    prompts = list(config.eval.sample_prompts)
    if not prompts or not all(prompts):
        raise ValueError(
            f"config.eval.sample_prompts must hold texts that are not empty: got {prompts}; use "
            "('\\n',), or set config.eval.sample_every=0"
        )
    ids = [data.prompt_ids(tokenizer, prompt.encode()) for prompt in prompts]

    def sample(state: TrainState) -> list[dict[str, str]]:
        rows = generate(
            model,
            state.eval_variables,
            ids,
            max_new_tokens=config.eval.sample_tokens,
            key=jax.random.key(config.train.seed),
            sampling=Sampling(config.eval.sample_temperature),
            cache_len=eval_cache_len(config),
        )
        texts = [tokenizer.decode(data.until_separator(tokenizer, row)) for row in rows]
        return [
            {"prompt": prompt, "text": text.decode(errors="replace")}
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    return sample


def restore_run(workdir: str, step: int = -1) -> TrainedRun:
    """Returns the run in `workdir` at a step, -1 = the newest whole checkpoint.

    The averaged weights are taken where the run keeps them.

    Raises:
        FileNotFoundError: no run, or no such step.
        ValueError: the folder is something else.
        CheckpointError: damaged files.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"--workdir must be the folder of a run: {path} does not exist; train one with "
            "python -m scripts.train --config=configs/quickstart.py --workdir=" + str(workdir)
        )
    config = from_run.read_config(path)
    model = build_model(config.model)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    field = "ema" if config.train.ema_decay else "params"
    template = {field: variables["params"], "model_state": variables["model_state"]}
    checkpointer = Checkpointer(workdir, is_read_only=True)
    if step >= 0:
        restored = checkpointer.restore(step, template)
    else:
        restored = checkpointer.restore_latest(template)
    if restored is None:
        raise FileNotFoundError(
            f"--workdir must have a checkpoint: {workdir} has none yet; let scripts.train run on"
        )
    state = restored.state
    logging.info("workdir=%s step=%d weights=%s", workdir, restored.step, field)
    variables = {"params": state[field], "model_state": state["model_state"]}
    return TrainedRun(config, model, variables, restored.step)


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
