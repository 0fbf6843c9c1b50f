"""What a model needs in memory: python -m scripts.accounting --config=FILE [--contexts=4096,...].

By formula, for any size, without allocating anything: parameters, cache by what it holds, the peak
of prefill and decoding; the longest context in --budget_gb; the largest model of each scheme in
the memory of --baseline. --schemes=all shows every scheme of configs/accounting_1b.py side by side,
--compare more config files; --config.model.field=value then holds for all of them. --measure
compiles every program (on a GPU it also runs those that fit) and sets the compiler's numbers beside
ours.
"""

import itertools
import pathlib
import sys
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from scripts import common

_CONFIG = common.config_flag(default="configs/accounting_1b.py")
_SCHEMES = flags.DEFINE_list("schemes", [], "Of configs/accounting_1b.py, e.g. mha,gqa; all = all.")
_COMPARE = flags.DEFINE_list("compare", [], "More config files, FILE.py or FILE.py:NAME.")
_CONTEXTS = flags.DEFINE_list("contexts", ["4096", "32768", "131072", "1048576"], "Tokens.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Rows of a cache.", lower_bound=1)
_PIECE_LEN = flags.DEFINE_integer("piece_len", 512, "Tokens of a prompt at once.", lower_bound=1)
_WEIGHT_DTYPE = flags.DEFINE_enum(
    "weight_dtype", "", ["", "float32", "bfloat16"], "Of parameters; empty = as stored, float32."
)
_BUDGET_GB = flags.DEFINE_float("budget_gb", 24.0, "GiB for the longest context; 0 = leave out.")
_BASELINE = flags.DEFINE_string("baseline", "", "Model to be equal to; empty = the first one.")
_EQUAL_CONTEXTS = flags.DEFINE_list(
    "equal_contexts", ["32768"], "Tokens, of that comparison; empty = leave it out."
)
_MEASURE = flags.DEFINE_bool("measure", False, "Compile the programs too.")
_TRAIN = flags.DEFINE_bool("train", False, "Also an update, of the config's data and optimizer.")
_OUT = flags.DEFINE_string("out", "", "JSON-lines file to append rows to; empty = none.")
_PLOT = flags.DEFINE_string("plot", "", "Figure to write, e.g. memory.png; empty = none.")

COUNTED = {  # fields that a row measures; the others say of what
    *("n_parameters", "parameter_bytes", "cache_bytes", "cache_terms"),
    *("predicted", "temporary_terms", "compiled", "peak_ratio", "temporaries_ratio"),
    *("device_bytes_before", "device_peak_bytes"),
    *("largest_context_state", "largest_context_peak", "deep", "wide"),
}


def lengths(name: str, given: list[str]) -> list[int]:
    """Returns the numbers of tokens that a flag lists, in order, each once.

    Raises:
        UsageError: if one of them is no such number.
    """
    if not all(length.isdigit() and 0 < int(length) < 2**31 for length in given):
        raise common.UsageError(
            f"--{name} must be numbers of tokens from 1 to {2**31 - 1}: got {','.join(given)}; "
            f"e.g. --{name}=4096,32768"
        )
    return sorted(set(map(int, given)))


def load_configs() -> dict[str, Any]:
    """Returns the configs to account for, by name, with the overrides of the command line.

    Raises:
        UsageError: if a scheme is unknown.
    """
    from configs import accounting_1b

    holder = flags.FLAGS["config"]
    schemes = list(accounting_1b.SCHEMES) if _SCHEMES.value == ["all"] else _SCHEMES.value
    unknown = [name for name in schemes if name not in accounting_1b.SCHEMES]
    if unknown:
        raise common.UsageError(
            f"--schemes must be all, or among {', '.join(accounting_1b.SCHEMES)}: got "
            f"{', '.join(unknown)}"
        )
    config, path = _CONFIG.value, config_flags.get_config_filename(holder)
    configs = {}
    if holder.present or not (schemes or _COMPARE.value):
        configs[name_of(path)] = config
    configs |= {name: accounting_1b.get_config(name) for name in schemes}
    configs |= {name_of(path): common.load_config(path) for path in _COMPARE.value}
    overrides = config_flags.get_override_values(holder)
    for other in configs.values():
        other.update_from_flattened_dict(overrides)
    return configs


def name_of(path: str) -> str:
    """Returns a config's name: of its file, and what stands behind the colon."""
    name, _, argument = path.partition(":")
    return pathlib.Path(name).stem + (f":{argument}" if argument else "")


def as_row(row: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """Returns a flat row of the report as it is recorded: what was counted apart from what of."""
    from longctx_jax.benchmarking.rows import make

    counted = COUNTED | ({"budget_bytes"} if row["part"] == "models" else set())
    case = {name: value for name, value in row.items() if name not in counted}
    return make(case, {name: row[name] for name in row.keys() - case.keys()}, environment)


def main(arguments: list[str]) -> None:
    """Accounts, prints, records, draws."""
    del arguments
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # every shape tried would tell its implementations
    contexts = lengths("contexts", _CONTEXTS.value)
    equal_contexts = lengths("equal_contexts", _EQUAL_CONTEXTS.value)
    if _BUDGET_GB.value < 0:
        raise common.UsageError(
            f"--budget_gb must not be negative: got {_BUDGET_GB.value}; 0 leaves it out"
        )
    configs = load_configs()
    if _BASELINE.value and _BASELINE.value not in configs:
        raise common.UsageError(
            f"--baseline must be one of the models {', '.join(configs)}: got {_BASELINE.value}"
        )
    import jax

    from longctx_jax.accounting import report
    from longctx_jax.benchmarking import environment
    from longctx_jax.benchmarking import rows as rows_of
    from longctx_jax.models import build_model

    mixers = common.mixers()

    models = {name: build_model(config.model, mixers) for name, config in configs.items()}
    setting = report.Setting(_BATCH_SIZE.value, _PIECE_LEN.value, _WEIGHT_DTYPE.value)
    options = {"is_measured": _MEASURE.value}
    parts = [report.program_rows(models, contexts, setting, **options)]
    if _TRAIN.value:
        parts.append(report.train_rows(configs, models, **options))
    if _BUDGET_GB.value:
        budget = round(_BUDGET_GB.value * 2**30)
        parts.append(report.context_rows(models, budget, setting))
    if len(models) > 1 and equal_contexts:
        baseline = _BASELINE.value or next(iter(models))
        parts.append(report.model_rows(models, baseline, equal_contexts, setting))
    command = environment.command_line("scripts.accounting", sys.argv[1:])
    fields = environment.environment(command)
    rows = []
    for row in itertools.chain.from_iterable(parts):
        rows.append(row)
        if _OUT.value:  # one by one: a measured row takes seconds
            rows_of.append(_OUT.value, [as_row(row, fields)])
    print(report.format_report(rows))
    if _MEASURE.value and jax.default_backend() == "cpu":
        print(
            "\ncompiled for a CPU and not run: the plan's bytes. A CPU widens bfloat16 to float32, "
            "so compare at --config.model.dtype=float32"
        )
    if _OUT.value:
        print(f"\nwrote {len(rows)} rows to {_OUT.value}")
    if _PLOT.value:
        from longctx_jax.figures.accounting import draw_accounting
        from longctx_jax.figures.saving import save

        save(draw_accounting([row | fields for row in rows]), _PLOT.value)
        print(f"wrote {_PLOT.value}")


if __name__ == "__main__":
    common.run(main)
