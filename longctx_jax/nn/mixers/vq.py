"""Attention over vector-quantised keys as a sequence mixer: gated single-head, MHA, GQA, MQA.

    q, k = rms(x W) d_key^(-1/4),   v = x W  (gated: silu(x W), and a gate silu(x W))
    score(i, j) = (q_i + u') . k_hat_j + (q_i + w') . r_{i-j}    second term for i - j <= window_len
    r_d = d_key^(-1/4) sinusoid(d) W_R,   u' = d_key^(-1/4) u,   w' = d_key^(-1/4) w

so queries and keys lie on a sphere and their product is that of 1/sqrt(d_key). The codebook is
state without a gradient: the collection "model_state", read here and never written; what it is
updated from goes out as `aux.statistics`.

Source: Lingle (2023), arXiv 2309.16354, section 3; Hua et al. (2022), arXiv 2202.10447 (gated
attention unit); Dai et al. (2019), arXiv 1901.02860 (relative positions).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn import costs
from longctx_jax.nn.config_checks import (
    require_not_negative,
    require_one_of,
    require_positive,
    require_probability,
    require_types,
)
from longctx_jax.nn.contract import Aux, Call, Costs, Documents, Mean, Mixer, Sizes, no_aux
from longctx_jax.nn.mlp import Kernel, dense
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.ops.losses import weighted
from longctx_jax.ops.position import sinusoid
from longctx_jax.ops.vq import VQState, init_vq_state, renewed, vq_attention
from longctx_jax.ops.vq.codebook import (
    STARTS,
    Codebook,
    CodeStatistics,
    code_statistics,
    codebook_report,
    codewords,
    init_codebook,
    reseed_dead_codes,
    update_codebook,
)
from longctx_jax.ops.vq.select import SUM_TABLES

GATES = ("silu", "none")
POSITIONS = ("relative", "none")
IMPLEMENTATIONS = ("auto", "pallas_triton", "linear", "quadratic")
SEARCHES = ("auto", "pallas_triton", "xla")
COMMITMENT = "vq_commitment"  # name of the auxiliary loss
MAX_RELATIVE_ERROR = 10.0  # of one key, in the metric


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """`config.model.vq`.

    Attributes:
        codebook_size: codewords a key head; each head has its own codebook.
        window_len: tokens before a query that relative positions and key gradients reach.
        block_len: queries a block; 0 = chosen.
        gate: "silu" (and silu on the values) or "none".
        position_dropout: probability, of the sinusoids.
        position_theta: longest wavelength of the sinusoids over 2 pi, tokens.
        commitment: weight of the squared quantisation error in the objective.
        codebook_decay: what the codebook's running averages keep an update; 1 = it never moves.
        reseed_below: tokens an update: codes used less are replaced; 0 = never.
    """

    codebook_size: int = 256
    window_len: int = 128
    block_len: int = 0
    reduction: str = "auto"
    gate: str = "none"
    position: str = "relative"
    position_dropout: float = 0.0
    position_theta: float = 100_000.0
    use_table: bool = True
    grad_through_cache: bool = True
    commitment: float = 1e-4
    codebook_decay: float = 0.99
    codebook_start: str = "sphere"
    reseed_below: float = 0.0
    implementation: str = "auto"
    search: str = "auto"

    def __post_init__(self):
        require_types(self, "vq.")
        for field in ("codebook_size", "window_len", "position_theta"):
            require_positive(f"vq.{field}", getattr(self, field))
        for field in ("block_len", "commitment", "reseed_below"):
            require_not_negative(f"vq.{field}", getattr(self, field))
        require_one_of("vq.reduction", self.reduction, ("auto", *SUM_TABLES))
        require_one_of("vq.gate", self.gate, GATES)
        require_one_of("vq.position", self.position, POSITIONS)
        require_one_of("vq.codebook_start", self.codebook_start, STARTS)
        require_one_of("vq.implementation", self.implementation, IMPLEMENTATIONS)
        require_one_of("vq.search", self.search, SEARCHES)
        require_probability("vq.position_dropout", self.position_dropout)
        if self.reseed_below > 0 and self.codebook_decay == 1.0:
            raise ValueError(
                f"config.model.vq.reseed_below needs a codebook that learns: got "
                f"{self.reseed_below} with codebook_decay=1; set one of them to 0 or below 1"
            )
        if not 0.0 <= self.codebook_decay <= 1.0:
            raise ValueError(
                f"config.model.vq.codebook_decay must be in [0, 1]: got {self.codebook_decay}; "
                "it is what running averages keep, 1 = a fixed codebook"
            )


class VQAttention(nn.Module):
    """Projections, vector-quantised attention, gate, output projection."""

    sizes: Sizes
    config: VQConfig

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers."""
        return self.config.position_dropout > 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: VQState | None,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, VQState | None, Aux]:
        """Maps [batch, seq, d_model] to the same; `cache` None = empty and not wanted back."""
        del layer
        sizes, config = self.sizes, self.config
        start = (
            sizes.n_kv_heads,
            config.codebook_size,
            sizes.d_key,
            config.codebook_start,
        )
        codebook = self.variable(
            "model_state", "codebook", lambda: init_codebook(self.make_rng("params"), *start)
        ).value
        unit = sizes.d_key**-0.25

        def heads(name, n_heads, width):
            y = dense(n_heads * width, sizes.dtype, name)(x)
            return y.reshape(*x.shape[:2], n_heads, width)

        def normed(y):
            return unit * RMSNorm(sizes.dtype, use_scale=False)(y)

        query = normed(heads("query", sizes.n_heads, sizes.d_key))
        key = normed(heads("key", sizes.n_kv_heads, sizes.d_key))
        value = heads("value", sizes.n_kv_heads, sizes.d_value)
        if config.gate == "silu":
            value = jax.nn.silu(value)
        content_query, bias = self._positions(query, cache is None, train)
        words = codewords(codebook)
        if train and cache is not None:  # what is carried may be older than the last update
            cache = renewed(cache, words)
        result = vq_attention(
            content_query,
            key,
            value,
            words,
            cache,
            relative_bias=bias,
            documents=None if documents is None else documents.index,
            window_len=config.window_len,
            block_len=config.block_len,
            scale=1.0,
            reduction=config.reduction,
            use_table=config.use_table,
            grad_through_cache=config.grad_through_cache,
            implementation=config.implementation,
            search=config.search,
        )
        out = result.out.reshape(*x.shape[:2], -1)
        if config.gate == "silu":
            out = out * jax.nn.silu(dense(out.shape[-1], sizes.dtype, "gate")(x))
        out = dense(x.shape[-1], sizes.dtype, "out", sizes.output_scale)(out)
        aux = self._report(key, result, documents) if train else no_aux()
        return out, None if cache is None else result.state, aux

    def _positions(
        self, query: jax.Array, is_fresh: bool, train: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the query that meets keys, and the bias [batch, seq, heads, distances].

        Distances are 0 .. window_len, or as many as a fresh call has. The bias is (q W_R^T) s_d =
        q (s_d W_R): few queries are cheaper the first way, many the second.
        """
        sizes, config = self.sizes, self.config
        if config.position == "none":
            return query, None
        batch, seq = query.shape[:2]
        n_distances = min(config.window_len + 1, seq) if is_fresh else config.window_len + 1
        unit = sizes.d_key**-0.25
        shape = (sizes.n_heads, sizes.d_key)
        content = self.param("content_bias", nn.initializers.zeros, shape, jnp.float32)
        place = self.param("position_bias", nn.initializers.zeros, shape, jnp.float32)
        distances = jnp.arange(n_distances, dtype=jnp.int32)[None]
        wide = jnp.promote_types(query.dtype, jnp.float32)
        waves = sinusoid(distances, sizes.d_model, config.position_theta, wide)[0]
        if train and config.position_dropout > 0.0:
            waves = nn.Dropout(config.position_dropout, deterministic=False)(waves)
        waves = waves.astype(sizes.dtype)
        kernel = Kernel(sizes.n_kv_heads * sizes.d_key, sizes.dtype, name="relative")(sizes.d_model)
        kernel = unit * kernel.reshape(sizes.d_model, sizes.n_kv_heads, sizes.d_key)
        group = sizes.n_heads // sizes.n_kv_heads
        place_query = query + (unit * place).astype(query.dtype)[None, None]
        place_query = place_query.reshape(batch, seq, sizes.n_kv_heads, group, sizes.d_key)
        of_rows = n_distances * sizes.n_kv_heads * sizes.d_key * sizes.d_model
        of_rows += batch * seq * sizes.n_heads * sizes.d_key * n_distances
        of_queries = batch * seq * sizes.n_heads * sizes.d_model * (sizes.d_key + n_distances)
        if of_queries < of_rows:
            projected = jnp.einsum("bthgk,dhk->bthgd", place_query, kernel)
            bias = jnp.einsum("bthgd,md->bthgm", projected, waves)
        else:
            rows = jnp.einsum("md,dhk->mhk", waves, kernel)
            bias = jnp.einsum("bthgk,mhk->bthgm", place_query, rows)
        bias = bias.reshape(batch, seq, sizes.n_heads, n_distances)
        return query + (unit * content).astype(query.dtype)[None, None], bias

    def _report(self, key: jax.Array, result: Any, documents: Documents | None) -> Aux:
        """Commitment loss, relative error and codebook statistics, summed over counted tokens."""
        config = self.config
        weights = None if documents is None else documents.weights
        error = result.squared_error
        counted = jnp.ones(error.shape[:2], error.dtype) if weights is None else weights
        loss = config.commitment * jnp.sum(weighted(jnp.sum(error, axis=-1), counted))
        fixed_key, fixed_error = jax.lax.stop_gradient((key, error))
        norm = jnp.linalg.norm(fixed_key.astype(error.dtype), axis=-1)
        relative = jnp.sqrt(fixed_error) / jnp.maximum(norm, 1e-6)
        relative = jnp.mean(jnp.minimum(relative, MAX_RELATIVE_ERROR), axis=-1)
        metric = Mean(jnp.sum(weighted(relative, counted)), jnp.sum(counted))
        statistics = {}
        if config.codebook_decay < 1.0:
            statistics = {
                "codebook": code_statistics(key, result.codes, config.codebook_size, weights)
            }
        return Aux({COMMITMENT: loss}, {"vq_relative_error": metric}, statistics)

    def update_state(
        self, state: dict[str, Codebook], statistics: dict[str, CodeStatistics], key: jax.Array
    ) -> dict[str, Codebook]:
        """Returns the codebook (leading axis layers) after one step of k-means."""
        config = self.config
        if not statistics:
            return state
        codebook = state["codebook"]
        codebook = update_codebook(codebook, statistics["codebook"], decay=config.codebook_decay)
        if config.reseed_below > 0.0:
            codebook = reseed_dead_codes(codebook, key, config.reseed_below)
        return {"codebook": codebook}

    def describe_state(self, state: dict[str, Codebook]) -> dict[str, jax.Array]:
        """Returns perplexity, dead share and codeword norm of the codebooks, [layers, heads]."""
        report = codebook_report(state["codebook"])
        return {f"vq_{name}": value for name, value in report.items()}

    def init_cache(self, batch_size: int, max_len: int) -> VQState:
        """Returns an empty state of constant size; max_len does not matter."""
        del max_len
        sizes, config = self.sizes, self.config
        return init_vq_state(
            batch_size,
            config.window_len,
            sizes.n_kv_heads,
            sizes.d_key,
            sizes.d_value,
            config.codebook_size,
            sizes.dtype,
        )


def _costs(sizes: Sizes, config: VQConfig, call: Call) -> Costs:
    """Projections, position bias, search, and 2 H (codes + keys) (K + V) for attention.

    A query sees the window's keys and its own one by one, and everything older as codes, once a
    token has left the window. Sums of values by code are additions, and the sinusoids are projected
    once a call: neither is counted. Dense pairs: all codes, and all keys of its block and of those
    that the window reaches (without a block length: one block).
    """
    heads, seq_len, d_key = sizes.n_heads, call.seq_len, sizes.d_key
    gate = 0 if config.gate == "none" else heads * sizes.d_value
    n_codes = float(config.codebook_size if config.use_table else 0)
    block = min(config.block_len or config.window_len, seq_len)
    all_scores = heads * seq_len * (config.window_len + block + n_codes)
    if call.pairs == "dense":
        block = min(config.block_len or seq_len, seq_len)
        before = -(-config.window_len // block) * block if block < seq_len else 0
        n_keys = float(before + block)
    else:
        reach = config.window_len + 1
        n_keys = costs.mean_visible_keys(seq_len, call.n_past, reach)
        n_early = max(0, min(seq_len, reach - call.n_past))  # queries that see no code
        n_codes *= (seq_len - n_early) / seq_len
    flops = costs.projection_flops(sizes) + 2 * sizes.d_model * gate
    flops += 0 if config.position == "none" else 2 * heads * (config.window_len + 1) * d_key
    flops += 2 * sizes.n_kv_heads * config.codebook_size * d_key
    flops += 2 * heads * (n_codes + n_keys) * (d_key + sizes.d_value)
    return Costs(flops, rows=costs.head_numbers(sizes) + gate, scores=int(all_scores))


MIXER = Mixer(
    config=VQConfig,
    build=VQAttention,
    costs=_costs,
    rules=((r"relative/kernel$", ("data", "model")),),  # of positions, a column a head's number
    examples={
        "vq": {
            "n_kv_heads": 1,
            "d_value": 6,
            "mlp": "relu2",
            "vq": {"codebook_size": 7, "window_len": 5, "block_len": 4},
        },
        "gated_unit": {
            "n_heads": 1,
            "mlp": "none",
            "d_value": 20,
            "vq": {"codebook_size": 7, "window_len": 4, "gate": "silu"},
        },
    },
)
