"""Memory of a model by formula, and of the programs that run it as the compiler plans them.

Nothing is allocated: parameters, caches and programs are shapes, so a model of any size costs
seconds to account for. A program is one of

    prefill   a piece of a prompt onto a cache of max_len tokens, which is donated
    step      one token likewise, as a server would run it
    loop      the loop over tokens that `decoding.generate` runs, the cache donated
    train     a whole update: parameters, gradients, the optimizer's state, activations

and holds arguments + outputs - aliased + temporaries. All but the temporaries are exact, to the
byte. The cache is in `cache_formulas.py`, temporaries in `activation_formulas.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.benchmarking.activation_formulas import PROGRAMS, temporary_terms
from longctx_jax.benchmarking.cache_formulas import Terms, cache_bytes
from longctx_jax.benchmarking.decoding_cases import PREFILL_LEN, token_loop
from longctx_jax.models.base import Decoder
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.state import init_state
from longctx_jax.training.step import make_train_step

N_NEW = 8  # tokens of the loop: their number changes 4 bytes each
Plan = dict[str, int]  # bytes: arguments, outputs, aliased, temporaries, and their peak


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, or of their shapes."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def tree_numbers(tree: Any) -> int:
    """Returns how many numbers a tree of arrays or shapes has."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=256)
def variable_shapes(model: Decoder, weight_dtype: str = "") -> Any:
    """Returns the shapes of a model's variables; "" = of the parameters as stored, float32.

    Non-gradient state, a codebook, keeps its dtype.
    """
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    if not weight_dtype:
        return shapes
    cast = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, weight_dtype), shapes["params"])
    return {**shapes, "params": cast}


def parameter_bytes(model: Decoder, weight_dtype: str = "") -> int:
    """Returns the bytes of all variables: parameters, and state without a gradient."""
    return tree_bytes(variable_shapes(model, weight_dtype))


def parameter_count(model: Decoder) -> int:
    """Returns how many parameters are trained."""
    return tree_numbers(variable_shapes(model)["params"])


def layer_numbers(model: Decoder) -> int:
    """Returns the parameters of all layers, those that see another stack or a memory included."""
    params = variable_shapes(model)["params"]
    return sum(tree_numbers(params[name]) for name in ("stack", "cross") if name in params)


def predicted(
    model: Decoder,
    program: str,
    *,
    batch_size: int,
    max_len: int,
    piece_len: int = PREFILL_LEN,
    weight_dtype: str = "",
) -> tuple[Plan, Terms]:
    """Returns the plan of a program by formula, and what its temporaries hold.

    Args:
        model: built, so with its pattern filled in.
        program: of `PROGRAMS`.
        batch_size: rows.
        max_len: tokens that full attention can look back on.
        piece_len: tokens of a prompt at once; shorter contexts are one piece.
        weight_dtype: of the parameters; "" = as stored.

    Raises:
        ValueError: unknown program, model or mixer.
    """
    _require_program(program)
    config = model.config
    cache = cache_bytes(config, batch_size, max_len)
    seq_len = min(piece_len, max_len) if program == "prefill" else 1
    logits = 4 * batch_size * config.vocab_size
    arguments = parameter_bytes(model, weight_dtype) + cache
    terms = temporary_terms(
        config,
        program,
        batch_size=batch_size,
        seq_len=seq_len,
        max_len=max_len,
        layer_numbers=layer_numbers(model),
    )
    temporaries = sum(terms.values())
    if program == "loop":
        outputs = 4 * batch_size * N_NEW + cache
        return _plan(arguments + logits, outputs, cache, temporaries), terms
    arguments += 4 * batch_size * seq_len
    return _plan(arguments, logits + cache, cache, temporaries), terms


def measured(
    model: Decoder,
    program: str,
    *,
    batch_size: int,
    max_len: int,
    piece_len: int = PREFILL_LEN,
    weight_dtype: str = "",
) -> Plan:
    """Returns the plan of a compiled program, arguments as of `predicted`; nothing is run.

    Raises:
        ValueError: unknown program.
    """
    function, arguments = make_program(
        model,
        program,
        batch_size=batch_size,
        max_len=max_len,
        piece_len=piece_len,
        weight_dtype=weight_dtype,
    )
    return compiled_plan(function, arguments)


def make_program(
    model: Decoder,
    program: str,
    *,
    batch_size: int,
    max_len: int,
    piece_len: int = PREFILL_LEN,
    weight_dtype: str = "",
) -> tuple[Any, tuple]:
    """Returns a jitted function and the shapes of its arguments, arguments as of `predicted`."""
    _require_program(program)
    variables = variable_shapes(model, weight_dtype)
    cache = jax.eval_shape(lambda: model.init_cache(batch_size, max_len))
    if program == "loop":
        logits = jax.ShapeDtypeStruct((batch_size, model.config.vocab_size), jnp.float32)
        loop = functools.partial(token_loop, model, N_NEW)
        return jax.jit(loop, donate_argnums=2), (variables, logits, cache)
    seq_len = min(piece_len, max_len) if program == "prefill" else 1
    runs = model.exact if program == "prefill" else model
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    function = jax.jit(functools.partial(_read, runs), donate_argnums=2)
    return function, (variables, tokens, cache)


def _read(model: Decoder, variables: Any, tokens: jax.Array, cache: Any) -> Any:
    """One piece of a prompt, however long: `decode_suite.prefill` would cut it at PREFILL_LEN."""
    out = model.hidden(variables, tokens, cache, outputs="last")
    logits = out.hidden[:, -1] @ model.unembedding(variables)
    return logits.astype(jnp.float32), out.cache


def compiled_plan(function: Any, arguments: tuple) -> Plan:
    """Returns what the compiler plans to hold for a call with arguments of these shapes."""
    plan = function.lower(*arguments).compile().memory_analysis()
    return _plan(
        plan.argument_size_in_bytes,
        plan.output_size_in_bytes,
        plan.alias_size_in_bytes,
        plan.temp_size_in_bytes,
    )


def device_plan(function: Any, arguments: tuple) -> dict[str, int]:
    """Returns the bytes that a device held before a run and at most, where it counts; else {}.

    Allocates zeros of these shapes and runs the function once. The most is the high-water mark
    since the process began: account for small programs before large ones.
    """
    device = jax.local_devices()[0]
    if "peak_bytes_in_use" not in (device.memory_stats() or {}):
        return {}
    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), arguments)
    jax.block_until_ready(made)
    before = (device.memory_stats() or {})["bytes_in_use"]
    jax.block_until_ready(function(*made))
    most = (device.memory_stats() or {})["peak_bytes_in_use"]
    return {"device_bytes_before": before, "device_peak_bytes": most}


def train_plans(
    config: Any, model: Decoder, *, batch_size: int, seq_len: int, is_measured: bool = True
) -> tuple[Plan, Terms, Plan | None]:
    """Returns the plan of an update by shapes, what its temporaries hold, and the compiled plan.

    Temporaries are the gradients, what the forward pass keeps for the backward pass (counted in
    its trace, as config.model.remat says), what the backward pass of one layer makes or makes
    again (what a layer keeps without remat), and the logits of a chunk of the loss, twice.

    Args:
        config: whole; its optim and train.loss_chunk_len count.
        model: of config.model.
        batch_size: rows of an update.
        seq_len: tokens a row.
        is_measured: whether to compile.
    """
    tx, _ = make_optimizer(config.optim, config.train.n_steps)
    chunk_len = config.train.loss_chunk_len

    def start():
        sizes = {"batch_size": batch_size, "cache_len": 0}
        return init_state(model, tx, seed=0, use_ema=False, **sizes)

    state = jax.eval_shape(start)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, seq_len), dtype)
        for name, dtype in (("tokens", "int32"), ("targets", "int32"), ("weights", "float32"))
    }
    step = make_train_step(model, tx, loss_chunk_len=chunk_len)
    metrics = jax.eval_shape(step, state, batch)[1]
    n_tokens = batch_size * min(chunk_len or seq_len, seq_len)
    terms = {
        "gradients": tree_bytes(state.params),
        "kept": kept_bytes(model, batch_size, seq_len),
        "layer": kept_bytes(_without_remat(model), batch_size, seq_len) // _n_cells(model, seq_len),
        "logits": 2 * 4 * n_tokens * model.config.vocab_size,
    }
    held = tree_bytes(state)
    plan = _plan(held + tree_bytes(batch), held + tree_bytes(metrics), held, sum(terms.values()))
    return plan, terms, compiled_plan(step, (state, batch)) if is_measured else None


def kept_bytes(model: Decoder, batch_size: int, seq_len: int) -> int:
    """Returns the bytes that a forward pass keeps for the backward pass, parameters apart.

    Counted in the trace of `jax.vjp`: every array that goes from one pass to the other.
    """
    variables = variable_shapes(model)
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)

    def residuals(params, state, tokens, key):
        def hidden(params):
            rest = {"rngs": {"dropout": key}, "train": True}
            return model.hidden({"params": params, "model_state": state}, tokens, **rest).hidden

        return jax.tree.leaves(jax.vjp(hidden, params)[1])

    key = jax.eval_shape(lambda: jax.random.key(0))
    given = variables["params"], variables["model_state"]
    traced = jax.make_jaxpr(residuals)(*given, tokens, key).jaxpr
    arguments = {id(var) for var in traced.invars}
    kept = {id(var): var.aval for var in traced.outvars if id(var) not in arguments}
    return tree_bytes(list(kept.values()))


def _without_remat(model: Decoder) -> Decoder:
    return Decoder(dataclasses.replace(model.config, remat="none"))


def _n_cells(model: Decoder, seq_len: int) -> int:
    """Returns how many pieces the backward pass goes through one after another."""
    config = model.config
    segment_len = config.segment_len or seq_len
    if config.recurrence != "none":
        segment_len = config.memory.segment_len
    return config.n_layers // len(config.pattern) * -(-seq_len // segment_len)


def _plan(arguments: int, outputs: int, aliased: int, temporaries: int) -> Plan:
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": aliased,
        "temporaries": temporaries,
        "peak": arguments + outputs - aliased + temporaries,
    }


def _require_program(program: str) -> None:
    if program not in PROGRAMS:
        raise ValueError(
            f"a program must be one of {list(PROGRAMS)}: got {program!r}; choose one of them"
        )
