"""The cost model, the recorded table, and what "auto" makes of them."""

import json

import pytest

from longctx_jax.ops.decay import cost, select, table
from longctx_jax.ops.decay.facts import Facts

FACTS = {"platform": "gpu", "device": "NVIDIA H200", "dtype": "bfloat16", "batch": 1}
FACTS |= {"seq": 4096, "heads": 16, "d_key": 64, "d_value": 64}
NAMES = [implementation.name for implementation in select.IMPLEMENTATIONS]


def make_facts(**changes):
    return Facts(**(FACTS | changes))


def make_row(forward, training, **changes):
    shape = {name: FACTS[name] for name in ("dtype", "batch", "seq", "heads", "d_key", "d_value")}
    row = shape | {"is_per_token": False} | changes
    return row | {"forward_ms": forward, "training_ms": training}


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Returns a function that records rows for the H200, in a folder of its own."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)

    def record(*rows):
        table.write_table("NVIDIA H200", list(rows), {"date": "today"})

    yield record
    monkeypatch.undo()
    table.load_table.cache_clear()


def test_flops_and_bytes_of_the_kernel_are_the_papers():
    facts = make_facts(batch=8, heads=32)
    n = facts.batch * facts.heads * facts.seq
    counted = cost.cost("pallas_triton", facts)
    assert counted.matrix_flops == 32_768 * n  # 4 C D + 4 D^2 at C = D = 64
    states = 8 * facts.batch * facts.heads * 64 * 64
    assert counted.bytes == 512 * n + states  # 8 D
    # Few rows are cut into segments, which read key and value again: 12 D.
    assert cost.cost("pallas_triton", make_facts()).bytes > 12 * 64 * 16 * 4096


@pytest.mark.parametrize("name", NAMES)
def test_every_form_has_a_cost_that_grows_with_the_sequence(name):
    short, long = (cost.seconds(name, make_facts(seq=n)) for n in (4096, 65_536))
    assert 0 < short < long


def test_training_costs_more_than_a_forward_pass():
    forward = make_facts(for_training=False)
    assert cost.seconds("chunked", make_facts()) > 2 * cost.seconds("chunked", forward)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("seq", [512, 8192, 131_072])
def test_on_a_gpu_the_model_prefers_a_kernel(seq, batch):
    assert select.explain_facts(make_facts(seq=seq, batch=batch)).chosen in select.KERNELS


def test_what_was_measured_decides(recorded):
    slow = dict.fromkeys(NAMES, 9.0)
    forward, training = {"two_pass": 1.0, "chunked": 2.0}, {"two_pass": 5.0, "chunked": 4.0}
    recorded(make_row(slow | forward, slow | training))
    forward = select.explain_facts(make_facts(for_training=False))
    assert forward.chosen == "two_pass" and forward.candidates[0].ms == 1.0
    assert "measured at batch=1 heads=16 seq=4096" in str(forward)
    assert select.explain_facts(make_facts()).chosen == "chunked"


def test_the_nearest_shape_decides_and_far_ones_do_not(recorded):
    rest = dict.fromkeys(NAMES, 9.0)
    recorded(
        make_row({}, rest | {"two_pass": 1.0}, seq=4096),
        make_row({}, rest | {"chunked": 1.0}, seq=16_384),
        make_row({}, rest | {"block": 1.0}, seq=4096, dtype="float32"),
        make_row({}, rest | {"prefix": 1.0}, seq=4096, is_per_token=True),
    )
    chosen = {
        (seq, dtype, per_token): select.explain_facts(
            make_facts(seq=seq, dtype=dtype, is_per_token=per_token)
        ).chosen
        for seq, dtype, per_token in (
            (5000, "bfloat16", False),
            (20_000, "bfloat16", False),
            (4096, "float32", False),
            (4096, "bfloat16", True),
        )
    }
    assert list(chosen.values()) == ["two_pass", "chunked", "block", "prefix"]
    assert select.explain_facts(make_facts(seq=4096 * 64)).chosen in select.KERNELS  # modelled


def test_a_measured_form_that_cannot_run_here_is_passed_over(recorded):
    times = dict.fromkeys(NAMES, 9.0) | {"pallas_triton": 1.0, "two_pass": 2.0}
    recorded(make_row({}, times, d_key=512))
    explanation = select.explain_facts(make_facts(d_key=512))
    assert explanation.chosen == "two_pass"
    assert "do not fit the registers: 512" in str(explanation)


def test_a_form_that_no_row_has_is_modelled_on_the_clock_of_the_row(recorded):
    """A kernel that the recording jax did not have is not shut out by slow measurements."""
    recorded(make_row({}, {"recurrent": 4000.0}))
    explanation = select.explain_facts(make_facts())
    assert explanation.chosen in select.KERNELS
    times = {c.name: c.ms for c in explanation.candidates}
    modelled = {n: cost.seconds(n, make_facts()) for n in ("recurrent", "pallas_triton")}
    assert times["pallas_triton"] / times["recurrent"] == pytest.approx(
        modelled["pallas_triton"] / modelled["recurrent"]
    )


def test_a_form_left_out_of_one_row_is_not_taken_there(recorded):
    fast = {"pallas_triton": 1.0, "pallas_mosaic_gpu": 1.0}
    slow = dict.fromkeys(NAMES, 50.0)
    recorded(make_row({}, slow | fast, seq=512), make_row({}, {"fleet": 2.0}, seq=65_536))
    explanation = select.explain_facts(make_facts(seq=65_536))
    assert explanation.chosen == "fleet"
    assert "not among those measured" in str(explanation)


def test_times_grow_with_the_shape(recorded):
    recorded(make_row({}, dict.fromkeys(NAMES, 1.0)))

    def expected_ms(seq):
        candidates = select.explain_facts(make_facts(seq=seq)).candidates
        return next(c.ms for c in candidates if c.name == "two_pass")

    assert expected_ms(4096) == 1.0 and 1.5 < expected_ms(8192) < 2.5


def test_a_new_recording_counts_at_once(recorded):
    slow = dict.fromkeys(NAMES, 9.0)
    recorded(make_row({}, slow | {"recurrent": 1.0}))
    assert select.explain_facts(make_facts()).chosen == "recurrent"
    recorded(make_row({}, slow | {"two_pass": 1.0}))
    assert select.explain_facts(make_facts()).chosen == "two_pass"


def test_table_file_is_readable(recorded, tmp_path):
    recorded(make_row({"two_pass": 1.0}, {}))
    written = json.loads((tmp_path / "nvidia_h200.json").read_text())
    assert written["device"] == "NVIDIA H200" and len(written["rows"]) == 1


def test_every_committed_table_is_within_ten_percent_of_its_best():
    for path in table.FOLDER.glob("*.json"):
        recorded = json.loads(path.read_text())
        platform = "cpu" if recorded["device"] == "cpu" else "gpu"
        for row in recorded["rows"]:
            shape = {n: row[n] for n in ("dtype", "batch", "seq", "heads", "d_key", "d_value")}
            for for_training, times in ((False, row["forward_ms"]), (True, row["training_ms"])):
                facts = Facts(
                    platform,
                    recorded["device"],
                    **shape,
                    is_per_token=row["is_per_token"],
                    for_training=for_training,
                )
                if times:
                    chosen = select.explain_facts(facts).chosen
                    assert times[chosen] <= 1.1 * min(times.values()), (path.name, facts)
