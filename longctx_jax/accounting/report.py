"""Rows and tables of memory accounting, for any number of models side by side."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longctx_jax.accounting.caches import cache_terms
from longctx_jax.accounting.programs import (
    PROGRAMS,
    compiled_plan,
    device_bytes,
    device_plan,
    make_program,
    parameter_bytes,
    parameter_count,
    predicted,
    train_plans,
)
from longctx_jax.accounting.search import (
    MAX_CONTEXT,
    held_bytes,
    largest_context,
    largest_models,
)
from longctx_jax.models.decoder import Decoder
from longctx_jax.units import bytes_text

Models = Mapping[str, Decoder]
Row = dict[str, Any]  # flat: scripts.accounting says what is measured of it
SUITE = "accounting"
PEAK_PROGRAMS = ("prefill", "loop")  # what generation runs


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows of a report have in common.

    Attributes:
        batch_size: rows of a cache.
        piece_len: tokens of a prompt at once.
        weight_dtype: of parameters; "" = as stored, float32.
    """

    batch_size: int = 1
    piece_len: int = 512
    weight_dtype: str = ""


def program_rows(
    models: Models, contexts: Sequence[int], setting: Setting, *, is_measured: bool
) -> Iterator[Row]:
    """Yields a row a (model, context, program): by formula, and as compiled if asked for."""
    for name, model in models.items():
        for context_len in contexts:
            terms = cache_terms(model, setting.batch_size, context_len)
            about = about_fields(name, model, setting) | {
                "part": "programs",
                "context_len": context_len,
                "cache_bytes": sum(terms.values()),
                "cache_terms": terms,
            }
            for program in PROGRAMS:
                sizes: dict[str, Any] = dataclasses.asdict(setting) | {"max_len": context_len}
                plan, temporaries = predicted(model, program, **sizes)
                row = about | {"program": program, "predicted": plan}
                row["temporary_terms"] = temporaries
                if is_measured:
                    row |= _compiled(*make_program(model, program, **sizes), plan)
                yield row


def train_rows(configs: Mapping[str, Any], models: Models, *, is_measured: bool) -> Iterator[Row]:
    """Yields a row a model: an update of its config's batch, by shapes and as compiled."""
    for name, config in configs.items():
        model = models[name]
        sizes = {"batch_size": config.data.global_batch_size, "seq_len": config.data.seq_len}
        plan, terms, compiled = train_plans(config, model, **sizes, is_measured=is_measured)
        row = about_fields(name, model, Setting(config.data.global_batch_size))
        row |= {"part": "programs", "program": "train", "seq_len": config.data.seq_len}
        row |= {"remat": model.config.remat, "optimizer": config.optim.name}
        row |= {"predicted": plan, "temporary_terms": terms}
        yield row if compiled is None else row | _ratios(plan, compiled)


def context_rows(models: Models, budget: int, setting: Setting) -> Iterator[Row]:
    """Yields a row a model: the longest context within a budget of bytes.

    `state` counts parameters and cache, `peak` what prefill and the loop over tokens hold.
    """
    sizes = {"batch_size": setting.batch_size, "weight_dtype": setting.weight_dtype}
    for name, model in models.items():

        def state(n: int, model=model) -> int:
            return held_bytes(model, n, **sizes)

        def peak(n: int, model=model) -> int:
            return max(held_bytes(model, n, **sizes, program=p) for p in PEAK_PROGRAMS)

        yield about_fields(name, model, setting) | {
            "part": "contexts",
            "budget_bytes": budget,
            "largest_context_state": largest_context(state, budget),
            "largest_context_peak": largest_context(peak, budget),
        }


def model_rows(
    models: Models, baseline: str, contexts: Sequence[int], setting: Setting
) -> Iterator[Row]:
    """Yields a row a (model, context): the largest model of its scheme in the baseline's memory.

    Raises:
        ValueError: if there is no such baseline.
    """
    if baseline not in models:
        raise ValueError(
            f"--baseline must be one of the models {', '.join(models)}: got {baseline!r}; "
            "choose one of them"
        )
    sizes = {"batch_size": setting.batch_size, "weight_dtype": setting.weight_dtype}
    for context_len in contexts:
        budget = held_bytes(models[baseline], context_len, **sizes)
        for name, model in models.items():
            fits = largest_models(model.config, budget, context_len=context_len, **sizes)
            yield about_fields(name, model, setting) | {
                "part": "models",
                "baseline": baseline,
                "context_len": context_len,
                "budget_bytes": budget,
                **{kind: dataclasses.asdict(fit) for kind, fit in fits.items()},
            }


def about_fields(name: str, model: Decoder, setting: Setting) -> Row:
    """Returns what every row says of its model."""
    config = model.config
    kept = ("n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "dtype")
    return {
        "suite": SUITE,
        "name": name,
        "model": config.name,
        "pattern": config.pattern,
        "n_kv_heads": config.n_kv_heads,
        "batch_size": setting.batch_size,
        **{field: getattr(config, field) for field in kept},
        "weight_dtype": setting.weight_dtype or "float32",
        "n_parameters": parameter_count(model),
        "parameter_bytes": parameter_bytes(model, setting.weight_dtype),
    }


def _compiled(function: Any, arguments: tuple, plan: Mapping[str, int]) -> Row:
    compiled = compiled_plan(function, arguments)
    row = _ratios(plan, compiled)
    if compiled["peak"] <= device_bytes():  # it may run
        row |= device_plan(function, arguments)
    return row


def _ratios(plan: Mapping[str, int], compiled: Mapping[str, int]) -> Row:
    return {
        "compiled": compiled,
        "peak_ratio": round(plan["peak"] / compiled["peak"], 4),
        "temporaries_ratio": round(plan["temporaries"] / max(1, compiled["temporaries"]), 4),
    }


def in_tokens(n: int) -> str:
    """Returns a number of tokens as text; any is more than positions can count."""
    return "any" if n == MAX_CONTEXT else "none" if n == 0 else f"{n:,}"


def format_report(rows: Sequence[Row]) -> str:
    """Returns the rows as tables: caches, peaks, longest contexts, largest models."""
    parts = {part: [r for r in rows if r["part"] == part] for part in _TABLES}
    return "\n\n".join(_TABLES[part](found) for part, found in parts.items() if found)


def _programs_text(rows: Sequence[Row]) -> str:
    cached = [row for row in rows if row["program"] == PROGRAMS[0]]
    contexts = list(dict.fromkeys(row["context_len"] for row in cached))
    heads = ["model", "parameters", "weights", *(f"{n:,}" for n in contexts)]
    lines = []
    for name in dict.fromkeys(row["name"] for row in cached):
        own = [row for row in cached if row["name"] == name]
        sizes = f"{own[0]['n_parameters']:,}", bytes_text(own[0]["parameter_bytes"])
        lines.append([name, *sizes, *(bytes_text(row["cache_bytes"]) for row in own)])
    texts = []
    if lines:
        texts.append("cache by context (tokens)\n" + _columns([heads, *lines]))
    if len(lines) == 1:
        texts += [_terms_text(row) for row in cached]
    heads = ["model", "context", "program", "peak", "of it temporaries", "which hold"]
    lines = []
    for row in rows:
        plan = row["predicted"]
        terms = ", ".join(f"{n} {bytes_text(b)}" for n, b in row["temporary_terms"].items() if b)
        place = row.get("context_len", row.get("seq_len"))
        line = [row["name"], f"{place:,}", row["program"], bytes_text(plan["peak"])]
        line += [bytes_text(plan["temporaries"])]
        if "compiled" in row:
            line += [bytes_text(row["compiled"]["peak"]), f"{row['peak_ratio']:.3f}"]
            line += [f"{row['temporaries_ratio']:.3f}"]
            line += [bytes_text(row["device_peak_bytes"]) if "device_peak_bytes" in row else "-"]
        lines.append([*line, terms])
    if any("compiled" in row for row in rows):
        heads[5:5] = ["compiled peak", "ratio", "ratio of temporaries", "device peak"]
    texts.append("peak by formula\n" + _columns([heads, *lines]))
    return "\n\n".join(texts)


def _terms_text(row: Row) -> str:
    terms = ", ".join(f"{name} {bytes_text(n)}" for name, n in row["cache_terms"].items())
    return f"cache of {row['context_len']:,} tokens: {row['cache_bytes']:,} bytes: {terms}"


def _contexts_text(rows: Sequence[Row]) -> str:
    lines = [["model", "parameters and cache", "peak of generation"]]
    for row in rows:
        found = row["largest_context_state"], row["largest_context_peak"]
        lines.append([row["name"], *map(in_tokens, found)])
    budget = bytes_text(rows[0]["budget_bytes"])
    return f"largest context (tokens) in {budget}\n" + _columns(lines)


def _models_text(rows: Sequence[Row]) -> str:
    lines = [["model", "context", "memory", "layers", "parameters", "width", "parameters"]]
    for row in rows:
        deep, wide = row["deep"], row["wide"]
        sizes = f"{deep['n_layers']:,}", _billions(deep), f"{wide['d_model']:,}", _billions(wide)
        lines.append(
            [row["name"], f"{row['context_len']:,}", bytes_text(row["budget_bytes"]), *sizes]
        )
    title = f"largest model in the memory of {rows[0]['baseline']} (parameters and cache)"
    return f"{title}: deeper, or wider\n" + _columns(lines)


def _billions(fit: Mapping[str, int]) -> str:
    n = fit["n_parameters"]
    return "none" if not n else f"{n / 1e9:.2f} B" if n >= 1e8 else f"{n / 1e6:.2f} M"


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width)
            if i == 0 or (i == last and "," in "".join(cell))
            else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_TABLES = {"programs": _programs_text, "contexts": _contexts_text, "models": _models_text}
