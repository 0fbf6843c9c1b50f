"""The frozen config, building models from it, their sizes and their dtypes."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import base
from longctx_jax.models import build_model
from longctx_jax.models.config import ModelConfig, model_config
from longctx_jax.models.inattention.config import InAttentionConfig
from longctx_jax.models.recurrent_memory.config import MemoryConfig
from longctx_jax.models.stack import layer_places
from longctx_jax.models.stagformer.config import StagFormerConfig
from longctx_jax.nn.config_checks import nearest_divisor
from longctx_jax.nn.mixers import MIXERS
from tests.helpers import assert_trees_close, random_variables
from tests.models.recorded import FILE

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9), np.int32)

MISTAKES = [
    ({"n_layers": 2.0}, "config.model.n_layers must be an integer: got 2.0; write a whole number"),
    ({"n_heads": True}, "config.model.n_heads must be an integer: got True"),
    ({"vq": {"window_len": "8"}}, "config.model.vq.window_len must be an integer: got '8'; write"),
    ({"outside_mixers": 5}, "config.model.outside_mixers must list texts: got 5; leave it to"),
    ({"n_layers": 0}, "config.model.n_layers must be positive: got 0; set it above 0"),
    ({"d_model": -8}, "config.model.d_model must be positive: got -8; set it above 0"),
    ({"n_heads": 0}, "config.model.n_heads must be positive: got 0"),
    ({"vocab_size": 0}, "config.model.vocab_size must be positive: got 0"),
    ({"n_ramp_buckets": 0}, "config.model.n_ramp_buckets must be positive: got 0"),
    ({"unroll": 0}, "config.model.unroll must be positive: got 0"),
    ({"n_kv_heads": -1}, "config.model.n_kv_heads must not be negative: got -1; 0 means off or"),
    ({"d_key": -1}, "config.model.d_key must not be negative: got -1"),
    ({"d_value": -1}, "config.model.d_value must not be negative: got -1"),
    ({"d_ff": -1}, "config.model.d_ff must not be negative: got -1"),
    ({"norm_eps": 0.0}, "config.model.norm_eps must be positive: got 0.0"),
    ({"embed_scale": -1.0}, "config.model.embed_scale must not be negative: got -1.0"),
    ({"softmax": {"rope_scaling": "ntk"}}, "config.model.softmax.rope_scaling must be one of"),
    ({"sliding": {"rope_factor": 0.0}}, "config.model.sliding.rope_factor must be positive"),
    ({"softmax": {"rope_scaling": "llama3"}}, "config.model.softmax.rope_original_len must be pos"),
    (
        {"softmax": {"rope_scaling": "yarn", "rope_original_len": 8, "rope_low_turns": 4.0}},
        "config.model.softmax.rope_low_turns must be below rope_high_turns: got 4.0 and 4.0; "
        "llama3 has 1 and 4, yarn 1 and 32",
    ),
    ({"segment_len": -1}, "config.model.segment_len must not be negative: got -1"),
    (
        {"mlp": "relu"},
        "config.model.mlp must be one of ['swiglu', 'gelu', 'relu2', 'rwkv', 'none']: "
        "got 'relu'; choose one",
    ),
    ({"norm": "batch"}, "config.model.norm must be one of ['rms', 'layer']: got 'batch'"),
    ({"dtype": "float16"}, "config.model.dtype must be one of"),
    ({"remat": "all"}, "config.model.remat must be one of ['none', 'dots', 'full']: got 'all'"),
    ({"schedule": "wave"}, "config.model.schedule must be one of"),
    ({"dropout": 1.0}, "config.model.dropout must be in [0, 1): got 1.0; it is a probability"),
    ({"dropout": -0.1}, "config.model.dropout must be in [0, 1): got -0.1"),
    (
        {"d_model": 96, "n_heads": 7},
        "config.model.n_heads must divide d_model: got n_heads=7, d_model=96; use n_heads=6 or set "
        "config.model.d_key",
    ),
    (
        {"n_heads": 6, "d_key": 8, "n_kv_heads": 4},
        "config.model.n_kv_heads must divide n_heads: got n_kv_heads=4, n_heads=6; "
        "use n_kv_heads=3",
    ),
    (
        {"name": "rnn"},
        "config.model.name must be one of ['transformer', 'transformer_vq', 'decay', "
        "'recurrent_memory', 'stagformer', 'inattention']: got 'rnn'",
    ),
    ({"pattern": ("decay", "conv")}, "config.model.pattern must be one of"),
    (
        {"pattern": ("decay", "sliding"), "n_layers": 3},
        "config.model.n_layers must be a multiple of the pattern's length: got n_layers=3, "
        "pattern=('decay', 'sliding'); use n_layers=4",
    ),
    ({"n_layer": 2}, "config.model.n_layer is not a field: known are ['name', 'pattern', "),
    ({"decay": {"chunks": 2}}, "config.model.decay.chunks is not a field: known are ['kind', "),
    ({"softmax": {"position": "alibi"}}, "config.model.softmax.position must be one of"),
    ({"softmax": {"rope_theta": 0.0}}, "config.model.softmax.rope_theta must be positive: got 0.0"),
    ({"sliding": {"window_len": 0}}, "config.model.sliding.window_len must be positive: got 0"),
    ({"sliding": {"position": "x"}}, "config.model.sliding.position must be one of"),
    ({"sliding": {"rope_theta": -1}}, "config.model.sliding.rope_theta must be positive: got -1"),
    ({"decay": {"kind": "x"}}, "config.model.decay.kind must be one of"),
    ({"decay": {"chunk_len": 0}}, "config.model.decay.chunk_len must be positive: got 0"),
    ({"decay": {"position": "relative"}}, "config.model.decay.position must be one of"),
    ({"decay": {"rope_theta": 0}}, "config.model.decay.rope_theta must be positive: got 0"),
    ({"vq": {"codebook_size": 0}}, "config.model.vq.codebook_size must be positive: got 0"),
    ({"vq": {"window_len": 0}}, "config.model.vq.window_len must be positive: got 0"),
    ({"vq": {"block_len": -1}}, "config.model.vq.block_len must not be negative: got -1"),
    ({"vq": {"reduction": "x"}}, "config.model.vq.reduction must be one of ['auto', 'serial'"),
    ({"vq": {"gate": "gelu"}}, "config.model.vq.gate must be one of ['silu', 'none']: got 'gelu'"),
    ({"vq": {"position": "rotary"}}, "config.model.vq.position must be one of ['relative'"),
    ({"vq": {"position_dropout": 1}}, "config.model.vq.position_dropout must be in [0, 1): got 1"),
    ({"vq": {"codebook_decay": 2}}, "config.model.vq.codebook_decay must be in [0, 1]: got 2; it"),
    ({"vq": {"codebook_start": "x"}}, "config.model.vq.codebook_start must be one of ['sphere'"),
    ({"vq": {"search": "x"}}, "config.model.vq.search must be one of ['auto', 'pallas_triton'"),
    ({"vq": {"implementation": "x"}}, "config.model.vq.implementation must be one of ['auto', "),
    (
        {"vq": {"codebook_decay": 1.0, "reseed_below": 1.0}},
        "config.model.vq.reseed_below needs a codebook that learns: got 1.0",
    ),
    ({"rwkv": {"version": 5}}, "config.model.rwkv.version must be one of [4, 6]: got 5; choose"),
    ({"rwkv": {"chunk_len": 0}}, "config.model.rwkv.chunk_len must be positive: got 0"),
    (
        {"pattern": ("rwkv",), "d_model": 96, "n_heads": 3, "rwkv": {"head_len": 64}},
        "config.model.rwkv.head_len must divide d_model: got head_len=64, d_model=96; use 48, or 0",
    ),
    ({"mamba": {"version": 3}}, "config.model.mamba.version must be one of [1, 2]: got 3; choose"),
    ({"mamba": {"expand": 0}}, "config.model.mamba.expand must be positive: got 0"),
    ({"mamba": {"d_state": -1}}, "config.model.mamba.d_state must not be negative: got -1"),
    (
        {"pattern": ("mamba",), "d_model": 48},
        "config.model.mamba.head_len must divide expand * d_model: got head_len=64, 2 * 48; use 48",
    ),
    (
        {"pattern": ("mamba",), "d_model": 128, "mamba": {"n_groups": 3}},
        "config.model.mamba.n_groups must divide the heads, expand * d_model / head_len: got "
        "n_groups=3, 4 heads; use 2",
    ),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=lambda x: str(x)[:40])
def test_a_mistake_names_field_value_and_remedy(fields, message):
    with pytest.raises(ValueError) as error:
        build_model(fields)
    assert message in str(error.value)
    assert "; " in str(error.value)  # what to do


CONFIGS = {
    "": ModelConfig,
    "memory": MemoryConfig,
    "stagformer": StagFormerConfig,
    "inattention": InAttentionConfig,
    **{kind: mixer.config for kind, mixer in MIXERS.items()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_integer_is_checked(name):
    kind = CONFIGS[name]
    for field in dataclasses.fields(kind):
        if field.type is int:
            message = f"config.model.{name + '.' if name else ''}{field.name} must be an integer"
            with pytest.raises(ValueError, match=message):
                kind(**{field.name: 2.5})
            assert kind(**{field.name: np.int64(field.default)}) == kind()


def test_nearest_divisor():
    assert [nearest_divisor(12, wanted) for wanted in (1, 5, 7, 100)] == [1, 4, 6, 12]


def test_every_form_of_a_config_builds_the_same_model():
    config = base.get_config().model
    assert isinstance(config, ml_collections.ConfigDict)
    models = [build_model(form) for form in (config, config.to_dict(), model_config(config))]
    assert models[0] == models[1] == models[2] and len({hash(model) for model in models}) == 1


def test_the_base_config_holds_the_defaults_of_every_field():
    assert model_config(base.get_config().model) == ModelConfig()


def test_derived_sizes():
    config = model_config({"d_model": 96, "n_heads": 4})
    assert (config.d_key, config.d_value, config.n_kv_heads, config.d_ff) == (24, 24, 4, 256)
    config = model_config(
        {"d_model": 100, "n_heads": 4, "d_key": 6, "mlp": "gelu", "n_kv_heads": 1}
    )
    assert (config.d_key, config.d_value, config.n_kv_heads, config.d_ff) == (6, 6, 1, 416)
    assert config.embed_scale == 1.0
    fields = {"d_model": 64, "tie_embeddings": False}
    assert model_config(fields).embed_scale == 8.0
    assert model_config(fields | {"embed_scale": 2.0}).embed_scale == 2.0


def n_params(c, heads_of_layers):
    """The closed form: embedding, last norm and, a layer, mixer + MLP + two norms."""
    embedding = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    norm = c.d_model * (2 if c.norm == "layer" else 1)
    mlp = c.d_model * c.d_ff * (3 if c.mlp == "swiglu" else 2)
    mlp += c.d_model * (c.d_model + 2) * (c.mlp == "rwkv")
    total = embedding + norm
    for kind in heads_of_layers:
        if kind == "decay":
            kv = c.n_kv_heads * (c.d_key + c.d_value)
            mixer = c.d_model * (c.n_heads * (c.d_key + 2 * c.d_value) + kv) + c.d_value
            mixer += c.of("decay").conv_len * c.d_model
            mixer += (c.d_model + 1) * c.n_heads * (c.of("decay").kind == "gated")
        elif kind == "vq":
            kv = c.n_kv_heads * (c.d_key + c.d_value)
            gate = c.n_heads * c.d_value * (c.of("vq").gate == "silu")
            mixer = c.d_model * (c.n_heads * (c.d_key + c.d_value) + kv + gate)
            mixer += c.d_key * (c.d_model * c.n_kv_heads + 2 * c.n_heads)  # positions
            mixer += (
                c.n_kv_heads * c.of("vq").codebook_size * (c.d_key + 1)
            )  # codebook, not trained
        elif kind == "rwkv":
            mixer = rwkv_params(c)
        elif kind == "mamba":
            mixer = mamba_params(c)
        else:
            query_and_out = c.n_heads * (c.d_key + c.d_value)
            mixer = c.d_model * (query_and_out + c.n_kv_heads * (c.d_key + c.d_value))
            if kind in ("softmax", "sliding"):
                own = c.of(kind)
                mixer += c.n_heads * 32 * (own.position == "relative") + 2 * c.d_key * own.qk_norm
        total += mixer + norm + (mlp + norm) * (c.mlp != "none")
    if c.name == "inattention":  # a gain, buckets of distance; the sinusoids' gain
        total += 1 + c.n_layers * (c.d_model + c.n_heads * 2 * c.inattention.n_exact)
    if c.name == "stagformer":  # a first slot and a norm a border, a cross-attention a layer above
        kv = c.n_kv_heads * (c.d_key + c.d_value)
        cross = norm + c.d_model * (c.n_heads * (c.d_key + c.d_value) + kv)
        n_borders = c.stagformer.n_stacks - 1
        total += n_borders * (norm + c.d_model)
        total += n_borders * cross * c.n_layers // c.stagformer.n_stacks
    return total


def rwkv_params(c):
    if c.of("rwkv").version == 4:  # four matrices; three shares, decay and bonus
        return 4 * c.d_model**2 + 5 * c.d_model
    keys, values = c.n_heads * c.d_key, c.n_heads * c.d_value
    shift = (6 + 10 * c.of("rwkv").shift_rank) * c.d_model
    decay = keys + c.of("rwkv").decay_rank * (c.d_model + keys)
    return c.d_model * (2 * keys + 3 * values) + shift + decay + keys + 2 * values


def mamba_params(c):
    mamba, inner = c.of("mamba"), c.of("mamba").expand * c.d_model
    if mamba.version == 1:
        wide, gate_and_out = inner, 2 * c.d_model * inner
        steps = inner * (2 * mamba.step_rank + 2 * mamba.d_state + 1)
        rest = steps + inner * (mamba.d_state + 1)
    else:
        heads = inner // mamba.head_len
        wide, gate_and_out = inner + 2 * mamba.n_groups * mamba.d_state, 2 * c.d_model * inner
        rest = (c.d_model + 3) * heads + inner
    return gate_and_out + wide * (c.d_model + mamba.conv_len + 1) + rest


def test_parameter_count(model_name, model_fields):
    """Of the recorded trees, which models have: test_recorded.py."""
    config = build_model(model_fields(model_name)).config
    repeats = config.n_layers // len(config.pattern)
    shapes = json.loads(FILE.read_text())[model_name]["tree"].values()
    assert sum(map(math.prod, shapes)) == n_params(config, config.pattern * repeats)


def test_each_layer_knows_its_place_in_a_pattern():
    model = build_model({"n_layers": 6, "pattern": ("decay", "decay", "sliding")})
    places = layer_places(model.config)
    assert np.array_equal(places, [[0, 3], [1, 4], [2, 5]])


def test_layers_start_differently():
    model = build_model({"n_layers": 2, "d_model": 8, "n_heads": 1, "vocab_size": 5, "d_ff": 8})
    kernels = model.init(jax.random.key(0))["params"]["stack"]["0_softmax"]["mlp"]["up"]["kernel"]
    assert kernels.shape == (2, 8, 8) and not np.allclose(kernels[0], kernels[1])


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0)], ids=str)
def test_a_cache_of_nothing(sizes):
    with pytest.raises(ValueError, match=f"got batch_size={sizes[0]}, max_len={sizes[1]}; pass"):
        build_model({}).init_cache(*sizes)


def test_dropout_needs_a_key():
    model = build_model({"dropout": 0.1})
    with pytest.raises(ValueError, match=r"needs a key: got rngs=None .*dropout=0.1; pass rngs="):
        model.apply({"params": {}}, TOKENS, train=True)


# --- rematerialisation, compilation ----------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "dots", "full"])
def test_remat_reaches_the_program(policy, model_fields):
    model = build_model(model_fields("decay", remat=policy))
    variables = random_variables(lambda: model.init(jax.random.key(0)))
    program = jax.make_jaxpr(lambda v: model.apply(v, TOKENS).logits)(variables)
    assert ("remat" in str(program)) == (policy != "none")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dots", "full"])
def test_remat_changes_no_gradient(policy, model_fields):
    def gradient(remat):
        model = build_model(model_fields("decay", remat=remat))
        variables = random_variables(lambda: model.init(jax.random.key(0)))

        def loss(params):
            return jnp.sum(jnp.sin(model.apply({**variables, "params": params}, TOKENS).logits))

        program = jax.jit(jax.grad(loss))
        return program(variables["params"])

    assert_trees_close(gradient(policy), gradient("none"), rel_rms=2e-6)


def test_no_compilation_after_the_first_step(model_fields):
    fields = model_fields("mha")
    model = build_model(fields)
    variables = random_variables(lambda: model.init(jax.random.key(0)))
    step = jax.jit(lambda model, v, t, c: model.apply(v, t, c), static_argnums=0)
    cache = model.init_cache(2, 4)
    for t in range(TOKENS.shape[1]):  # also past the capacity of the cache
        model = build_model(fields)  # equal configs share what is compiled
        cache = step(model, variables, TOKENS[:, t : t + 1], cache).cache
    assert step._cache_size() == 1
