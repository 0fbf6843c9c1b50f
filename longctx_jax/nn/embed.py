"""Token embedding and the output matrix, tied or not."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.partition import everywhere


class Embed(nn.Module):
    """Table [vocab, d_model] and the output matrix: the same table, or one of its own.

    Both start with standard deviation 1/sqrt(d_model), so logits start with about unit variance.
    The table is multiplied by `scale` on the way in: by default sqrt(d_model) for a table of its
    own and 1 for a tied one, since the residual stream would else start by predicting the token it
    has just read.
    """

    vocab_size: int
    d_model: int
    is_tied: bool
    dtype: str
    scale: float

    def setup(self):
        """Makes the table, and the output matrix if it has its own."""
        init = nn.initializers.normal(self.d_model**-0.5)
        shape = (self.vocab_size, self.d_model)
        self.table = self.param("table", init, shape, jnp.float32)
        if not self.is_tied:
            self.output = self.param("output", init, shape, jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings, [batch, seq] -> [batch, seq, d_model]; NaN of no token's id."""
        # Gathered once: rows would else be gathered a token.
        table = jnp.asarray(everywhere(self.table))
        places = jnp.where(tokens < 0, self.vocab_size, tokens)  # else counted from the end
        rows = table.at[places].get(mode="fill", fill_value=jnp.nan)
        return (rows * self.scale).astype(self.dtype)

    def unembedding(self) -> jax.Array:
        """Returns the output matrix [d_model, vocab] in the dtype of matrix products."""
        table = self.table if self.is_tied else self.output
        return table.T.astype(self.dtype)
