"""State-space duality (Mamba-2): decaying linear attention with the names of a state-space model.

    h_t = e^{delta_t a} h_{t-1} + b_t (delta_t u_t)^T,   y_t = c_t^T h_t + d u_t   h: [state, value]

With one rate a per head this is `decay_attention` of query c, key b, value delta u and log decay
delta a, and every algorithm and kernel of it serves.

Source: Dao & Gu (2024), arXiv 2405.21060.
"""

from longctx_jax.ops.checked import checked
from longctx_jax.ops.decay import decay_attention
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float

CHUNK_LEN = 64  # tokens


@checked
def ssd(
    u: Float[Array, "batch seq heads value"],
    delta: Float[Array, "batch seq heads"],
    a: Float[Array, " heads"],
    b: Float[Array, "batch seq groups state"],
    c: Float[Array, "batch seq groups state"],
    d: Float[Array, " heads"] | None = None,
    state: Float[Array, "batch heads state value"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    chunk_len: int = CHUNK_LEN,
    for_training: bool = True,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads state value"]]:
    """Returns y and the state h after the last token.

    Args:
        u: input of each head.
        delta: step sizes > 0.
        a: rates < 0, log of what a head keeps per unit step.
        b: input weights; a group of them serves a run of heads / groups neighbouring heads.
        c: output weights, as b.
        d: weight of the input itself; None = 0.
        state: h before the first token; None = zeros.
        reset: True where a token starts a new document: what came before is forgotten.
        chunk_len: tokens a chunk, for the forms that have chunks.
        for_training: see `decay_attention`.
        implementation: "auto" or a form of `decay_attention`.

    Returns:
        y in the dtype of u; h in float32, or float64 for float64 input.

    Raises:
        ValueError: unknown implementation, or groups that do not divide the heads.

    Cost: that of `decay_attention` with key width = state.
    """
    dtype = accumulator(u, delta, b, c)
    wide, step = u.astype(dtype), delta.astype(dtype)
    y, state = decay_attention(
        c,
        b,
        (step[..., None] * wide).astype(u.dtype),
        step * a.astype(dtype)[None, None],
        state,
        reset=reset,
        scale=1.0,
        chunk_len=chunk_len,
        for_training=for_training,
        implementation=implementation,
    )
    if d is not None:
        y = y.astype(dtype) + d.astype(dtype)[None, None, :, None] * wide
    return y.astype(u.dtype), state
