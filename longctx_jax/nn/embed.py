"""Token embedding and the output matrix, tied or not."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Embed(nn.Module):
    """Table [vocab, d_model] with unit-variance rows at the input, and the output matrix.

    The table has standard deviation 1/sqrt(d_model) and is multiplied by sqrt(d_model) on the way
    in, so a tied output matrix starts with logits of unit variance.
    """

    vocab_size: int
    d_model: int
    is_tied: bool
    dtype: str

    def setup(self):
        init = nn.initializers.normal(self.d_model**-0.5)
        shape = (self.vocab_size, self.d_model)
        self.table = self.param("table", init, shape, jnp.float32)
        if not self.is_tied:
            self.output = self.param("output", init, shape, jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings, [batch, seq] -> [batch, seq, d_model]."""
        return (self.table[tokens] * self.d_model**0.5).astype(self.dtype)

    def unembedding(self) -> jax.Array:
        """Returns the output matrix [d_model, vocab] in the dtype of matrix products."""
        table = self.table if self.is_tied else self.output
        return table.T.astype(self.dtype)
