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

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Aux, Documents, Mean, no_aux
from longctx_jax.nn.mlp import Kernel, dense
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.ops.position import sinusoid
from longctx_jax.ops.vq import VQState, init_vq_state, renewed, vq_attention
from longctx_jax.ops.vq.codebook import (
    Codebook,
    CodeStatistics,
    code_statistics,
    codebook_report,
    codewords,
    init_codebook,
    reseed_dead_codes,
    update_codebook,
)

GATES = ("silu", "none")
POSITIONS = ("relative", "none")
IMPLEMENTATIONS = ("auto", "pallas_triton", "linear", "quadratic")
SEARCHES = ("auto", "pallas_triton", "xla")
COMMITMENT = "vq_commitment"  # name of the auxiliary loss
MAX_RELATIVE_ERROR = 10.0  # of one key, in the metric


class VQAttention(nn.Module):
    """Projections, vector-quantised attention, gate, output projection.

    Attributes:
        n_kv_heads: 1 = MQA or single-head; each has its own codebook.
        codebook_size: codewords a head.
        window_len: tokens before a query that relative positions and key gradients reach.
        block_len: queries a block; 0 = chosen.
        gate: "silu" (and silu on the values) or "none".
        position: "relative" or "none".
        position_dropout: probability, of the sinusoids.
        position_theta: longest wavelength of the sinusoids over 2 pi, tokens.
        commitment: weight of the squared quantisation error in the objective.
        codebook_decay: what the codebook's running averages keep an update; 1 = it never moves.
        reseed_below: tokens an update: codes used less are replaced; 0 = never.
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    d_model: int
    codebook_size: int
    window_len: int
    block_len: int
    reduction: str
    gate: str
    position: str
    position_dropout: float
    position_theta: float
    use_table: bool
    grad_through_cache: bool
    commitment: float
    codebook_decay: float
    codebook_start: str
    smoothing: str
    reseed_below: float
    implementation: str
    search: str
    dtype: str
    output_scale: float

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
        start = (self.n_kv_heads, self.codebook_size, self.d_key, self.codebook_start)
        codebook = self.variable(
            "model_state", "codebook", lambda: init_codebook(self.make_rng("params"), *start)
        ).value
        unit = self.d_key**-0.25

        def heads(name, n_heads, width):
            y = dense(n_heads * width, self.dtype, name)(x)
            return y.reshape(*x.shape[:2], n_heads, width)

        def normed(y):
            return unit * RMSNorm(self.dtype, use_scale=False)(y)

        query = normed(heads("query", self.n_heads, self.d_key))
        key = normed(heads("key", self.n_kv_heads, self.d_key))
        value = heads("value", self.n_kv_heads, self.d_value)
        if self.gate == "silu":
            value = jax.nn.silu(value)
        content_query, bias = self._positions(query, cache is None, train)
        words = codewords(codebook, self.smoothing)
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
            window_len=self.window_len,
            block_len=self.block_len,
            scale=1.0,
            reduction=self.reduction,
            use_table=self.use_table,
            grad_through_cache=self.grad_through_cache,
            implementation=self.implementation,
            search=self.search,
        )
        out = result.out.reshape(*x.shape[:2], -1)
        if self.gate == "silu":
            out = out * jax.nn.silu(dense(out.shape[-1], self.dtype, "gate")(x))
        out = dense(x.shape[-1], self.dtype, "out", self.output_scale)(out)
        aux = self._report(key, result, documents) if train else no_aux()
        return out, None if cache is None else result.state, aux

    def _positions(
        self, query: jax.Array, is_fresh: bool, train: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the query that meets keys, and the bias [batch, seq, heads, distances].

        Distances are 0 .. window_len, or as many as a fresh call has. The bias is (q W_R^T) s_d =
        q (s_d W_R): few queries are cheaper the first way, many the second.
        """
        if self.position == "none":
            return query, None
        batch, seq = query.shape[:2]
        n_distances = min(self.window_len + 1, seq) if is_fresh else self.window_len + 1
        unit = self.d_key**-0.25
        shape = (self.n_heads, self.d_key)
        content = self.param("content_bias", nn.initializers.zeros, shape, jnp.float32)
        place = self.param("position_bias", nn.initializers.zeros, shape, jnp.float32)
        distances = jnp.arange(n_distances, dtype=jnp.int32)[None]
        waves = sinusoid(distances, self.d_model, self.position_theta)[0]
        if train and self.position_dropout > 0.0:
            waves = nn.Dropout(self.position_dropout, deterministic=False)(waves)
        waves = waves.astype(self.dtype)
        kernel = Kernel(self.n_kv_heads * self.d_key, self.dtype, name="relative")(self.d_model)
        kernel = unit * kernel.reshape(self.d_model, self.n_kv_heads, self.d_key)
        group = self.n_heads // self.n_kv_heads
        place_query = query + (unit * place).astype(query.dtype)
        place_query = place_query.reshape(batch, seq, self.n_kv_heads, group, self.d_key)
        of_rows = n_distances * self.n_kv_heads * self.d_key * self.d_model
        of_rows += batch * seq * self.n_heads * self.d_key * n_distances
        of_queries = batch * seq * self.n_heads * self.d_model * (self.d_key + n_distances)
        if of_queries < of_rows:
            projected = jnp.einsum("bthgk,dhk->bthgd", place_query, kernel)
            bias = jnp.einsum("bthgd,md->bthgm", projected, waves)
        else:
            rows = jnp.einsum("md,dhk->mhk", waves, kernel)
            bias = jnp.einsum("bthgk,mhk->bthgm", place_query, rows)
        bias = bias.reshape(batch, seq, self.n_heads, n_distances)
        return query + (unit * content).astype(query.dtype), bias

    def _report(self, key: jax.Array, result: Any, documents: Documents | None) -> Aux:
        """Commitment loss, relative error and codebook statistics, summed over counted tokens."""
        weights = None if documents is None else documents.weights
        error = result.squared_error
        counted = jnp.ones(error.shape[:2], error.dtype) if weights is None else weights
        loss = self.commitment * jnp.sum(jnp.sum(error, axis=-1) * counted)
        fixed_key, fixed_error = jax.lax.stop_gradient((key, error))
        norm = jnp.linalg.norm(fixed_key.astype(error.dtype), axis=-1)
        relative = jnp.sqrt(fixed_error) / jnp.maximum(norm, 1e-6)
        relative = jnp.mean(jnp.minimum(relative, MAX_RELATIVE_ERROR), axis=-1)
        metric = Mean(jnp.sum(relative * counted), jnp.sum(counted))
        statistics = {}
        if self.codebook_decay < 1.0:
            statistics = {
                "codebook": code_statistics(key, result.codes, self.codebook_size, weights)
            }
        return Aux({COMMITMENT: loss}, {"vq_relative_error": metric}, statistics)

    def update_state(
        self, state: dict[str, Codebook], statistics: dict[str, CodeStatistics], key: jax.Array
    ) -> dict[str, Codebook]:
        """Returns the codebook (leading axis layers) after one step of k-means."""
        if not statistics:
            return state
        codebook = state["codebook"]
        codebook = update_codebook(codebook, statistics["codebook"], decay=self.codebook_decay)
        if self.reseed_below > 0.0:
            codebook = reseed_dead_codes(codebook, key, self.reseed_below)
        return {"codebook": codebook}

    def describe_state(self, state: dict[str, Codebook]) -> dict[str, jax.Array]:
        """Returns perplexity, dead share and codeword norm of the codebooks, [layers, heads]."""
        report = codebook_report(state["codebook"])
        return {f"vq_{name}": value for name, value in report.items()}

    def init_cache(self, batch_size: int, max_len: int) -> VQState:
        """Returns an empty state of constant size; max_len does not matter."""
        del max_len
        return init_vq_state(
            batch_size,
            self.window_len,
            self.n_kv_heads,
            self.d_key,
            self.d_value,
            self.codebook_size,
            self.dtype,
        )
