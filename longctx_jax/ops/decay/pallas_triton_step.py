"""One token of decay attention in Pallas, lowered by Triton: the state is read once.

Nothing imports this file but `pallas_triton.py`, and `select.py` when it runs it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.decay.kernel_inputs import NO_MEMORY, pad_state, pad_width
from longctx_jax.ops.decay.linear_vjp import share_heads
from longctx_jax.ops.triton_kernels import quietly
from longctx_jax.typing import Array, Bool, Float

MIN_WIDTH = 16  # of Triton's products


def one_token(x, y, z, log_decay, state, *, reset, scale, interpret):
    """A walk over one token, as decoding has it: the step's kernel, without a tile of padding."""
    n_heads = log_decay.shape[-1]
    x, y, z = (share_heads(a, n_heads)[:, 0] for a in (x, y, z))
    if state is None:
        state = jnp.zeros((x.shape[0], n_heads, x.shape[-1], z.shape[-1]), jnp.float32)
    log_decay = log_decay if log_decay.ndim == 1 else log_decay[:, 0]
    reset = None if reset is None else reset[:, 0]
    options = {"reset": reset, "scale": scale, "interpret": interpret}
    out, last = step(x, y, z, log_decay, state, **options)
    return out[:, None], last


def step(
    query: Float[Array, "batch heads key"],
    key: Float[Array, "batch heads key"],
    value: Float[Array, "batch heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch heads"],
    state: Float[Array, "batch heads key value"],
    *,
    reset: Bool[Array, "batch #heads"] | None = None,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention_step`; the state's buffer is reused where donated.

    Cost: 6 batch heads key value flops; 8 key value bytes a head, where two fused XLA loops would
    read the new state once more.
    """
    batch, heads, d_key = query.shape
    d_value = value.shape[-1]
    widths = [max(MIN_WIDTH, pl.next_power_of_2(d)) for d in (d_key, d_value)]
    query, key = pad_width(query, widths[0]), pad_width(key, widths[0])
    value = pad_width(value, widths[1])
    padded = pad_state(state, *widths)
    assert padded is not None
    keep = jnp.broadcast_to(jnp.exp(jnp.maximum(log_decay, NO_MEMORY)), (batch, heads))
    if reset is not None:
        keep = jnp.where(reset, 0.0, keep)
    block = min(widths[1], 32)

    def row(width, is_tiled=False):
        return pl.BlockSpec((None, None, width), lambda tile, h, b: (b, h, tile if is_tiled else 0))

    tile = pl.BlockSpec((None, None, widths[0], block), lambda tile, h, b: (b, h, 0, tile))
    run = pl.pallas_call(
        functools.partial(_step_kernel, scale=scale),
        grid=(widths[1] // block, heads, batch),
        in_specs=[
            row(widths[0]),
            row(widths[0]),
            row(block, True),
            pl.BlockSpec((None, 1), lambda tile, h, b: (b, h)),
            tile,
        ],
        out_specs=[row(block, True), tile],
        out_shape=[
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        ],
        input_output_aliases={4: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decay_attention_step",
    )
    out, new = quietly(run, query, key, value, keep, padded)
    return out[..., :d_value], new[..., :d_key, :d_value]


def _step_kernel(q_ref, k_ref, v_ref, keep_ref, state_ref, out_ref, new_ref, *, scale):
    query = q_ref[...].astype(jnp.float32)[:, None]
    key = k_ref[...].astype(jnp.float32)[:, None]
    value = v_ref[...].astype(jnp.float32)[None, :]
    state = keep_ref[0] * state_ref[...] + key * value
    new_ref[...] = state
    out_ref[...] = (scale * jnp.sum(query * state, axis=0)).astype(out_ref.dtype)
