"""Generation: prefill the prompt, then a compiled loop of one-token steps on the same `apply`.

Prompts of different lengths share a batch by padding on the left: the padding is a document of its
own, and the document boundary before the prompt makes every mixer forget it. It does not move where
a model with segment-level recurrence cuts its segments: there only prompts share a batch whose
lengths differ by whole segments, and each prompt continues as it does alone.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.decoding.sampling import Sampling, sample
from longctx_jax.decoding.weights import cast_weights
from longctx_jax.models.decoder import Decoder, ModelCache
from longctx_jax.typing import PRNGKey, PyTree

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array


class NonFiniteLogitsError(ValueError):
    """The model gave logits that no token can be drawn from."""


def generate(
    model: Decoder,
    variables: dict[str, PyTree],
    prompts: Prompts,
    *,
    max_new_tokens: int,
    key: PRNGKey | None = None,
    sampling: Sampling | None = None,
    cache_len: int = 0,
    prefill_len: int = 512,
) -> np.ndarray:
    """Returns the continuation of each prompt, int32 [len(prompts), max_new_tokens].

    Args:
        prompts: token ids, each at least one, of any lengths; or an array [rows, seq].
        max_new_tokens: tokens to draw.
        key: of the draws; None = jax.random.key(0). Row r's draws depend on the key and r only.
        sampling: how to draw; None = plain sampling at temperature 1.
        cache_len: tokens that full attention looks back on; 0 = prompt and continuation.
        prefill_len: tokens of the prompt processed at once, which bounds memory.

    Raises:
        ValueError: an empty prompt, ids that are no integers or outside the vocabulary, a bad
            count.
        NonFiniteLogitsError: logits that are NaN, or all -inf, with the place of the first.

    Cost: one pass over the prompt, then one step a token; memory of one cache, and of the weights
    once more in config.model.dtype if that is narrower than they are (`weights.py`). That once for
    each remainder of the prompts' lengths by `memory.segment_len`, with segment-level recurrence.
    """
    _check(model, prompts, max_new_tokens, prefill_len)
    variables = cast_weights(model, variables)
    key = jax.random.key(0) if key is None else key
    sampling = sampling or Sampling()
    result = np.zeros((len(prompts), max_new_tokens), np.int32)
    for rows in _batches(model, [len(prompt) for prompt in prompts]):
        batch = [np.asarray(prompts[row]) for row in rows]
        logits, cache = _read(model, variables, batch, max_new_tokens, cache_len, prefill_len)
        numbers = jnp.asarray(rows, jnp.int32)
        tokens, is_finite, _ = _decode(
            model, sampling, max_new_tokens, variables, logits, cache, key, numbers
        )
        _require_finite(np.asarray(is_finite), rows)
        result[rows] = tokens
    return result


def _require_finite(is_finite: np.ndarray, rows: list[int]) -> None:
    """Raises NonFiniteLogitsError unless every draw [rows, tokens] was from finite logits."""
    if not np.all(is_finite):
        token = int(np.argmin(np.all(is_finite, axis=0)))
        row = rows[int(np.argmin(is_finite[:, token]))]
        raise NonFiniteLogitsError(
            f"the logits of this model must be finite: got NaN or no finite one before new token "
            f"{token} of prompt {row}; use an earlier checkpoint"
        )


def _batches(model: Decoder, lengths: Sequence[int]) -> list[list[int]]:
    """Returns the rows that may share a batch; padding there is whole segments of the model."""
    if model.config.recurrence == "none":
        return [list(range(len(lengths)))]
    batches: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        batches.setdefault(length % model.config.memory.segment_len, []).append(row)
    return list(batches.values())


def _read(
    model: Decoder,
    variables,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    cache_len: int,
    prefill_len: int,
) -> tuple[jax.Array, ModelCache]:
    """Returns the logits after each prompt [rows, vocab], and the cache."""
    longest = max(len(p) for p in prompts)
    tokens, segment_ids = pad_left(prompts, longest)
    cache = model.init_cache(len(prompts), cache_len or longest + max_new_tokens)
    is_ragged = any(len(p) != longest for p in prompts)
    hidden = None
    for start in range(0, longest, prefill_len):
        piece = slice(start, min(start + prefill_len, longest))
        ids = jnp.asarray(segment_ids[:, piece]) if is_ragged else None
        outputs = "last" if piece.stop == longest else "none"
        hidden, cache = _prefill(
            model.exact, outputs, variables, jnp.asarray(tokens[:, piece]), ids, cache
        )
    assert hidden is not None
    return _logits(model, variables, hidden), cache


def pad_left(
    prompts: Sequence[Sequence[int] | np.ndarray], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segment ids [rows, length]; padding is document 0, prompts document 1."""
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = np.asarray(prompt, np.int32)
        segment_ids[row, length - len(prompt) :] = 1
    return tokens, segment_ids


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _prefill(model: Decoder, outputs: str, variables, tokens, segment_ids, cache: ModelCache):
    """Returns the activations that are wanted, [rows, 1 or 0, d_model], and the cache."""
    out = model.hidden(variables, tokens, cache, segment_ids=segment_ids, outputs=outputs)
    return out.hidden, out.cache


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Decoder, variables, hidden):
    """Returns the logits [rows, vocab] of activations [rows, 1, d_model]."""
    logits = jnp.einsum(
        "bd,dz->bz",
        hidden[:, 0],
        model.unembedding(variables),
        preferred_element_type=jnp.float32,  # as in Decoder.apply
    )
    return logits.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _decode(model: Decoder, sampling: Sampling, n_tokens: int, variables, logits, cache, key, rows):
    """Draws n_tokens for each of `rows`, the numbers of the prompts; the last is not fed back.

    Returns them, whether the logits they were drawn from were finite, both [rows, n_tokens], and
    the cache, which is written where the old one lay.
    """
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

    def draw(logits, index):
        row_keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        pick = jax.vmap(lambda k, row: sample(k, row[None], sampling)[0])
        return pick(row_keys, logits)

    def step(carry, index):
        logits, cache = carry
        token = draw(logits, index)
        out = model.apply(variables, token[:, None], cache)
        return (out.logits[:, 0].astype(jnp.float32), out.cache), (token, is_finite(logits))

    def is_finite(logits):  # NaN is the largest of numbers with a NaN
        return jnp.isfinite(jnp.max(logits, axis=-1))

    before, check = [], []
    if n_tokens > 1:  # a loop of no step is refused without compilation
        (logits, cache), (tokens, finite) = jax.lax.scan(
            step, (logits, cache), jnp.arange(n_tokens - 1, dtype=jnp.int32)
        )
        before, check = [tokens], [finite]
    tokens = jnp.concatenate([*before, draw(logits, n_tokens - 1)[None]], axis=0)
    return tokens.T, jnp.concatenate([*check, is_finite(logits)[None]], axis=0).T, cache


def _check(model: Decoder, prompts: Prompts, max_new_tokens: int, prefill_len: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_len", prefill_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}; ask for more")
    if len(prompts) == 0:
        raise ValueError("prompts must not be empty: got none; give at least one")
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1:
            raise ValueError(
                f"every prompt must be a list of token ids: prompt {row} has shape {ids.shape}; "
                "put a single prompt in a list of its own"
            )
        if ids.size == 0:
            raise ValueError(f"every prompt needs at least one token: prompt {row} is empty")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids must be integers: prompt {row} has {ids.dtype}")
        if ids.min() < 0 or ids.max() >= model.config.vocab_size:
            bad = int(np.argmax((ids < 0) | (ids >= model.config.vocab_size)))
            raise ValueError(
                f"prompt tokens must be below vocab_size={model.config.vocab_size}: prompt {row} "
                f"has {int(ids[bad])} at position {bad}; remove it, or use a model whose "
                "config.model.vocab_size covers it"
            )
