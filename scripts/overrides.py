"""What is wrong with an override of the config: the field, the value and the remedy, by name."""

import difflib
from collections.abc import Iterable
from typing import Any

import ml_collections


def override_problem(config: ml_collections.ConfigDict, field: str, value: str) -> str:
    """What is wrong with `--config.<field>=<value>`; "" when nothing is.

    Args:
        config: the config whose fields and types count.
        field: dotted name without the leading `config.`.
        value: as typed on the command line.
    """
    node: Any = config
    known = ""
    for part in field.split("."):
        if not isinstance(node, ml_collections.ConfigDict):
            return f"{known} is a value, not a group of fields: got --config.{field}={value}"
        if part not in node:
            return _unknown_field(config, field, value, known, list(node))
        node = node[part]
        known = f"{known}.{part}" if known else part
    if isinstance(node, ml_collections.ConfigDict):
        fields = ", ".join(node)
        return f"config.{field} is a group of fields: got {value!r}; set one of {fields}"
    if not _fits(node, value):
        kind = type(node).__name__
        return f"config.{field} must be {kind}: got {value!r}; the default is {node!r}"
    return ""


def _unknown_field(
    config: ml_collections.ConfigDict, field: str, value: str, known: str, siblings: list[str]
) -> str:
    """The message for `field`, of which `known` exists and has the fields `siblings`."""
    names = list(_flat_names(config))
    group, _, leaf = field.rpartition(".")
    close = difflib.get_close_matches(field, names, n=1, cutoff=0.85)
    if not close and known == group:
        prefix = f"{group}." if group else ""
        close = [prefix + n for n in difflib.get_close_matches(leaf, siblings, n=1)]
    close = close or [n for n in names if n.rpartition(".")[2] == leaf]
    if close:
        same_group = group and close[0].rpartition(".")[0] == group
        short = close[0].rpartition(".")[2] if same_group else close[0]
        hint = f"did you mean {short}? (--config.{close[0]}={value})"
    else:
        hint = f"the fields of {known or 'the config'} are {', '.join(siblings)}"
    return f"unknown config field {field}: got --config.{field}={value}; {hint}"


def _flat_names(config: ml_collections.ConfigDict, prefix: str = "") -> Iterable[str]:
    for name in config:
        if isinstance(config[name], ml_collections.ConfigDict):
            yield from _flat_names(config[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _fits(current: Any, value: str) -> bool:
    """Whether the text `value` can replace a config value of the type of `current`."""
    try:
        if isinstance(current, bool):
            return value.lower() in ("true", "false", "t", "f", "1", "0")
        if isinstance(current, int):
            int(value)
        elif isinstance(current, float):
            float(value)
    except ValueError:
        return False
    return True
