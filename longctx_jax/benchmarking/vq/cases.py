"""One thing to time of the suite `vq`: an attention layer as a module, forward and backward.

A layer is what one residual branch adds: input norm, projections, attention, gate, output
projection. A form is an implementation of vector-quantised attention, or "softmax <implementation>"
of exact attention behind the same projections (no positions, and keys as they are). Pass `forward`
is that of training: output, commitment loss and what the codebook is updated from.
`forward_backward` is the gradient of mean(output * cotangent) + commitment loss to the input and
all parameters, and the same statistics.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.benchmarking.rows import Fields
from longctx_jax.benchmarking.timing import Case
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import make_mixer
from longctx_jax.nn.contract import Call, no_aux
from longctx_jax.nn.costs import mean_visible_keys
from longctx_jax.nn.mixers.vq import VQConfig
from longctx_jax.nn.mlp import dense
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.ops.attention import attention

PASSES = ("forward", "forward_backward")
SOFTMAX = "softmax "
LINEAR_FORMS = ("linear", "pallas_triton", "auto")
COMMITMENT = 1e-4
N_SETS = 3  # of inputs that runs take turns with
MAX_SETS_BYTES = 2**30  # no second set of inputs beyond this
# Dense products and all, flops/s that a form at least reaches: for bounds on what is run.
RATES = {"cpu": 5e10, "gpu": 1e14}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer and its input."""

    head_type: str
    batch: int
    seq: int
    d_model: int
    d_key: int
    n_codes: int
    window_len: int
    block_len: int
    dtype: str
    reduction: str = "serial"

    @property
    def model(self) -> ModelConfig:
        """The config of a model with such layers; a gated unit has no second half."""
        is_gated = self.head_type == "shga"
        n_heads = 1 if is_gated else self.d_model // self.d_key
        vq = VQConfig(
            codebook_size=self.n_codes,
            window_len=self.window_len,
            block_len=self.block_len,
            reduction=self.reduction,
            gate="silu" if is_gated else "none",
            commitment=COMMITMENT,
        )
        return ModelConfig(
            name="transformer_vq",
            pattern=("vq",),
            n_layers=1,
            d_model=self.d_model,
            n_heads=n_heads,
            n_kv_heads=n_heads if self.head_type == "mha" else 1,
            d_key=self.d_key,
            d_value=2 * self.d_model if is_gated else self.d_key,
            mlp="none" if is_gated else "relu2",
            dtype=self.dtype,
            mixer_fields={"vq": vq},
        )

    def fields(self) -> Fields:
        """Returns the fields that say which shape a row is about."""
        model = self.model
        return {
            "head_type": self.head_type,
            "batch_size": self.batch,
            "seq_len": self.seq,
            "d_model": self.d_model,
            "n_heads": model.n_heads,
            "n_kv_heads": model.n_kv_heads,
            "d_key": self.d_key,
            "d_value": model.d_value,
            "n_codes": self.n_codes,
            "window_len": self.window_len,
            "block_len": self.block_len,
            "reduction": self.reduction,
            "dtype": self.dtype,
        }


class Layer(nn.Module):
    """Input norm, then a mixer in training mode; maps x to (what the branch adds, aux)."""

    mixer: nn.Module
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array):
        """Maps [batch, seq, d_model] to the same."""
        normed = RMSNorm(self.dtype, name="norm")(x)
        out, _, aux = self.mixer(normed, None, None, train=True)
        return out, aux


class FullAttention(nn.Module):
    """The projections of `VQAttention` around exact attention, which has no positions here."""

    model: ModelConfig
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, documents: Any, *, train: bool):
        """As other mixers, without a cache."""
        del cache, documents, train
        model = self.model
        is_gated = model.of("vq").gate == "silu"
        unit = model.d_key**-0.25

        def heads(name, n_heads, width):
            y = dense(n_heads * width, model.dtype, name)(x)
            return y.reshape(*x.shape[:2], n_heads, width)

        def normed(y):
            return unit * RMSNorm(model.dtype, use_scale=False)(y)

        query = normed(heads("query", model.n_heads, model.d_key))
        key = normed(heads("key", model.n_kv_heads, model.d_key))
        value = heads("value", model.n_kv_heads, model.d_value)
        if is_gated:
            value = jax.nn.silu(value)
        out = attention(query, key, value, scale=1.0, implementation=self.implementation)
        out = out.reshape(*x.shape[:2], -1)
        if is_gated:
            out = out * jax.nn.silu(dense(out.shape[-1], model.dtype, "gate")(x))
        return dense(x.shape[-1], model.dtype, "out")(out), None, no_aux()


def make_layer(form: str, shape: Shape) -> Layer:
    """Returns the layer of a form; the plain JAX ones search for codes in plain JAX, too."""
    model = shape.model
    if form.startswith(SOFTMAX):
        return Layer(FullAttention(model, form.removeprefix(SOFTMAX)), shape.dtype)
    search = "xla" if form in ("linear", "quadratic") else "auto"
    model = model.with_fields_of("vq", implementation=form, search=search)
    return Layer(make_mixer(model, "vq"), shape.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Random inputs and cotangents of one shape, and the weights all forms share."""

    shape: Shape
    sets: tuple[tuple[jax.Array, jax.Array], ...]  # (x, cotangent), [batch, seq, d_model]
    seed: int = 0
    cache: dict[str, Any] = dataclasses.field(default_factory=dict)

    def variables(self, form: str) -> dict[str, Any]:
        """Returns {"params", "model_state"} of a form; those of one kind are the same."""
        kind = "softmax blockwise" if form.startswith(SOFTMAX) else "linear"
        if kind not in self.cache:
            layer = make_layer(kind, self.shape)
            key = jax.random.key(self.seed)
            self.cache[kind] = jax.jit(layer.init)(key, self.sets[0][0][:1, :2])
        return self.cache[kind]

    def reference(self) -> np.ndarray:
        """Returns the linear form's output for the first set; computed once."""
        if "reference" not in self.cache:
            run = jax.jit(functools.partial(forward, make_layer("linear", self.shape)))
            out = run(self.variables("linear"), self.sets[0][0])[0]
            self.cache["reference"] = np.asarray(out, np.float32)
        return self.cache["reference"]

    def differences(self, out: Any) -> Fields:
        """Returns the rms difference of an output for the first set to the linear form's."""
        out, wanted = np.asarray(out, np.float32), self.reference()
        ratio = np.sqrt(np.mean((out - wanted) ** 2)) / np.sqrt(np.mean(wanted**2))
        return {"rel_rms_to_linear": float(f"{ratio:.3e}") if np.isfinite(ratio) else None}


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Returns sets of unit-normal inputs and cotangents: one set where they would be large."""
    size = (shape.batch, shape.seq, shape.d_model)
    n_bytes = 2 * math.prod(size) * np.dtype(shape.dtype).itemsize
    n_sets = max(1, min(N_SETS, MAX_SETS_BYTES // n_bytes))
    sets = (_make_set(jax.random.key(seed + i), size, shape.dtype) for i in range(n_sets))
    return Inputs(shape, tuple(sets), seed)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _make_set(key: jax.Array, size: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    x_key, cotangent_key = jax.random.split(key)
    return jax.random.normal(x_key, size, dtype), jax.random.normal(cotangent_key, size, dtype)


def forward(layer: Layer, variables: Any, x: jax.Array):
    """Returns (output, commitment loss a token, codebook statistics)."""
    applied: Any = layer.apply(variables, x)
    out, aux = applied
    loss = sum(aux.losses.values(), jnp.zeros(())) / (x.shape[0] * x.shape[1])
    return out, loss, aux.statistics


def forward_backward(layer: Layer, variables: Any, x: jax.Array, cotangent: jax.Array):
    """Returns (gradients of parameters and x, commitment loss, codebook statistics)."""

    def objective(params, x):
        out, loss, statistics = forward(layer, variables | {"params": params}, x)
        return jnp.mean(out.astype(jnp.float32) * cotangent) + loss, (loss, statistics)

    gradients, others = jax.grad(objective, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return gradients, *others


def make_case(form: str, inputs: Inputs, pass_name: str) -> Case:
    """Returns the case of a form: (variables, x[, cotangent]) -> results."""
    layer = make_layer(form, inputs.shape)
    variables = functools.cache(lambda: inputs.variables(form))
    is_same_function = not form.startswith(SOFTMAX) and form != "linear"
    inspect = None
    if pass_name == "forward" and is_same_function:
        inspect = lambda arguments, results: inputs.differences(results[0])  # noqa: E731
    function = functools.partial(forward if pass_name == "forward" else forward_backward, layer)
    return cycle(function, inputs.sets, variables, pass_name, inspect)


def cycle(
    function: Callable[..., Any],
    sets: tuple[tuple[jax.Array, jax.Array], ...],
    variables: Callable[[], Any],
    pass_name: str,
    inspect: Callable[[tuple, Any], Fields] | None,
) -> Case:
    """Returns the case whose runs take turns with the sets; `forward` takes no cotangent."""
    turns = itertools.cycle(sets)

    def next_inputs(last):
        del last
        x, cotangent = next(turns)
        return (variables(), x) if pass_name == "forward" else (variables(), x, cotangent)

    return Case(jax.jit(function), next_inputs, keeps_output=False, inspect=inspect)


def ideal_flops(form: str, shape: Shape, pass_name: str) -> int:
    """Returns the flops of visible pairs, backwards twice those forward but for the search.

    Of a linear form: the window's keys and the codes, whatever its blocks; of the others: all keys.
    """
    model = shape.model
    search = 2 * model.n_kv_heads * shape.n_codes * shape.d_key
    if form.startswith(SOFTMAX):
        gate = 2 * model.d_model * model.d_value if shape.head_type == "shga" else 0
        per_token = flops.mixer_flops(model, "softmax", Call(shape.seq)) + gate
        search = 0
    elif form == "quadratic":
        pairs = mean_visible_keys(shape.seq)
        without = model.with_fields_of("vq", use_table=False)
        per_token = flops.mixer_flops(without, "vq", Call(shape.seq))
        seen = mean_visible_keys(shape.seq, 0, shape.window_len + 1)
        per_token += 2 * model.n_heads * (pairs - seen) * (shape.d_key + model.d_value)
    else:
        per_token = flops.mixer_flops(model, "vq", Call(shape.seq))
    if pass_name == "forward_backward":
        per_token = flops.TRAIN_FACTOR * per_token - (flops.TRAIN_FACTOR - 1) * search
    return round(shape.batch * shape.seq * per_token)


def ideal_bytes(shape: Shape, pass_name: str) -> int:
    """Returns the bytes of inputs, parameters and results, each moved once.

    forward: x and output, parameters. forward_backward: x, cotangent and the gradient of x,
    parameters and their gradients.
    """
    model = shape.model
    outputs = model.n_heads * model.d_value * (2 if shape.head_type == "shga" else 1)
    inputs = model.n_heads * model.d_key + model.n_kv_heads * (model.d_key + model.d_value)
    n_params = model.d_model * (inputs + outputs + model.n_kv_heads * model.d_key)
    arrays, copies = (2, 1) if pass_name == "forward" else (3, 2)
    n_numbers = shape.batch * shape.seq * shape.d_model
    return arrays * n_numbers * np.dtype(shape.dtype).itemsize + 4 * copies * n_params


def predicted_seconds(form: str, shape: Shape, pass_name: str, platform: str) -> float:
    """Returns a rough time of a call at `RATES`, for bounds only; masked pairs are computed too."""
    factor = 1 if form in LINEAR_FORMS or form == "softmax cudnn" else 2
    if form.startswith(SOFTMAX) and pass_name == "forward_backward":
        factor *= 1.2  # scores are computed again
    return factor * ideal_flops(form, shape, pass_name) / RATES.get(platform, RATES["gpu"])
