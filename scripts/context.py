"""Bits per byte by context length: python -m scripts.context RUN [RUN ...] --out=FILE.jsonl.

RUN is a work directory, or a folder of them. The same bytes are read in stripes of each length that
start with an empty cache, so a length is the most that any token can look back on. Writes a JSON
line a run and length, with the bits per byte by position in the stripe as well, and draws FILE with
.png: both curves, by position of the greatest length.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from longctx_jax import run_files
from scripts import common

_OUT = flags.DEFINE_string("out", "runs/context.jsonl", "JSON-lines file; its figure beside it.")
_LENGTHS = flags.DEFINE_list("lengths", ["512", "2048", "8192", "32768"], "Tokens a stripe.")
_MAX_BYTES = flags.DEFINE_integer("max_bytes", 65_536, "Bytes of the split.", lower_bound=1)
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")


def context_lengths() -> list[int]:
    """Returns the lengths asked for.

    Raises:
        UsageError: if one of them is not a number of tokens that fits max_bytes.
    """
    for length in _LENGTHS.value:
        if not length.isdigit() or not 0 < int(length) <= _MAX_BYTES.value:
            raise common.UsageError(
                f"--lengths must be between 1 and --max_bytes={_MAX_BYTES.value}: got {length}"
            )
    return sorted(map(int, _LENGTHS.value))


def vq_fields(model: Any) -> dict[str, Any]:
    """Returns what tells models with quantised keys apart, nothing for others."""
    if "vq" not in model.pattern:
        return {}
    vq = model.of("vq")
    fields = {"vq_codebook_size": vq.codebook_size, "vq_use_table": vq.use_table}
    return fields | {"vq_window_len": vq.window_len, "gate": vq.gate}


def variant_fields(model: Any) -> dict[str, Any]:
    """Returns the scheme, its sizes, and which of its options are not the defaults."""
    fields = {"model": model.name, "n_layers": model.n_layers, "n_kv_heads": model.n_kv_heads}
    if model.name not in ("stagformer", "inattention"):
        return fields
    own = getattr(model, model.name)
    values = {f.name: (getattr(own, f.name), f.default) for f in dataclasses.fields(own)}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    return fields | {"variant": changed}


def measure(folder: pathlib.Path, lengths: list[int]) -> Iterator[tuple[dict, dict]]:
    """Yields the case and what was measured, a length of the run in `folder`."""
    import jax

    from longctx_jax import data
    from longctx_jax.evaluation.positions import PositionCurve, doubling_edges
    from longctx_jax.runs.evaluate import evaluate_split, require_text

    run = common.restore_run(str(folder))
    config, model = run.config, run.model.config
    cold = config.train.cold_start_every
    stream = data.load_source(config.data)[_SPLIT.value]
    require_text(str(folder), _SPLIT.value, stream)
    for length in lengths:
        config.eval.batch_size = max(1, _MAX_BYTES.value // length)
        config.eval.cache_len = length
        config.eval.seq_len = min(length, 512)
        curve = PositionCurve(doubling_edges(length))
        result = evaluate_split(
            config,
            run.model,
            run.variables,
            stream,
            max_bytes=_MAX_BYTES.value,
            observe=curve,
        )
        case = {
            "suite": "context",
            "run": folder.resolve().name,
            "data": config.data.name,
            "split": _SPLIT.value,
            "pattern": model.pattern,
            "decay_kind": model.of("decay").kind if "decay" in model.pattern else "",
            **vq_fields(model),
            **variant_fields(model),
            "seed": config.train.seed,
            "context_len": length,
            "step": run.step,
            "train_seq_len": config.data.seq_len,
            "train_carries_cache": bool(config.train.carry_cache),
            **({"train_cold_start_every": cold} if cold else {}),
            "train_tokens": run.step * config.data.seq_len * config.data.global_batch_size,
            "n_parameters": sum(x.size for x in jax.tree.leaves(run.variables["params"])),
        }
        positions = {
            "position_edges": curve.edges.tolist(),
            "bits_per_byte_by_position": curve.bits_per_byte(),
        }
        print(f"{folder.name} context {length}: {result['bits_per_byte']:.4f}", file=sys.stderr)
        yield case, {**result, **positions}


def main(arguments: list[str]) -> None:
    """Measures every run, records, draws."""
    if not arguments:
        raise common.UsageError("scripts.context needs a run: got none; name its work directory")
    lengths = context_lengths()
    from longctx_jax.benchmarking import environment, rows
    from longctx_jax.figures.contexts import draw_context_curves
    from longctx_jax.figures.saving import save

    command = environment.command_line("scripts.context", sys.argv[1:])
    where = environment.environment(command)
    out = pathlib.Path(_OUT.value)
    n_rows = 0
    for folder in run_files.find_runs(arguments):
        for case, measured in measure(folder, lengths):
            rows.append(out, [rows.make(case, measured, where)])
            n_rows += 1
    picture = out.with_suffix(".png")
    save(draw_context_curves(rows.recorded(out)), picture, out)  # with what was there before
    print(f"wrote {n_rows} rows to {out}, and {picture}")


if __name__ == "__main__":
    common.run(main, accept_args=True)
