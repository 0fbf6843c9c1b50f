"""Parts of the suite `vq` about one layer of vector-quantised attention.

"layer" (by length, every form and exact attention), "slope" (how the time of the linear form
grows), "codes", "blocks", "reductions" (one length), "search" (nearest codes). What a run of a
layer is: `cases.py`; the published implementation: `peers.py`. A form that is not run has a row
that says why. Not here: "model" and "decode" (`models.py`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.benchmarking import roofline, timing
from longctx_jax.benchmarking.ratios import quartiles, speed_ratio
from longctx_jax.benchmarking.rows import Fields, Row, make
from longctx_jax.benchmarking.timing import Case, Limits, Measured
from longctx_jax.benchmarking.vq import cases as vq_cases
from longctx_jax.benchmarking.vq import peers as vq_peers
from longctx_jax.benchmarking.vq.cases import PASSES, SOFTMAX, Shape
from longctx_jax.ops.attention import attention
from longctx_jax.ops.vq import nearest_code
from longctx_jax.ops.vq.select import SEARCHES

FORMS = ("linear", "quadratic", "pallas_triton", "auto", "softmax cudnn", "softmax blockwise")
VARIANTS = {  # part -> field, its values, the one that the others are compared with
    "codes": ("n_codes", (128, 256, 512, 1024), 512),
    "blocks": ("block_len", (64, 128, 256, 512, 1024), 512),
    "reductions": ("reduction", ("serial", "matmul", "associative"), "serial"),
}
QUICK_VALUES = {"n_codes": (4, 8), "block_len": (8, 16)}
MAX_PREDICTED_S = {"cpu": 25.0}  # of one call
MAX_PREDICTED_S_ELSEWHERE = 4.0
SLOW_S = {"cpu": 1.5}  # forms above take turns of their own, with fewer runs
SLOW_S_ELSEWHERE = 0.2
SLOW_RUNS = 3
CPU_SECONDS = 60.0  # of rounds a group


@dataclasses.dataclass(frozen=True)
class Setting:
    """The sizes of the suite on one kind of device.

    Attributes:
        n_tokens: of all rows together at short lengths; longer ones have one row.
        seq: of the parts with one length.
    """

    platform: str
    base: Shape
    lengths: tuple[int, ...]
    slope_lengths: tuple[int, ...]
    seq: int
    n_tokens: int

    def shape(self, **fields: Any) -> Shape:
        """Returns the base with other fields, and rows to fill n_tokens."""
        shape = dataclasses.replace(self.base, **fields)
        return dataclasses.replace(shape, batch=max(1, self.n_tokens // shape.seq))


def setting(platform: str, limits: Limits) -> Setting:
    """Returns the sizes for a platform: tiny when quick."""
    base = Shape("shga", 1, 0, 768, 128, 512, 512, 512, "bfloat16")
    if limits.is_quick:
        base = Shape("shga", 1, 0, 32, 16, 8, 16, 16, "float32")
        found = Setting(platform, base, (48,), (48, 96), 48, 1)
    elif platform == "cpu":
        # Blocks are those that are chosen on a CPU; the published layers' are their window.
        base = dataclasses.replace(base, d_model=256, block_len=256, dtype="float32")
        lengths = (1024, 4096, 16_384)
        found = Setting(platform, base, lengths, (4096, 16_384, 65_536), 4096, 1)
    else:
        lengths = (2048, 8192, 32_768, 131_072)
        found = Setting(platform, base, lengths, lengths[1:], 8192, 16_384)
    if limits.lengths:
        given = {"lengths": limits.lengths, "slope_lengths": limits.lengths}
        found = dataclasses.replace(found, seq=limits.lengths[0], **given)
    return found


def layer_part(
    sizes: Setting, limits: Limits, heads: Sequence[str], checkouts: Sequence[vq_peers.Checkout]
) -> Iterator[Row]:
    """Yields a row a length, head type, pass and form, and ratios to the yardsticks."""
    for checkout in checkouts:
        if checkout.reason:
            for peer in checkout.peers():
                yield make({"name": peer.name}, {"skipped": checkout.reason})
    for seq in sizes.lengths:
        for head_type in heads:
            shape = sizes.shape(seq=seq, head_type=head_type)
            inputs = vq_cases.make_inputs(shape)
            for pass_name in PASSES:
                yield from _layer_rows(sizes, limits, inputs, pass_name, checkouts)


def _layer_rows(
    sizes: Setting,
    limits: Limits,
    inputs: vq_cases.Inputs,
    pass_name: str,
    checkouts: Sequence[vq_peers.Checkout],
) -> Iterator[Row]:
    shape, platform = inputs.shape, sizes.platform
    about = {"pass": pass_name, **shape.fields()}
    reasons = skip_reasons(shape, pass_name, platform, limits)
    cases: dict[str, Case] = {}
    forms: dict[str, str] = {}  # whose counts a case has
    extra: dict[str, Fields] = {}
    for name, reason in reasons.items():
        if not reason:
            cases[name], forms[name] = vq_cases.make_case(name, inputs, pass_name), name
    for checkout in checkouts:
        for peer in [] if checkout.reason else checkout.peers():
            form = "softmax blockwise" if peer.is_quadratic else "linear"
            reason = vq_peers.unsupported(peer, shape)
            reason = reason or too_slow(form, shape, pass_name, platform, limits)
            extra[peer.name] = checkout.fields()
            if not reason:
                try:
                    cases[peer.name] = vq_peers.make_case(checkout, peer, inputs, pass_name)
                    forms[peer.name] = form
                except vq_peers.PeerError as error:
                    reason = str(error)
            reasons[peer.name] = reason
    slow = [name for name, form in forms.items() if is_slow(form, shape, pass_name, limits)]
    yardsticks = [name for name in ("auto", "linear") if name in cases]
    groups = [[name for name in cases if name not in slow], slow and [*yardsticks, *slow]]
    rows: dict[str, Fields] = {}
    ratios: list[Row] = []
    for group, most in zip(groups, (limits.n_runs, SLOW_RUNS), strict=True):
        measured = measure({name: cases[name] for name in group}, limits, most)
        rows = {name: row for name, (row, _) in measured.items()} | rows
        ratios += ratio_rows(measured, yardsticks, about)
    for name, reason in reasons.items():
        row = {"skipped": reason} if reason else rows[name]
        counted = counts(forms.get(name, ""), shape, pass_name, row, limits)
        yield make({"name": name, **about}, {**extra.get(name, {}), **row, **counted})
    yield from ratios


def is_slow(form: str, shape: Shape, pass_name: str, limits: Limits) -> bool:
    """Whether a form takes turns of its own; the linear ones never do."""
    if limits.is_quick or form in vq_cases.LINEAR_FORMS:
        return False
    platform = jax.default_backend()
    seconds = vq_cases.predicted_seconds(form, shape, pass_name, platform)
    return seconds > SLOW_S.get(platform, SLOW_S_ELSEWHERE)


def skip_reasons(shape: Shape, pass_name: str, platform: str, limits: Limits) -> dict[str, str]:
    """Returns why each form is not run at a shape, "" where it is; off a GPU "auto" is "linear"."""
    reasons = {}
    for form in FORMS:
        if form == "auto" and platform == "cpu":
            continue
        reasons[form] = _unsupported(form, shape) or too_slow(
            form, shape, pass_name, platform, limits
        )
    if not reasons["softmax cudnn"]:
        reasons["softmax blockwise"] = "the suite runs it where cuDNN cannot"
    return reasons


def too_slow(form: str, shape: Shape, pass_name: str, platform: str, limits: Limits) -> str:
    """Returns why a form would take too long, "" if it would not; quick shapes have no bounds."""
    seconds = vq_cases.predicted_seconds(form, shape, pass_name, platform)
    most = MAX_PREDICTED_S.get(platform, MAX_PREDICTED_S_ELSEWHERE)
    if limits.is_quick or seconds <= most or form in vq_cases.LINEAR_FORMS:
        return ""
    return f"predicted to take {seconds:.3g} s a call, more than {most:g}"


def _unsupported(form: str, shape: Shape) -> str:
    """Returns why a form cannot run here, "" if it can; nothing is compiled."""
    if form.startswith(SOFTMAX):
        model = shape.model
        size = (shape.batch, shape.seq)
        query = jax.ShapeDtypeStruct((*size, model.n_heads, model.d_key), shape.dtype)
        key = jax.ShapeDtypeStruct((*size, model.n_kv_heads, model.d_key), shape.dtype)
        value = jax.ShapeDtypeStruct((*size, model.n_kv_heads, model.d_value), shape.dtype)
        options = {"implementation": form.removeprefix(SOFTMAX)}
        function, arguments = functools.partial(attention, **options), (query, key, value)
    else:
        layer = vq_cases.make_layer(form, shape)
        x = jax.ShapeDtypeStruct((shape.batch, shape.seq, shape.d_model), shape.dtype)
        function, arguments = layer.init, (jax.random.key(0), x)
    return timing.why_not(function, *arguments)


def measure(cases: Mapping[str, Case], limits: Limits, most_runs: int) -> Measured:
    """Returns the measurements of cases that take turns, within the suite's limits."""
    is_slow = min(limits.n_runs, most_runs) <= SLOW_RUNS
    warmup = 1 if jax.default_backend() == "cpu" else 2
    return limits.measure_able(
        cases,
        most_runs=most_runs,
        most_warmup=0 if is_slow else warmup,  # the run that follows compilation warms up
        cpu_seconds=CPU_SECONDS,
        may_fail=(vq_peers.PeerError,),
    )


def counts(form: str, shape: Shape, pass_name: str, row: Fields, limits: Limits) -> Fields:
    """Returns the ideal counts of a timed row and its time against them; {} for others."""
    if "median_ms" not in row:
        return {}
    device = jax.local_devices()[0].device_kind
    top = roofline.ceiling(device, shape.dtype, is_quick=limits.is_quick)
    n_bytes = vq_cases.ideal_bytes(shape, pass_name)
    n_flops = vq_cases.ideal_flops(form, shape, pass_name)
    n_tokens = shape.batch * shape.seq
    return roofline.floor_fields(n_bytes, n_flops, n_tokens, row["median_ms"], top)


def ratio_rows(measured: Measured, yardsticks: Sequence[str], about: Fields) -> list[Row]:
    """Returns how many times as fast each yardstick is as the others, by runs of one round."""
    rows = []
    for yardstick in yardsticks:
        for name, (_, times) in measured.items():
            ours = measured[yardstick][1] if yardstick in measured else np.zeros(0)
            if name not in yardsticks and (ratio := speed_ratio(ours, times)):
                case = {"name": f"ratio {yardstick} / {name}", "form": yardstick, "other": name}
                rows.append(make(case | about, ratio))
    return rows


def slope_part(sizes: Setting, limits: Limits, heads: Sequence[str]) -> Iterator[Row]:
    """Yields the times of the linear form at growing lengths, and the exponent of their growth."""
    if len(set(sizes.slope_lengths)) < 2:
        reason = f"a slope needs two lengths: got {list(sizes.slope_lengths)}"
        yield make({"name": "slope"}, {"skipped": reason})
        return
    form, pass_name = ("linear" if sizes.platform == "cpu" else "auto"), PASSES[1]
    for head_type in heads:
        shapes = {
            str(seq): sizes.shape(seq=seq, head_type=head_type) for seq in sizes.slope_lengths
        }
        # One row at every length, so that nothing but the length grows.
        shapes = {name: dataclasses.replace(shape, batch=1) for name, shape in shapes.items()}
        cases = {
            name: vq_cases.make_case(form, vq_cases.make_inputs(shape), pass_name)
            for name, shape in shapes.items()
        }
        measured = measure(cases, limits, limits.n_runs)
        for name, (row, _) in measured.items():
            about = {"name": form, "pass": pass_name, **shapes[name].fields()}
            yield make(about, row | counts(form, shapes[name], pass_name, row, limits))
        times = {int(name): seconds for name, (_, seconds) in measured.items() if len(seconds)}
        if len(times) > 1:
            about = {"name": f"slope {form}", "pass": pass_name, "lengths": sorted(times)}
            yield make(about | {"form": form, "head_type": head_type}, slope_fields(times))


def slope_fields(times: Mapping[int, np.ndarray]) -> Fields:
    """Returns the exponent e of time ~ length^e, fitted to the logs of each round.

    Args:
        times: seconds of every round, by length.
    """
    lengths = sorted(times)
    logs = np.log([times[length] for length in lengths])  # [lengths, rounds]
    exponents = np.polyfit(np.log(lengths), logs, 1)[0]
    return {"n_runs": logs.shape[1]} | quartiles("exponent", exponents)


def variants_part(sizes: Setting, limits: Limits, part: str) -> Iterator[Row]:
    """Yields the gated layer with other codebook sizes, block lengths or reductions, in turns."""
    field, values, reference = VARIANTS[part]
    if limits.is_quick and field in QUICK_VALUES:
        values = QUICK_VALUES[field]
        reference = values[-1]
    forms = ("linear",) if sizes.platform == "cpu" else ("linear", "auto")
    for form in forms:
        for pass_name in PASSES:
            shapes = {str(value): sizes.shape(seq=sizes.seq, **{field: value}) for value in values}
            cases = {
                name: vq_cases.make_case(form, vq_cases.make_inputs(shape), pass_name)
                for name, shape in shapes.items()
            }
            measured = measure(cases, limits, limits.n_runs)
            base = measured[str(reference)][1]
            for name, (row, times) in measured.items():
                about = {"name": form, "pass": pass_name, **shapes[name].fields()}
                row = row | counts(form, shapes[name], pass_name, row, limits)
                if len(times) and len(base):
                    row |= {"relative_to": reference} | quartiles("relative_time", times / base)
                yield make(about, row)


def search_part(sizes: Setting, limits: Limits) -> Iterator[Row]:
    """Yields the search for nearest codes, every form, by length."""
    for seq in sizes.lengths:
        shape = sizes.shape(seq=seq)
        keys = jax.random.split(jax.random.key(0))
        size = (shape.batch, seq, 1, shape.d_key)
        vectors = jax.random.normal(keys[0], size, shape.dtype)
        codebook = jax.random.normal(keys[1], (1, shape.n_codes, shape.d_key), jnp.float32)
        cases, reasons = {}, {}
        for name in [form.name for form in SEARCHES]:
            function = jax.jit(functools.partial(nearest_code, implementation=name))
            if reason := timing.why_not(function, vectors, codebook):
                reasons[name] = reason
                continue
            cases[name] = Case(function, lambda _, x=(vectors, codebook): x, keeps_output=False)
        measured = measure(cases, limits, limits.n_runs)
        about = {"pass": "forward", "head_type": "shga", "batch_size": shape.batch, "seq_len": seq}
        about |= {"d_key": shape.d_key, "n_codes": shape.n_codes, "dtype": shape.dtype}
        for name, reason in reasons.items():
            yield make({"name": f"search {name}", **about}, {"skipped": reason})
        n_tokens = shape.batch * seq
        n_bytes = vectors.nbytes + codebook.nbytes + 8 * n_tokens
        n_flops = 2 * n_tokens * shape.n_codes * shape.d_key
        device = jax.local_devices()[0].device_kind
        top = roofline.ceiling(device, "float32", is_quick=limits.is_quick)  # as it multiplies
        for name, (row, _) in measured.items():
            if "median_ms" in row:
                row = row | roofline.floor_fields(n_bytes, n_flops, n_tokens, row["median_ms"], top)
            yield make({"name": f"search {name}", **about}, row)
