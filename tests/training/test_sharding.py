"""Where a run lies on devices that need not exist: sizes of the mesh, rules, bytes, plans."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from longctx_jax.models import build_model
from longctx_jax.training.mesh import Topology, choose_topology
from longctx_jax.training.placement import ONE_DEVICE
from longctx_jax.training.plan import make_plan
from longctx_jax.training.sharding import Layout, choose_layout

MODELS = ("transformer", "transformer_vq", "decay", "recurrent_memory", "stagformer", "inattention")


def make_config(**fields):
    config = base.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def plan_of(config, n_devices, **options):
    return make_plan(config, build_model(config.model), n_devices, **options)


@pytest.mark.parametrize(
    ("n_devices", "fields", "expected"),
    [
        (1, {}, Topology()),
        (8, {}, Topology(data=8)),
        (64, {}, Topology(data=16, model=4)),  # 16 rows and 4 heads
        (64, {"data__global_batch_size": 128}, Topology(data=64)),
        (8, {"mesh__model": 2}, Topology(data=4, model=2)),
        (8, {"mesh__data": 2}, Topology(data=2, model=4)),
        (8, {"mesh__sequence": 4}, Topology(data=2, sequence=4)),
        (8, {"train__n_microbatches": 4}, Topology(data=4, model=2)),
    ],
    ids=str,
)
def test_sizes_that_are_0_are_chosen(n_devices, fields, expected):
    assert choose_topology(make_config(**fields), n_devices) == expected


@pytest.mark.parametrize(
    ("n_devices", "fields", "match"),
    [
        (8, {"mesh__model": 3}, "model=3.* for 8 devices"),
        (8, {"mesh__data": 2, "mesh__model": 2}, "use all devices"),
        (8, {"mesh__data": -1}, r"config\.mesh\.data must not be negative: got -1"),
        (24, {"mesh__data": 3}, "divide the rows of a micro-batch: got 3 and 16"),
        (64, {"data__global_batch_size": 4}, r"divide config\.model\.n_heads: got 16 and 4"),
        (3, {"mesh__sequence": 3}, r"divide config\.data\.seq_len: got 3 and 256"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_named(n_devices, fields, match):
    with pytest.raises(ValueError, match=match):
        choose_topology(make_config(**fields), n_devices)


@pytest.mark.parametrize("name", MODELS)
def test_fsdp_leaves_an_eighth_on_each_of_eight_devices(name):
    plan = plan_of(make_config(model__name=name, mesh__fsdp="on"), 8)
    for field in ("params", "opt_state"):
        assert plan.device_bytes[field] <= 1.05 * plan.total_bytes[field] / 8
    assert plan.rows == 2


def test_rules_come_in_order_and_axes_that_do_not_divide_are_left_out():
    config = make_config(mesh__fsdp="on", mesh__data=2, model__d_ff=992)
    params = plan_of(config, 8).layout.specs(plan_of(config, 8).shapes).params
    block = params["stack"]["0_softmax"]
    assert block["mixer"]["query"]["kernel"] == P(None, "data", "model")
    assert block["mixer"]["out"]["kernel"] == P(None, "model", "data")
    assert block["mixer_norm"]["scale"] == P(None, None)
    assert params["embed"]["table"] == P("model", "data")
    config.mesh.rules = ("mixer/query/kernel$=-,data",)
    plan = plan_of(config, 8)
    block = plan.layout.specs(plan.shapes).params["stack"]["0_softmax"]
    assert block["mixer"]["query"]["kernel"] == P(None, None, "data")
    odd = make_config(mesh__fsdp="on", model__d_ff=1001)
    plan = plan_of(odd, 8)
    mlp = plan.layout.specs(plan.shapes).params["stack"]["0_softmax"]["mlp"]
    assert mlp["up"]["kernel"] == P(None, "data", None)


def test_no_axis_is_spread_over_devices_that_do_not_divide_it():
    config = make_config(mesh__fsdp="on", mesh__data=2, model__d_ff=990, model__vocab_size=259)
    plan = plan_of(config, 8)  # two by four; 990 and 259 are no multiples of four
    params = plan.layout.specs(plan.shapes).params
    assert params["stack"]["0_softmax"]["mlp"]["gate"]["kernel"] == P(None, "data", None)
    assert params["embed"]["table"] == P(None, "data")
    sizes = {"data": 2, "model": 4, None: 1}
    for leaf, spec in zip(
        jax.tree.leaves(plan.shapes.params),
        jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, P)),
        strict=True,
    ):
        axes = [*spec, *[None] * (leaf.ndim - len(spec))]
        assert all(n % sizes[axis] == 0 for n, axis in zip(leaf.shape, axes, strict=True))


def test_moments_lie_with_their_parameters():
    plan = plan_of(make_config(mesh__fsdp="on"), 8)
    specs = plan.layout.specs(plan.shapes)
    is_spec = {"is_leaf": lambda x: isinstance(x, P)}
    wanted = jax.tree.leaves(specs.params, **is_spec)
    found = jax.tree.leaves(specs.opt_state, **is_spec)
    shapes = [leaf.shape for leaf in jax.tree.leaves(plan.shapes.opt_state)]
    assert [s for s, shape in zip(found, shapes, strict=True) if shape] == wanted * 2


def test_fsdp_by_itself_where_a_state_is_large():
    config = make_config()
    plan = plan_of(config, 8)
    assert not plan.layout.use_fsdp
    total = sum(plan.total_bytes.values())
    assert plan_of(config, 8, memory_bytes=2 * total).layout.use_fsdp
    assert not plan_of(config, 1, memory_bytes=2 * total).layout.use_fsdp
    for field, value in (("fsdp", "some"), ("rules", ("(=data",)), ("rules", ("x=rows",))):
        with pytest.raises(ValueError, match=rf"config\.mesh\.{field}"):
            bad = make_config(**{f"mesh__{field}": value})
            model = build_model(bad.model).config
            choose_layout(bad, model, Topology(data=8), plan.shapes, 0)


def test_layers_lie_on_their_axis():
    config = make_config(model__schedule="diagonal", mesh__layer=2)
    plan = plan_of(config, 8)
    specs = plan.layout.specs(plan.shapes).params["stack"]["0_softmax"]
    assert {spec[0] for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))} == {
        "layer"
    }
    with pytest.raises(ValueError, match="diagonal"):
        plan_of(make_config(mesh__layer=2), 8)


def test_a_plan_says_what_it_is():
    plan = plan_of(make_config(mesh__fsdp="on"), 64)
    assert plan.line().startswith("devices=64 mesh: data=16 model=4; state spread over data (FSDP)")
    assert "embed/table" in plan.table()
    with pytest.raises(ValueError, match="at least one device: got 0"):
        plan_of(make_config(), 0)


def test_one_device_is_left_alone():
    batch = {"tokens": [1]}
    assert ONE_DEVICE.put_batch(batch) is batch
    assert ONE_DEVICE.local_rows(5) == (0, 5)
    assert ONE_DEVICE.layout(None, None, None) is None
    assert dataclasses.replace(ONE_DEVICE).vote(True) is None
    assert Layout(Topology(), use_fsdp=False).specs({"params": {"w": jax.numpy.ones((4, 4))}}) == {
        "params": {"w": P(None, None)}
    }
