"""Tensors of a LLaMA-family checkpoint and parameters of our transformer, both ways.

A pure renaming: linear maps are transposed (theirs are [out, in]) and stacked over layers; rotary
pairs are (i, i + width/2) on both sides, and no number changes. Not here: the fields of config.json
(`hf_config.py`) and the files (`safetensors_files.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from longctx_jax.conversion.safetensors_files import DTYPES, TensorFile, read_float32
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.stack import layer_names, layer_places
from longctx_jax.typing import PyTree

TABLE, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TOP = {
    ("embed", "table"): TABLE,
    ("embed", "output"): OUTPUT,
    ("norm", "scale"): "model.norm.weight",
}
# path below a layer -> name below model.layers.<n>; kernels are transposed
IN_LAYER = {
    ("mixer_norm", "scale"): "input_layernorm.weight",
    ("mixer", "query", "kernel"): "self_attn.q_proj.weight",
    ("mixer", "key", "kernel"): "self_attn.k_proj.weight",
    ("mixer", "value", "kernel"): "self_attn.v_proj.weight",
    ("mixer", "query_norm", "scale"): "self_attn.q_norm.weight",
    ("mixer", "key_norm", "scale"): "self_attn.k_norm.weight",
    ("mixer", "out", "kernel"): "self_attn.o_proj.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
}
NOT_WEIGHTS = "rotary_emb.inv_freq"  # constants that older versions of the library saved
N_SHOWN = 100  # tensors in an error


class Leaf(NamedTuple):
    """A parameter of ours and the tensors it consists of."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]  # one a layer of the leading axis; one for others
    is_stacked: bool
    is_transposed: bool


def leaves(model: Decoder) -> list[Leaf]:
    """Returns the parameters of a model with the names of their tensors."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))["params"]
    places = dict(zip(layer_names(model.config), layer_places(model.config), strict=True))
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = tuple(key.key for key in keys)
        if path[0] != "stack":
            found.append(Leaf(path, leaf.shape, (TOP[path],), False, False))
            continue
        below = path[2:]
        names = tuple(f"model.layers.{n}.{IN_LAYER[below]}" for n in places[path[1]].tolist())
        found.append(Leaf(path, leaf.shape, names, True, below[-1] == "kernel"))
    return found


def expected_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor that a model's checkpoint must have."""
    shapes = {}
    for leaf in leaves(model):
        shape = leaf.shape[1:] if leaf.is_stacked else leaf.shape
        shapes |= dict.fromkeys(leaf.names, shape[::-1] if leaf.is_transposed else shape)
    return shapes


def require_layers(n_layers: int, n_tensors: int) -> None:
    """Raises ValueError if there cannot be a tensor for each layer, before layers are listed."""
    if n_layers > n_tensors:
        raise ValueError(
            f"config.json: num_hidden_layers must fit the tensors: got {n_layers} layers, and "
            f"{n_tensors} tensors in all; compare the file with the original one"
        )


def require_tensors(model: Decoder, found: Mapping[str, TensorFile]) -> None:
    """Raises ValueError unless a checkpoint has exactly a model's tensors; lists all that differ.

    A tied model may come with its output matrix, and older files with constants of the rotation.
    """
    expected = expected_shapes(model)
    problems = [
        f"{name} {shape} is missing" for name, shape in expected.items() if name not in found
    ]
    if model.config.tie_embeddings and OUTPUT in found:
        expected = expected | {OUTPUT: expected[TABLE]}
    for name, tensor in found.items():
        if name not in expected:
            if not name.endswith(NOT_WEIGHTS):
                problems.append(f"{name} {tensor.shape} has no place")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} is {tensor.shape}, not {expected[name]}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{name} is {tensor.dtype}, not one of {list(DTYPES)}")
    if problems:
        more = f"; and {len(problems) - N_SHOWN} more" if len(problems) > N_SHOWN else ""
        raise ValueError(
            f"the tensors must be those that config.json describes: {len(problems)} differ: "
            f"{'; '.join(problems[:N_SHOWN])}{more}; compare config.json and the weights with the "
            "original checkpoint"
        )


def to_params(model: Decoder, read: Callable[[str], np.ndarray]) -> PyTree:
    """Returns the parameters, float32, of tensors that `read` gives by name.

    Raises:
        ValueError: a tensor with numbers that are not finite.

    Cost: the parameters, and one tensor more, in memory.
    """
    params: dict[str, Any] = {}
    for leaf in leaves(model):
        array = np.empty(leaf.shape, np.float32)
        for place, name in enumerate(leaf.names):
            tensor = read(name)
            if not np.all(np.isfinite(tensor)):
                n_bad = np.count_nonzero(~np.isfinite(tensor))
                raise ValueError(
                    f"the weights must be finite: {name} has {n_bad} numbers that are NaN or "
                    "infinite; download the checkpoint again, or convert an earlier one"
                )
            array[place if leaf.is_stacked else ...] = tensor.T if leaf.is_transposed else tensor
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = array
    return params


def require_tied(model: Decoder, params: PyTree, found: Mapping[str, TensorFile]) -> None:
    """Raises ValueError if a tied model's checkpoint has an output matrix that is another one."""
    if not model.config.tie_embeddings or OUTPUT not in found:
        return
    if not np.array_equal(read_float32(found[OUTPUT], OUTPUT), params["embed"]["table"]):
        raise ValueError(
            f"config.json: tie_word_embeddings is true, and {OUTPUT} is not {TABLE}: the reference "
            "library would ignore it; set tie_word_embeddings to false, or delete the tensor"
        )


def to_tensors(model: Decoder, params: PyTree) -> dict[str, np.ndarray]:
    """Returns the tensors of a model's checkpoint by name, float32; the inverse of `to_params`."""
    tensors = {}
    for leaf in leaves(model):
        value = params
        for key in leaf.path:
            value = value[key]
        value = np.asarray(value)
        for place, name in enumerate(leaf.names):
            tensor = value[place] if leaf.is_stacked else value
            tensors[name] = np.ascontiguousarray(tensor.T if leaf.is_transposed else tensor)
    if model.config.embed_scale != 1.0:
        tensors[TABLE] = tensors[TABLE] * np.float32(model.config.embed_scale)
    return tensors
