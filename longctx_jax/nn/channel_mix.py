"""RWKV's channel mix, and the shift of tokens that both of its halves use.

    y = sigmoid(W_r m_r) * W_v relu(W_k m_k)^2,    m_i = h + (h- - h) mu_i

with h the normed input and h- that of the token before (zeros at a document's start). Here mu is
the share of the token before, where version 4 is written with that of the current one.

Source: Peng et al. (2023), arXiv 2305.13048.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Documents
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import per_channel
from longctx_jax.ops.rwkv import shift_tokens


def share(d_model: int, power: jax.Array) -> jax.Array:
    """Returns 1 - (channel / d_model)^power: how much of the token before each channel takes."""
    return 1.0 - (jnp.arange(d_model) / d_model) ** power


class RWKVChannelMix(nn.Module):
    """sigmoid(W_r m_r) * W_v relu(W_k m_k)^2: an MLP of two tokens, the current and the last.

    Attributes:
        n_layers: of the stack, for the initial shifts.
    """

    d_ff: int
    n_layers: int
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: jax.Array | None,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps (x [batch, seq, d_model], the last token before it) to (y, the last token of x)."""
        reset = None if documents is None else documents.reset
        height = 1.0 - jnp.asarray(0 if layer is None else layer) / self.n_layers
        previous, last = shift_tokens(x, cache, reset=reset)
        start = share(x.shape[-1], height)
        mixed = {n: blend(self, x, previous - x, n, start) for n in ("key", "receptance")}
        hidden = jax.nn.relu(dense(self.d_ff, self.dtype, "key")(mixed["key"])) ** 2
        value = dense(x.shape[-1], self.dtype, "value", self.output_scale)(hidden)
        gate = jax.nn.sigmoid(dense(x.shape[-1], self.dtype, "receptance")(mixed["receptance"]))
        return gate * value, None if cache is None else last


def learned(module: nn.Module, name: str, start: jax.Array) -> jax.Array:
    """Returns a float32 parameter of the module that starts at the given values."""
    return module.param(name, lambda key: start.astype(jnp.float32))


def blend(module: nn.Module, x, change, name: str, start: jax.Array, extra: Any = 0.0):
    """Returns x + change * (a learned share a channel + extra); float32 or wider."""
    return x + change * (per_channel(learned(module, f"shift_{name}", start), x) + extra)
