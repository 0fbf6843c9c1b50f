"""Panels of the suite `train`: an update of each model, speed by length, schedules, checkpoints."""

from longctx_jax.figures.panels import Bars, Group, Lines
from longctx_jax.figures.style import Flat, Rows


def panels(rows: Rows) -> list[Group]:
    """Returns a panel a part."""
    rows = [row for row in rows if "median_ms" in row]
    parts = {p: [r for r in rows if r["part"] == p] for p in ("models", "lengths", "schedules")}
    found: list[Lines | Bars] = [
        Bars(f"an update{_sizes(own)}", own, _name) for own in _by_shape(parts["models"])
    ]
    found.append(Lines("training, by length", parts["lengths"], "seq_len", "tokens_per_s", _name))
    updates = [row for row in parts["schedules"] if row["pass"] == "train"]
    found += [Bars(f"by schedule{_sizes(own)}", own, _cells) for own in _by_shape(updates)]
    saves = [{**row, "percent": 100 * row["overhead_fraction"]} for row in rows if _is_save(row)]
    label = "time of the run that saves take (%)"
    found.append(Bars("what checkpoints cost", saves, _save, "percent", label))
    return [Group(found)]


def _by_shape(rows: Rows) -> list[Rows]:
    shapes: dict[tuple, list[Flat]] = {}
    for row in rows:
        names = ("batch_size", "seq_len", "n_layers", "d_model")
        shapes.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(shapes.values())


def _sizes(rows: Rows) -> str:
    return ": {n_layers} layers x {d_model}, {batch_size} x {seq_len:,} tokens".format(**rows[0])


def _is_save(row: Flat) -> bool:
    return row["part"] == "saves"


def _name(row: Flat) -> str:
    return row["name"]


def _cells(row: Flat) -> str:
    return f"{row['name']}\n({row['cells']} cells)"


def _save(row: Flat) -> str:
    return f"{row['name']}, every\n{row['checkpoint_every']} steps"
