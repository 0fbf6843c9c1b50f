"""Which of its exact caches a model of initial embeddings decodes from, and how wide rows are."""

import dataclasses
from collections.abc import Callable

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.inattention.config import InAttentionConfig
from longctx_jax.ops.dispatch import Implementation, choose


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the choice of a cache may depend on."""

    max_len: int
    vocab_size: int
    row_len: int  # numbers of a token's row
    keys_len: int  # numbers of its keys and values in all layers
    memory_position: str
    score_position: str
    n_exact: int
    inattention: InAttentionConfig = dataclasses.field(repr=False)


def _facts(config: ModelConfig, max_len: int) -> _Facts:
    own = config.inattention
    n_caches = 1 if own.share_projections else config.n_layers
    return _Facts(
        max_len=max_len,
        vocab_size=config.vocab_size,
        row_len=d_memory(config) + d_rotary(config),
        keys_len=n_caches * config.n_kv_heads * (config.d_key + config.d_value),
        memory_position=own.memory_position,
        score_position=own.score_position,
        n_exact=own.n_exact,
        inattention=own,
    )


def _many_types(facts: _Facts) -> str:
    if facts.vocab_size + facts.n_exact <= max(facts.max_len, 1024):
        return ""
    return (
        f"a histogram of {facts.vocab_size} ids, and {facts.n_exact} tokens, outweighs the context"
    )


def _made_anew(facts: _Facts) -> str:
    if facts.memory_position != "none" or facts.score_position == "decoupled":
        return "every step would make all rows anew, in every layer"
    if facts.vocab_size > facts.max_len:
        return "tables by id are longer than the context"
    return ""


def _wider_than_keys(facts: _Facts) -> str:
    if facts.row_len < facts.keys_len:
        return ""
    return f"its rows have {facts.row_len} numbers, all keys and values of a token {facts.keys_len}"


def _cannot_be(cache: str) -> Callable[[_Facts], str]:
    return lambda facts: facts.inattention.why_not(cache)


CACHES = (  # smallest first
    Implementation("counts", print, _cannot_be("counts"), _many_types),
    Implementation("ids", print, _cannot_be("ids"), _made_anew),
    Implementation("embedding", print, _cannot_be("embedding"), _wider_than_keys),
    Implementation("kv", print),
)


def choose_cache(config: ModelConfig, max_len: int) -> str:
    """Returns the kind of cache for contexts of max_len tokens; "auto" says once why."""
    facts = _facts(config, max_len)
    return choose("inattention.cache", CACHES, config.inattention.cache, facts).name


def d_memory(config: ModelConfig) -> int:
    """Returns the width of the memory's rows, without rotary numbers."""
    return config.inattention.d_memory or config.d_model


def d_rotary(config: ModelConfig) -> int:
    """Returns how many rotary numbers a row has."""
    return config.inattention.d_rotary if config.inattention.score_position == "decoupled" else 0
