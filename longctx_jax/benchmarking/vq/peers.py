"""The published implementation's attention layers on our inputs, from a checkout of its source.

Its branch `main` has a gated layer that is scanned over blocks; its branch `optimized` handles all
blocks at once, with three reductions, and has a layer of full attention over unquantised keys. The
weights are ours, copied over, so that outputs can be compared; inputs are handed over in the layout
that each layer wants. Metrics of the codebook, which some layers offer beside, are not asked for.

The code dates from jax 0.4.9. What today's jax lacks is put into the namespaces of its modules
only, and named in `notes`. Whatever cannot be imported or run gives a row `skipped` with the error.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.benchmarking.environment import git_revision, without_paths
from longctx_jax.benchmarking.rows import Fields
from longctx_jax.benchmarking.timing import Case
from longctx_jax.benchmarking.vq import cases as vq_cases
from longctx_jax.benchmarking.vq.cases import COMMITMENT, Inputs, Shape

PACKAGE = "transformer_vq"
DECAY = 0.99  # of its codebook's running averages
MIN_COUNT = 0.01  # below which its codewords shrink, as ours
CLIP_SHIM = "jnp.clip(a_min=...)"


class PeerError(Exception):
    """Something in the other implementation failed; the text says what, without paths."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """One layer of the published implementation.

    Attributes:
        branch: "legacy" or "optimized".
        kind: its name for the layer; of the legacy one only "scan".
    """

    name: str
    branch: str
    kind: str = "vq"
    reduction: str = "serial"
    grad_through_cache: bool = True

    @property
    def is_quadratic(self) -> bool:
        """Whether it computes the scores of all pairs."""
        return self.kind == "full"


PEERS = (
    Peer("published legacy scan", "legacy", "scan"),
    Peer("published legacy scan, no cache gradient", "legacy", "scan", grad_through_cache=False),
    Peer("published optimized scan", "optimized", "vq_old"),
    Peer("published optimized serial", "optimized", reduction="serial"),
    Peer("published optimized matmul", "optimized", reduction="matmul"),
    Peer("published optimized assoc_scan", "optimized", reduction="assoc_scan"),
    Peer("published optimized full", "optimized", "full"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkout:
    """A checkout of the published source, its layers imported; or why that failed.

    Attributes:
        branch: "legacy", "optimized", or "" where neither was found.
        modules: by their names within `transformer_vq.nn`.
        notes: the shims that were used.
        reason: why nothing of it runs, "" if it may.
    """

    branch: str
    revision: str
    modules: dict[str, types.ModuleType]
    notes: str
    reason: str = ""

    def peers(self) -> list[Peer]:
        """Returns the layers of its branch."""
        return [peer for peer in PEERS if peer.branch == self.branch]

    def fields(self) -> Fields:
        """Returns the fields that its rows have."""
        return {"peer_revision": self.revision, "notes": self.notes}


def load(path: pathlib.Path) -> Checkout:
    """Imports the layers of a checkout.

    Raises:
        ValueError: if the folder is not a checkout of the published implementation.
    """
    folder = path / "src" / PACKAGE / "nn"
    files = {"legacy": folder / "attn.py", "optimized": folder / "attn2.py"}
    branch = next((name for name, file in files.items() if file.is_file()), "")
    if not branch:
        raise ValueError(
            "--peers of the suite vq must be folders of checkouts of the published implementation, "
            f"which hold src/{PACKAGE}/nn/attn.py or attn2.py: got {path}"
        )
    names = ["attn" if branch == "legacy" else "attn2", "types", "vq"]
    revision = git_revision(path)
    try:
        with _first_on_path(path / "src"):
            found = {name: importlib.import_module(f"{PACKAGE}.nn.{name}") for name in names}
            notes = _add_shims()
    except Exception as error:  # other people's code, on a jax it does not know
        missing = isinstance(error, ModuleNotFoundError) and f"not installed: {error.name}"
        reason = missing or without_paths(f"{type(error).__name__}: {error}")
        return Checkout(branch, revision, {}, "", reason)
    return Checkout(branch, revision, found, notes)


@contextlib.contextmanager
def _first_on_path(folder: pathlib.Path) -> Iterator[None]:
    """Imports inside find the package there, even if another checkout's was imported before."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _add_shims() -> str:
    """Gives the imported modules the old names that they use, and returns which."""
    if "a_min" in inspect.signature(jnp.clip).parameters:
        return ""
    old = _OldNumpy("jax.numpy with the keywords of jax 0.4")
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE and getattr(module, "jnp", None) is jnp:
            module.__dict__["jnp"] = old
    return f"shims: {CLIP_SHIM}"


class _OldNumpy(types.ModuleType):
    """jax.numpy, but for what changed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: Any, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return jnp.clip(x, a_min, a_max)


def unsupported(peer: Peer, shape: Shape) -> str:
    """Returns why a layer cannot do a shape, "" if it might."""
    if shape.seq % shape.window_len:
        return f"its sequences are whole blocks: got {shape.seq} tokens of {shape.window_len} each"
    if peer.branch == "legacy":
        return "" if shape.head_type == "shga" else "its heads are all gated: shga only"
    if peer.kind != "vq_old" and shape.seq // shape.window_len < 3:
        return "it needs three blocks at least"
    return ""


def make_case(checkout: Checkout, peer: Peer, inputs: Inputs, pass_name: str) -> Case:
    """Returns the case of a layer, like those of `cases.make_case`.

    Its function raises PeerError where the layer cannot be traced.
    """
    make = _legacy if peer.branch == "legacy" else _optimized
    shape = inputs.shape
    try:
        apply, layout, back = make(checkout, peer, shape)
        sets = tuple((layout(x), layout(cotangent)) for x, cotangent in inputs.sets)
    except Exception as error:
        raise PeerError(_describe(error)) from error

    def forward(params, x):
        try:
            out = apply(params, x)
        except Exception as error:
            raise PeerError(_describe(error)) from error
        return out["res"], jnp.mean(out["l_commit"]), jnp.mean(out["l_codebook"])

    def forward_backward(params, x, cotangent):
        def objective(params, x):
            out, commit, codebook = forward(params, x)
            loss = jnp.mean(out.astype(jnp.float32) * cotangent)
            return loss + COMMITMENT * commit + codebook, commit

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)

    def compare(arguments, results):
        del arguments
        return inputs.differences(back(results[0]))

    is_forward = pass_name == "forward"
    weights = legacy_weights if peer.branch == "legacy" else optimized_weights
    variables = functools.cache(lambda: weights(inputs.variables("linear"), shape))
    check = compare if is_forward and not peer.is_quadratic else None
    function = forward if is_forward else forward_backward
    return vq_cases.cycle(function, sets, variables, pass_name, check)


def _describe(error: Exception) -> str:
    return without_paths(f"{type(error).__name__}: {error}")


def _shared_fields(shape: Shape) -> dict[str, Any]:
    """Returns what the configs of both branches call alike; values of no effect included."""
    return {
        "param_dtype": jnp.dtype(jnp.float32),
        "dtype": jnp.dtype(shape.dtype),
        "global_batch_size": shape.batch,
        "sequence_len": shape.seq,
        "block_len": shape.window_len,
        "d_model": shape.d_model,
        "d_k": shape.d_key,
        "n_code": shape.n_codes,
        "n_layer": 1,
        "n_vocab": 256,
        "pe_abs": False,
        "pe_lam": int(shape.model.of("vq").position_theta),
        "p_dropsin": 0.0,
        "p_dropres": 0.0,
        "p_droplyr": 0.0,
        "c_beta": COMMITMENT,
        "c_gamma": DECAY,
        "e_tie": False,
        "e_preln": False,
        "e_scale": 1.0,
        "is_train": True,
    }


_RNGS: Any = {"params": False, "timeless": False, "ephemeral": True}


def _legacy(checkout: Checkout, peer: Peer, shape: Shape):
    """Returns (params, x) -> results, and the layout of x and back: [blocks, batch, block, d]."""
    fields = _shared_fields(shape) | {
        "update_len": shape.seq,
        "mem_len": shape.window_len,
        "grad_thru_cache": peer.grad_through_cache,
        "agg_cache": True,
        "d_v": shape.model.d_value,
        "d_ff": 4 * shape.d_model,
        "n_head": 1,
        "p_dropemb": 0.0,
        "p_nucleus": 1.0,
    }
    config = checkout.modules["types"].TransformerConfig.create(**fields)
    attention = checkout.modules["attn"].VQAttention
    scanned = nn.scan(
        attention, variable_broadcast="params", split_rngs=_RNGS, in_axes=0, out_axes=0
    )(config)
    n_blocks = shape.seq // shape.window_len
    once = jnp.ones((n_blocks, 1), jnp.int32)
    marks = jnp.ones((n_blocks, shape.batch, shape.window_len), jnp.int32)
    spec = checkout.modules["vq"].VQSpec.create(
        n_device=once, n_block_per_update=n_blocks * once, loss_mask=marks
    )

    def apply(params, x):
        state = attention.initial_state(config, batch_size=shape.batch)
        blocks = {"input_features": x, "doc_ids": marks, "vq_spec": spec}
        return scanned.apply({"params": params}, state, blocks)[1]

    def layout(x):
        x = x.reshape(shape.batch, n_blocks, shape.window_len, -1)
        return jnp.swapaxes(x, 0, 1).copy()

    return apply, layout, lambda y: jnp.swapaxes(y, 0, 1).reshape(shape.batch, shape.seq, -1)


def _optimized(checkout: Checkout, peer: Peer, shape: Shape):
    fields = _shared_fields(shape) | {
        "n_device": 1,
        "attn_type": peer.kind,
        "head_type": shape.head_type,
        "reduction_type": peer.reduction,
    }
    config = checkout.modules["types"].TransformerConfig.create(**fields)
    attention = checkout.modules["attn2"].get_attn_cls(peer.kind)

    def apply(params, x):
        if peer.kind == "vq_old":  # the scan's own scope, whatever it is called
            like = jax.eval_shape(attention(config).init, jax.random.key(0), x)["params"]
            params = dict.fromkeys(like, params)
        return attention(config).apply({"params": params}, x)

    layout = functools.partial(attention.pre_reshape, config=config)
    return apply, layout, functools.partial(attention.post_reshape, config=config)


def legacy_weights(variables: Any, shape: Shape) -> dict[str, Any]:
    """Returns our weights under the names of the legacy layer; its norm has a bias, too."""
    ours = variables["params"]["mixer"]
    kernels = [ours[name]["kernel"] for name in ("key", "value", "gate")]
    return {
        "input_ln": {
            "g": variables["params"]["norm"]["scale"],
            "b": jnp.zeros((shape.d_model,), jnp.float32),
        },
        "q_proj": {"kernel": ours["query"]["kernel"]},
        "kvg_proj": {"kernel": jnp.concatenate(kernels, axis=1)},
        "r_proj": {"kernel": ours["relative"]["kernel"]},
        "res_proj": {"kernel": ours["out"]["kernel"]},
        "u": ours["content_bias"].reshape(-1),
        "v": ours["position_bias"].reshape(-1),
        "quantizer": _codebook(variables),
    }


def optimized_weights(variables: Any, shape: Shape) -> dict[str, Any]:
    """Returns our weights under the names of the optimized layers; their norm has none."""
    ours = variables["params"]["mixer"]
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    if shape.head_type == "shga":
        names["g_proj"] = "gate"
    return {
        "qkvg_producer": {to: {"kernel": ours[name]["kernel"]} for to, name in names.items()},
        "xl_bias_producer": {
            "xl_r_proj": {"kernel": ours["relative"]["kernel"]},
            "xl_u": ours["content_bias"].reshape(-1),
            "xl_v": ours["position_bias"].reshape(-1),
        },
        "res_proj": {"kernel": ours["out"]["kernel"]},
        "quantizer": _codebook(variables),
    }


def _codebook(variables: Any) -> dict[str, jax.Array]:
    book = variables["model_state"]["mixer"]["codebook"]
    return {"c_sum": book.sums, "c_count": jnp.maximum(book.counts, MIN_COUNT)}
