"""Samples from a model while it trains, as a config asks for them."""

from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from longctx_jax import data
from longctx_jax.decoding import generate
from longctx_jax.decoding.sampling import Sampling
from longctx_jax.models.decoder import Decoder
from longctx_jax.runs.evaluate import eval_cache_len
from longctx_jax.training.state import TrainState


def sampler(config: Any, model: Decoder) -> Callable | None:
    """Returns state -> samples of config.eval.sample_prompts, for the loop; None if off."""
    if not config.eval.sample_every:
        return None
    if jax.process_count() > 1:
        logging.warning("config.eval.sample_every does nothing in a run of several processes")
        return None
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
