"""Memory by formula against the arrays that models make and the programs that XLA plans."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import accounting_1b, base
from longctx_jax.accounting import caches, programs, report, search
from longctx_jax.figures.accounting import draw_accounting
from longctx_jax.models import build_model
from longctx_jax.units import bytes_text
from tests.accounting.closed_forms import closed_form
from tests.models.tiny_models import MODELS, TINY

MEMORY = {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4}
ROWS = {"cross_cache": "memory", "cross_position": "none"}
STAGGERED = {
    "kv": {},
    "window": {"cross_window": 3},
    "linear_map": {"cross_window": 1},
    "rows": ROWS,
    "rows_window": ROWS | {"cross_window": 4},
    "three": {"n_stacks": 3},
    "added": {"handoff": "add", "share_weights": True},
    "in_turns": {"share_weights": True, "decode": "sequential"},
    "recurrent": {"share_weights": True, "recurrent": True},
    "control": {"stagger": False},
    "over_devices": {"stack_axis": "stack"},
    "rows_over_devices": ROWS | {"stack_axis": "stack"},
}
CASES = dict(MODELS)
for kind in ("armt", "layerwise", "rmt"):
    for mixer in ("softmax", "sliding", "vq", "mamba", "rwkv"):
        sizes = {"d_model": 32, "n_heads": 4, "memory": MEMORY | {"kind": kind, "mixer": mixer}}
        CASES[f"{kind}_{mixer}"] = {"name": "recurrent_memory", **sizes}
CASES["armt_among_others"] = {"pattern": ("armt", "softmax"), "memory": MEMORY | {"n_heads": 2}}
for variant, stag in STAGGERED.items():
    sizes = {"n_layers": 2 * stag.get("n_stacks", 2), "n_kv_heads": 1}
    CASES[f"stagformer_{variant}"] = {"name": "stagformer", **sizes, "stagformer": stag}
PREFILL_TOLERANCES = {"vq": 0.35, "rmt": 0.35, "stagformer": 0.35}
NEAR = {"memory_position": "none", "score_position": "near"}
INITIAL = {
    "kv": {"cache": "kv"},
    "shared_decoupled": {"cache": "kv", "share_projections": True, "score_position": "decoupled"},
    "embedding": {"cache": "embedding", "score_position": "decoupled", "d_rotary": 4},
    "narrow": {"cache": "embedding", "d_memory": 6},
    "ids": {"cache": "ids"},
    "counts": NEAR | {"cache": "counts"},
    "counts_alibi": {"memory_position": "none", "score_position": "alibi", "cache": "counts"},
}
for variant, options in INITIAL.items():
    sizes = {"name": "inattention", "n_kv_heads": 1}
    CASES[f"inattention_{variant}"] = sizes | {"inattention": {"n_exact": 3} | options}
# Small models, at whose sizes no constant of the formulas was chosen.
SMALL = {"n_layers": 4, "d_model": 128, "n_heads": 4, "vocab_size": 512}
PLANNED = {
    "transformer": {},
    "gqa": {"n_kv_heads": 1},
    "sliding": {"pattern": ("sliding",)},
    "decay": {"name": "decay"},
    "rwkv": {"pattern": ("rwkv",), "mlp": "rwkv"},
    "mamba": {"pattern": ("mamba",)},
    "vq": {"name": "transformer_vq"},
    "armt": {"name": "recurrent_memory", "memory": {"segment_len": 128}},
    "rmt": {"name": "recurrent_memory", "memory": {"segment_len": 128, "kind": "rmt"}},
    "stagformer": {"name": "stagformer"},
    "stagformer_in_turns": {"name": "stagformer", "stagformer": {"decode": "sequential"}},
    "inattention": {"name": "inattention", "inattention": {"cache": "embedding"}},
    "inattention_kv": {"name": "inattention", "inattention": {"cache": "kv"}},
    "inattention_ids": {"name": "inattention", "inattention": {"cache": "ids"}},
    "inattention_counts": {"name": "inattention", "inattention": NEAR | {"cache": "counts"}},
}


def slow_but(quick, names):
    """Returns the parameters, all but the quick ones for the slow tests."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


QUICK = (*MODELS, "armt_softmax", "rmt_sliding", "stagformer_rows_window", "inattention_counts")


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_caches_have_the_bytes_of_the_closed_form(name):
    for dtype in ("float32", "bfloat16"):
        model = build_model({**TINY, **CASES[name], "dtype": dtype})
        for batch_size, max_len in ((1, 1), (3, 7), (1, 50)):
            found = caches.cache_bytes(model, batch_size, max_len)
            assert found == closed_form(model.config, batch_size, max_len), (dtype, max_len)


@pytest.mark.parametrize("name", slow_but(("gqa", "armt"), accounting_1b.SCHEMES))
def test_caches_have_the_bytes_of_the_closed_form_at_1b(name):
    model = build_model(accounting_1b.get_config(name).model)
    for max_len in (4096, 1_048_576):
        assert caches.cache_bytes(model, 1, max_len) == closed_form(model.config, 1, max_len)


def test_known_sizes_of_the_1b_shape():
    """The published formulas, in MiB, of what is not bookkeeping; T = 4,096 and 131,072."""
    known = {  # 4 L d T; over 4 heads; one head; 4 L d W; 4 L H e e; 4 L 384 (d + 1)
        ("mha", 4096, ("key", "value")): 512,
        ("mha", 131_072, ("key", "value")): 16_384,
        ("gqa", 4096, ("key", "value")): 128,
        ("mqa", 131_072, ("key", "value")): 512,
        ("sliding", 131_072, ("key", "value")): 512,
        ("decay", 131_072, ("state",)): 8,
        ("decay_wide", 131_072, ("state",)): 16,
        ("armt", 131_072, ("memory.state.matrix", "memory.state.normalizer")): 16
        * 4
        * 384
        * 2049
        / 2**20,
        ("vq", 131_072, ("key", "value")): 64,  # 4 L d W of a ring of one block
        ("inattention", 131_072, ("rows",)): 512,  # 2 d T, whatever L
        ("inattention_narrow", 131_072, ("rows",)): 128,
        ("inattention_ids", 131_072, ("ids",)): 0.25,  # two bytes an id of 32,000
        ("inattention_counts", 2**20, ("counts",)): 32_000 * 4 / 2**20,
    }
    for (name, context_len, parts), expected in known.items():
        model = build_model(accounting_1b.get_config(name).model)
        terms = caches.cache_terms(model, 1, context_len)
        assert sum(terms[part] for part in parts) == expected * 2**20, (name, terms)


def test_terms_are_named_and_nothing_is_left_out():
    model = build_model({**TINY, **MODELS["mha"]})
    terms = caches.cache_terms(model, 2, 9)
    # 2 layers, 2 rows, 9 slots, heads of 2 x 8 float32
    expected = {"key": 9 * 16 * 4, "value": 9 * 16 * 4, "slot_positions": 9 * 4}
    expected |= {"slot_documents": 9 * 4, "position": 4}
    expected = {part: 4 * n for part, n in expected.items()}
    assert terms == expected | {"last_segment_id": 8, "document": 8}


def test_parameters_are_those_of_init():
    model = build_model({**TINY, "n_layers": 1})
    n = sum(leaf.nbytes for leaf in jax.tree.leaves(model.init(jax.random.key(0))))
    assert programs.parameter_bytes(model) == n
    assert programs.parameter_bytes(model, "bfloat16") == n // 2
    assert programs.parameter_count(model) == n // 4


def test_codebooks_count_and_keep_their_dtype():
    model = build_model({**TINY, **MODELS["vq"]})
    shapes = programs.variable_shapes(model, "bfloat16")
    state = caches.tree_bytes(shapes["model_state"])
    n = programs.parameter_count(model)
    assert state >= 2 * 7 * 8 * 4  # 2 layers, one head, 7 codes of 8
    assert programs.parameter_bytes(model, "bfloat16") == 2 * n + state
    assert programs.parameter_bytes(model) == 4 * n + state


def assert_plan_matches(name, program, *, max_len, batch_size=1, piece_len=256):
    model = build_model({**SMALL, **PLANNED[name]})
    sizes = {"batch_size": batch_size, "max_len": max_len, "piece_len": piece_len}
    found, terms = programs.predicted(model, program, **sizes)
    true = programs.measured(model, program, **sizes)
    assert found["arguments"] == true["arguments"]
    assert found["aliased"] == true["aliased"]
    # A CPU counts a pointer of 8 bytes for each array it returns.
    n_arrays = 1 + len(jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(1, max_len))))
    assert 0 <= true["outputs"] - found["outputs"] <= 8 * n_arrays
    assert found["temporaries"] == sum(terms.values())
    tolerance = PREFILL_TOLERANCES.get(name, 0.25) if program == "prefill" else 0.25
    assert found["temporaries"] == pytest.approx(true["temporaries"], rel=tolerance)
    assert found["peak"] == pytest.approx(true["peak"], rel=tolerance)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("transformer", "prefill"),
        ("transformer", "loop"),
        ("decay", "step"),
        pytest.param("armt", "prefill", marks=pytest.mark.slow),
    ],
)
def test_programs_are_planned_as_predicted(name, program):
    assert_plan_matches(name, program, max_len=2048)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_every_program_is_planned_as_predicted(name, program):
    for max_len, batch_size, piece_len in ((1024, 3, 256), (32_768, 1, 512)):
        assert_plan_matches(
            name, program, max_len=max_len, batch_size=batch_size, piece_len=piece_len
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "decay", "vq", "mamba", "armt", "stagformer"])
@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_an_update_is_planned_as_predicted(name, remat):
    """Six real configs are off by at most 0.07 (docs/accounting.md); these are smaller."""
    config = base.get_config()
    model = build_model({**SMALL, **PLANNED[name], "remat": remat})
    found, _, true = programs.train_plans(config, model, batch_size=4, seq_len=256)
    assert true is not None
    assert found["arguments"] == true["arguments"] and found["aliased"] == true["aliased"]
    assert 0 <= true["outputs"] - found["outputs"] < 4096  # pointers, as above
    assert found["temporaries"] == pytest.approx(true["temporaries"], rel=0.35)


def test_remat_keeps_less():
    kept = {
        remat: programs.kept_bytes(build_model({**TINY, "remat": remat}), 2, 16)
        for remat in ("none", "dots", "full")
    }
    assert kept["full"] < kept["dots"] < kept["none"]
    # The inputs of 2 layers and what stands around them; none of the scores, 2 heads of 16 x 16.
    assert kept["full"] < 2 * 16 * 16 * 4 * 8


def test_an_unknown_program_is_named():
    with pytest.raises(ValueError, match="one of .*got 'decode'"):
        programs.predicted(build_model(TINY), "decode", batch_size=1, max_len=4)


class FakeDevice:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_a_device_that_counts_is_asked_around_a_run(monkeypatch):
    shapes = (jax.ShapeDtypeStruct((3,), "float32"),)
    calls = []
    function = lambda x: calls.append(np.asarray(x)) or x  # noqa: E731
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(None)])
    assert programs.device_plan(function, shapes) == {} and not calls
    stats = {"bytes_in_use": 5, "peak_bytes_in_use": 9}
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(stats)])
    found = programs.device_plan(function, shapes)
    assert found == {"device_bytes_before": 5, "device_peak_bytes": 9}
    assert calls[0].shape == (3,)


@pytest.mark.parametrize("guess", [1, 2, 36, 37, 38, 500])
def test_largest_finds_the_border_from_any_guess(guess):
    for border in (0, 1, 2, 36, 37):
        assert search.largest(lambda n, border=border: n <= border, guess) == border


def test_largest_context_by_hand():
    model = build_model(TINY)
    a_token = 2 * (2 * 16 * 4 + 8)  # 2 layers: key and value of 16 float32, and 8 of a slot
    fixed = 2 * 4 + 8

    def held(n):
        return caches.cache_bytes(model, 1, n)

    assert held(10) == 10 * a_token + fixed
    assert search.largest_context(held, 10 * a_token + fixed) == 10
    assert search.largest_context(held, 11 * a_token + fixed - 1) == 10
    assert search.largest_context(held, 1) == 0
    assert search.largest_context(lambda n: 7, 7) == search.MAX_CONTEXT


@pytest.mark.parametrize("name", slow_but(("mha",), ["mha", "mixed", "rwkv6", "stagformer"]))
def test_largest_models_fit_and_larger_ones_do_not(name):
    config = build_model({**TINY, **MODELS[name]}).config
    sizes = {"batch_size": 2, "weight_dtype": ""}

    def held(**changes):
        model = build_model(dataclasses.replace(config, **changes))
        return search.held_bytes(model, 64, **sizes)

    unit = 3 if name == "mixed" else 2 if name == "stagformer" else 1
    budget = held(n_layers=6 * unit) + 8
    fits = search.largest_models(config, budget, context_len=64, **sizes)
    deep, wide = fits["deep"], fits["wide"]
    assert deep.n_layers == 6 * unit and deep.held_bytes == budget - 8
    assert wide.n_layers == config.n_layers and wide.held_bytes <= budget
    step = search.width_step(config)
    n = wide.d_model * step // config.d_model
    wider = build_model(search.scaled_width(config, n + 1, step))
    assert search.held_bytes(wider, 64, **sizes) > budget
    assert wider.config.d_key * config.d_model == config.d_key * wider.config.d_model
    none = search.largest_models(config, 10, context_len=64, **sizes)
    assert none["deep"].n_layers == none["wide"].d_model == 0


def test_widths_grow_in_steps_that_the_config_allows():
    config = build_model(accounting_1b.get_config("mamba2").model).config
    config = dataclasses.replace(config, d_ff=8224)
    step = search.width_step(config)
    wider = search.scaled_width(config, step + 1, step)
    assert wider.d_model == 2048 + 64 and wider.d_key == 66
    assert wider.d_ff == 8512  # 8481, rounded up


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2**20, "1 MiB"), (128 * 2**30, "128 GiB")]
    + [(2.02 * 2**30, "2.02 GiB"), (24.5 * 2**10, "24.5 KiB"), (2**70, "1048576 PiB")],
)
def test_bytes_as_text(n, text):
    assert bytes_text(n) == text


def test_a_report_of_two_models():
    models = {name: build_model({**TINY, **MODELS[name]}) for name in ("mha", "decay")}
    setting = report.Setting(batch_size=2, piece_len=8)
    rows = list(report.program_rows(models, (16, 64), setting, is_measured=False))
    rows += report.context_rows(models, 10**6, setting)
    rows += report.model_rows(models, "mha", (64,), setting)
    assert len(rows) == 2 * 2 * 3 + 2 + 2
    by_name = {row["name"]: row for row in rows if row["part"] == "contexts"}
    assert by_name["decay"]["largest_context_state"] == search.MAX_CONTEXT
    assert 0 < by_name["mha"]["largest_context_peak"] < by_name["mha"]["largest_context_state"]
    equal = {row["name"]: row for row in rows if row["part"] == "models"}
    assert equal["mha"]["deep"]["n_layers"] == equal["mha"]["n_layers"]
    assert equal["decay"]["deep"]["n_layers"] > 2
    text = report.format_report(rows)
    for part in ("cache by context", "peak by formula", "any", "largest model in the memory of"):
        assert part in text
    axes = draw_accounting(rows).axes
    assert [len(axis.lines) for axis in axes] == [2, 3]  # and the budget
    with pytest.raises(ValueError, match="--baseline must be one of .*got 'gqa'"):
        list(report.model_rows(models, "gqa", (64,), setting))
    with pytest.raises(ValueError, match="needs rows of programs"):
        draw_accounting([])
