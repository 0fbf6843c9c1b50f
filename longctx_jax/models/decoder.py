"""`Decoder`: the one interface of every model, for training windows, prefill and decoding alike.

The law: however a sequence is split into calls of `apply` with a cache, the logits equal those of
one call. A training window, a prefill segment and a decode step differ only in length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.models.body import OUTPUTS, Body, Source, Wanted
from longctx_jax.models.checks import require_call, require_precision
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.families import body_of
from longctx_jax.models.stack import call_module, has_state, is_random
from longctx_jax.nn.contract import NO_SEGMENT, Aux, advance_documents
from longctx_jax.nn.embed import Embed
from longctx_jax.nn.norms import make_norm
from longctx_jax.nn.partition import spread_tokens
from longctx_jax.ops.quarantine import find_poison, is_bad
from longctx_jax.typing import PRNGKey, PyTree


@flax.struct.dataclass
class ModelCache:
    """What a model remembers between calls."""

    layers: Any  # of the layers, leaves [layers, batch, ...], in lanes [rows, lanes, batch, ...]
    last_segment_id: jax.Array  # int32 [batch]; NO_SEGMENT before any
    # int32 [batch], number of the document the last token belongs to; -1 - number once it has had
    # activations that are not finite: what continues it is NaN, and the next document is not
    document: jax.Array
    carried: Any = ()  # what else goes from call to call in this family
    row_axis: int = flax.struct.field(pytree_node=False, default=1)  # of the batch, in layers


class DecoderOutput(NamedTuple):
    """Logits [batch, seq, vocab] float32, the extended cache (None if none was given), and aux."""

    logits: jax.Array
    cache: ModelCache | None
    aux: Aux


class HiddenOutput(NamedTuple):
    """Like DecoderOutput, with the normed activations [batch, seq, d_model] instead of logits."""

    hidden: jax.Array
    cache: ModelCache | None
    aux: Aux


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A causal language model: embedding, stack, norm, output matrix. Owns no arrays; hashable.

    A model is a static argument: equal configs share compiled code.

    Variables are {"params": trainable, "model_state": non-gradient state}, both pytrees.
    """

    config: ModelConfig

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, key: PRNGKey) -> dict[str, PyTree]:
        """Returns fresh variables, float32."""
        require_precision(self.config.dtype)
        embed_key, stack_key = jax.random.split(key)
        tokens = jnp.zeros((1, 1), jnp.int32)
        hidden = jnp.zeros((1, 1, self.config.d_model), self.config.dtype)
        body, state = self._body.init(self.config, stack_key)
        params = {
            "embed": self._embed.init(embed_key, tokens)["params"],
            **body,
            "norm": self._norm.init(embed_key, hidden)["params"],
        }
        return {"params": params, "model_state": {"stack": state} if state else {}}

    @property
    def backbone(self) -> "Decoder | None":
        """The model that this one wraps, e.g. without its recurrent memory; None if it has none."""
        config = self._body.backbone(self.config)
        return None if config is None else Decoder(config)

    @property
    def exact(self) -> "Decoder":
        """The model for prompts: without what approximates single tokens; caches are the same."""
        config = self._body.exact(self.config)
        return self if config is self.config else Decoder(config)

    def add_to_backbone(
        self, fresh: dict[str, PyTree], backbone: dict[str, PyTree]
    ) -> dict[str, PyTree]:
        """Returns variables of `backbone`, with what this model's `fresh` ones have beside them.

        Raises:
            ValueError: if the model wraps no other.
        """
        add = self._body.add_to_backbone
        if add is None:
            raise ValueError(
                f"a model must wrap a backbone to add to one: got config.model.name="
                f"{self.config.name!r}; use 'recurrent_memory'"
            )
        return add(self.config, fresh, backbone)

    def update_model_state(self, model_state: PyTree, aux: tuple[Aux, ...], key: PRNGKey) -> PyTree:
        """Returns the non-gradient state after an update: codebooks moved by what `aux` counted.

        Args:
            model_state: of `variables`.
            aux: one a pattern position, of all tokens of the update: summed over segments,
                micro-batches and devices.
            key: for updates that draw random numbers.
        """
        if not model_state:
            return model_state
        return {"stack": self._body.update_state(self.config, model_state["stack"], aux, key)}

    def describe_model_state(self, model_state: PyTree) -> dict[str, jax.Array]:
        """Returns scalar metrics of the non-gradient state, e.g. how many codes are in use."""
        if not model_state:
            return {}
        return self._body.describe_state(self.config, model_state["stack"])

    def init_cache(self, batch_size: int, max_len: int) -> ModelCache:
        """Returns an empty cache.

        Args:
            batch_size: rows.
            max_len: tokens that full attention can look back on; a longer stream keeps going with
                the last max_len of them (and n_memory_tokens more beside layers with recurrent
                memory). Mixers of constant memory ignore it.

        Raises:
            ValueError: if either is not positive.
        """
        if batch_size < 1 or max_len < 1:
            raise ValueError(
                f"a cache needs at least one row and one token: got batch_size={batch_size}, "
                f"max_len={max_len}; pass positive sizes"
            )
        require_precision(self.config.dtype)
        layers, carried = self._body.init_cache(self.config, batch_size, max_len)
        return ModelCache(
            layers=layers,
            last_segment_id=jnp.full((batch_size,), NO_SEGMENT, jnp.int32),
            document=jnp.zeros((batch_size,), jnp.int32),
            carried=carried,
            row_axis=self._body.row_axis(self.config),
        )

    def apply(
        self,
        variables: dict[str, PyTree],
        tokens: jax.Array,
        cache: ModelCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        weights: jax.Array | None = None,
        rngs: dict[str, PRNGKey] | None = None,
        train: bool = False,
    ) -> DecoderOutput:
        """Extends `cache` by `tokens` and returns the logits of every one of them.

        Args:
            variables: as made by `init`.
            tokens: integers [batch, seq], any seq >= 1; row t's logits predict token t + 1. An id
                outside the vocabulary is embedded as NaN, and so are the logits that see it.
            cache: of as many rows; None = empty and not wanted back.
            segment_ids: integers [batch, seq], >= 0, the document of each token; a change between
                neighbours (also across calls) starts a document, which sees nothing before it, not
                even NaN. None = no boundary within this call.
            weights: float32 [batch, seq], what each token counts in aux, 0 for padding; None = 1.
            rngs: {"dropout": key}, needed when train and something is dropped at random.
            train: drop out, and report what training needs in aux.

        Raises:
            ValueError: tokens, cache, segment ids and weights that are not of the same rows; no
                token; ids that are no integers; negative segment ids, where their values are known.
        """
        options = {"segment_ids": segment_ids, "weights": weights, "rngs": rngs, "train": train}
        out = self.hidden(variables, tokens, cache, **options)
        logits = jnp.einsum(
            "btd,dz->btz",
            out.hidden,
            self.unembedding(variables),
            preferred_element_type=jnp.promote_types(self.config.dtype, jnp.float32),
        )
        return DecoderOutput(logits, out.cache, out.aux)

    def hidden(
        self,
        variables: dict[str, PyTree],
        tokens: jax.Array,
        cache: ModelCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        weights: jax.Array | None = None,
        rngs: dict[str, PRNGKey] | None = None,
        train: bool = False,
        outputs: str = "all",
        at: jax.Array | None = None,
    ) -> HiddenOutput:
        """As `apply`, without the product with the output matrix, of all tokens or some.

        Args:
            variables: as in `apply`, like the rest.
            outputs: whose activations are wanted: "all", "last" (one token) or "none". A model
                whose layers read only embeddings then spares the others its layers.
            at: int32 [n], increasing: the tokens whose activations are wanted; None = as `outputs`
                says.

        Raises:
            ValueError: unknown outputs, or both of the last two.
        """
        if outputs not in OUTPUTS or (at is not None and outputs != "all"):
            raise ValueError(
                f"outputs must be one of {OUTPUTS}, and 'all' with at: got {outputs!r}; change one"
            )
        require_precision(self.config.dtype)
        rows = None if cache is None else cache.last_segment_id.shape[0]
        require_call(tokens, rows, segment_ids, weights)
        return self._hidden(
            variables, tokens, cache, segment_ids, weights, rngs, at, train=train, outputs=outputs
        )

    # Compiled here so that eager callers compile once a shape; inside an outer jit it is inlined.
    @functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "outputs"))
    def _hidden(
        self, variables, tokens, cache, segment_ids, weights, rngs, at, *, train: bool, outputs: str
    ) -> HiddenOutput:
        """As `hidden`, of arguments that are checked."""
        params = variables["params"]
        key = self._dropout_key(rngs, train)
        batch, seq = tokens.shape
        documents, before, poison = None, None, None
        is_broken = jnp.zeros((batch,), bool)
        if cache is not None or segment_ids is not None or weights is not None:
            last = (jnp.full((batch,), NO_SEGMENT, jnp.int32), jnp.zeros((batch,), jnp.int32))
            if cache is not None:
                is_broken = cache.document < 0
                number = jnp.where(is_broken, -1 - cache.document, cache.document)
                last = (cache.last_segment_id, number)
                before = (cache.layers, cache.carried)
            documents, last_id, document = advance_documents(segment_ids, *last, seq, weights)

        x = spread_tokens(call_module(self._embed, params["embed"], tokens))
        if documents is not None:
            past = jnp.where(is_broken, jnp.nan, 0.0)
            poison = find_poison(is_bad(x), documents.reset, past[:, None])
            x = poison.clean(x)
        if key is not None:
            x = self._drop_embedding(x, jax.random.fold_in(key, 0))
            key = jax.random.fold_in(key, 1)
        state = variables.get("model_state") or {"stack": {}}
        if not state["stack"] and has_state(self.config):
            raise ValueError(
                f"variables of a model with layers {self.config.pattern} need model_state: got "
                f"{sorted(variables)}; pass all that `init` returned"
            )
        norm = functools.partial(call_module, self._norm, params["norm"])
        options: dict[str, Any] = {"norm": norm, "key": key, "train": train}
        if self._body.picks_outputs:
            options |= {
                "source": Source(tokens, self._embedder(params)),
                "wanted": Wanted(outputs, at),
            }
        x, after, aux = self._body.apply(
            self.config, params, state["stack"], x, documents, before, **options
        )
        n = {"all": seq, "last": 1, "none": 0}[outputs]
        picked = slice(seq - n, seq) if at is None else at
        # Layers that read embeddings alone pass nothing else on to later tokens.
        is_broken = jnp.zeros((batch,), bool)
        if not self._body.picks_outputs:
            is_broken = is_bad(x[:, -1:])[:, 0]
            x = x[:, picked]
        if poison is not None:
            is_broken |= poison.reached[:, -1]
            x = jnp.where(poison.reached[:, picked, None], jnp.asarray(jnp.nan, x.dtype), x)
        if after is not None:
            layers, carried = after
            assert cache is not None
            document = jnp.where(is_broken, -1 - document, document)
            cache = dataclasses.replace(
                cache,
                layers=layers,
                last_segment_id=last_id,
                document=document,
                carried=carried,
            )
        return HiddenOutput(x, cache, aux)

    def unembedding(self, variables: dict[str, PyTree]) -> jax.Array:
        """Returns the output matrix [d_model, vocab] in the dtype of matrix products."""
        params = variables["params"]["embed"]
        return call_module(self._embed, params, method="unembedding")

    def _embedder(self, params: PyTree) -> Callable[[jax.Array], jax.Array]:
        """Returns ids -> embeddings as layers read them: 0 for what is no token."""

        def embed(ids: jax.Array) -> jax.Array:
            x = call_module(self._embed, params["embed"], ids)
            return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))

        return embed

    def _drop_embedding(self, x: jax.Array, key: PRNGKey) -> jax.Array:
        if self.config.embed_dropout == 0.0:
            return x
        keep = 1.0 - self.config.embed_dropout
        return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0).astype(x.dtype)

    def _dropout_key(self, rngs, train: bool) -> PRNGKey | None:
        if not train or not is_random(self.config):
            return None
        if not rngs or "dropout" not in rngs:
            raise ValueError(
                f"training with dropout needs a key: got rngs={rngs} and "
                f"config.model.dropout={self.config.dropout}; pass rngs={{'dropout': key}}"
            )
        return rngs["dropout"]

    @property
    def _body(self) -> Body:
        return body_of(self.config)

    @property
    def _embed(self) -> Embed:
        c = self.config
        return Embed(c.vocab_size, c.d_model, c.tie_embeddings, c.dtype, c.embed_scale)

    @property
    def _norm(self):
        return make_norm(self.config.norm, self.config.dtype, self.config.norm_eps)
