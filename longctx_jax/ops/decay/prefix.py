"""The parallel-prefix form: states between chunks by an associative scan, depth log(seq).

A chunk acts on the state as S -> f S + A; two such maps compose to (f2 f1, f2 A1 + A2), which is
associative, so all states come out of one prefix computation (Blelloch 1990) instead of a walk.
Powers only multiply, hence underflow at worst.
"""

import jax
import jax.numpy as jnp

from longctx_jax.ops.decay.two_pass import CHUNK_LEN, chunk_parallel
from longctx_jax.typing import Array, Bool, Float


def decay_attention_prefix(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
    chunk_len: int = CHUNK_LEN,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`, with no sequential loop at all.

    Cost: as the two-pass form, plus about 4 key value flops a chunk; 2 log2(seq / chunk_len) steps.
    """
    arrays = (query, key, value, log_decay, state)
    options = {"reset": reset, "scale": scale, "chunk_len": chunk_len}
    return chunk_parallel(*arrays, **options, pass_states=_scan)


def _scan(state, added, forget):
    """Returns the last S and every S before its chunk, all prefixes at once."""
    first = added[:, :1] + forget[:, :1, :, None, None] * state[:, None]
    added = jnp.concatenate([first, added[:, 1:]], axis=1)

    def compose(left, right):
        return left[0] * right[0], right[0][..., None, None] * left[1] + right[1]

    _, after = jax.lax.associative_scan(compose, (forget, added), axis=1)
    before = jnp.concatenate([state[:, None], after[:, :-1]], axis=1)
    return after[:, -1], before
