"""Token shift: each token's predecessor, which is state across calls."""

import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.typing import Array, Bool, Float


@checked
def shift_tokens(
    x: Float[Array, "batch seq model"],
    last: Float[Array, "batch model"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
) -> tuple[Float[Array, "batch seq model"], Float[Array, "batch model"]]:
    """Returns x one token earlier, and the last token, which is `last` of the next call.

    Args:
        x: the tokens of the call.
        last: the token before x; None = zeros.
        reset: True at the first token of a document, whose predecessor is zeros.

    Source: Peng et al. (2023), arXiv 2305.13048.
    """
    first = jnp.zeros_like(x[:, :1]) if last is None else last[:, None].astype(x.dtype)
    previous = jnp.concatenate([first, x[:, :-1]], axis=1)
    if reset is not None:
        previous = jnp.where(reset[..., None], 0, previous)
    return previous, x[:, -1]
