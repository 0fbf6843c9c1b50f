"""Which of its exact caches a model of initial embeddings decodes from, and how wide rows are."""

import dataclasses

from longctx_jax.models.config import ModelConfig
from longctx_jax.ops.dispatch import Implementation, choose


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the choice of a cache may depend on."""

    config: ModelConfig
    max_len: int

    @property
    def row_len(self) -> int:
        return d_memory(self.config) + d_rotary(self.config)

    def why_not(self, cache: str) -> str:
        return self.config.inattention.why_not(cache)


def _many_types(facts: _Facts) -> str:
    config, near = facts.config, facts.config.inattention.n_exact
    if config.vocab_size + near <= max(facts.max_len, 1024):
        return ""
    return f"a histogram of {config.vocab_size} ids, and {near} tokens, outweighs the context"


def _made_anew(facts: _Facts) -> str:
    inattention = facts.config.inattention
    if inattention.memory_position != "none" or inattention.score_position == "decoupled":
        return "every step would make all rows anew, in every layer"
    if facts.config.vocab_size > facts.max_len:
        return "tables by id are longer than the context"
    return ""


def _wider_than_keys(facts: _Facts) -> str:
    config = facts.config
    n_caches = 1 if config.inattention.share_projections else config.n_layers
    keys = n_caches * config.n_kv_heads * (config.d_key + config.d_value)
    if facts.row_len < keys:
        return ""
    return f"its rows have {facts.row_len} numbers, all keys and values of a token {keys}"


CACHES = (  # smallest first
    Implementation("counts", print, lambda facts: facts.why_not("counts"), _many_types),
    Implementation("ids", print, lambda facts: facts.why_not("ids"), _made_anew),
    Implementation("embedding", print, lambda facts: facts.why_not("embedding"), _wider_than_keys),
    Implementation("kv", print),
)


def choose_cache(config: ModelConfig, max_len: int) -> str:
    """Returns the kind of cache for contexts of max_len tokens; "auto" says once why."""
    facts = _Facts(config, max_len)
    return choose("inattention.cache", CACHES, config.inattention.cache, facts).name


def d_memory(config: ModelConfig) -> int:
    """Returns the width of the memory's rows, without rotary numbers."""
    return config.inattention.d_memory or config.d_model


def d_rotary(config: ModelConfig) -> int:
    """Returns how many rotary numbers a row has."""
    return config.inattention.d_rotary if config.inattention.score_position == "decoupled" else 0
