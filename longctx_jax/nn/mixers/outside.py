"""Mixers that are not this library's: found by the place of their code, which a user names.

The place comes from a command line or a call, never from a config or a run's folder: importing it
executes it.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from longctx_jax.nn.contract import Mixer
from longctx_jax.nn.mixers.registry import MIXERS


def load_mixers(places: Sequence[str]) -> tuple[dict[str, Mixer], tuple[str, ...]]:
    """Imports mixers by name.

    Args:
        places: "package.module:NAME" each. NAME is a `Mixer`, whose kind is then the module's name
            (gla for my.mixers.gla), or a mapping from kinds to mixers.

    Returns:
        The library's mixers and these; and "kind=place" of each of these, for the run's record.

    Raises:
        ValueError: if a place is misspelt or holds something else, or a kind is taken.
    """
    mixers, named = dict(MIXERS), []
    for place in places:
        for kind, mixer in _at(place).items():
            if kind in mixers:
                raise ValueError(
                    f"every mixer needs a name of its own: got {kind!r} from {place} and from "
                    "somewhere else; rename its file, or put it under another key"
                )
            mixers[kind] = mixer
            named.append(f"{kind}={place}")
    return mixers, tuple(named)


def default_fields(mixers: Mapping[str, Mixer]) -> dict[str, dict[str, Any]]:
    """Returns the fields of outside mixers by kind, as `config.model.<kind>` starts."""
    return {
        kind: dataclasses.asdict(mixer.config())
        for kind, mixer in mixers.items()
        if kind not in MIXERS
    }


def _at(place: str) -> dict[str, Mixer]:
    module_name, _, name = place.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"a mixer's place must be package.module:NAME: got {place!r}; e.g. my_mixers.gla:MIXER"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the module is there, and lacks something itself
        raise ValueError(
            f"a mixer's module must be importable: got {place!r}, and there is no {error.name}; "
            "run from the folder that holds it, or set PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if isinstance(found, Mixer):
        return {module_name.rpartition(".")[2]: found}
    if isinstance(found, Mapping) and all(isinstance(m, Mixer) for m in found.values()):
        return dict(found)
    raise ValueError(
        f"a mixer's place must hold a Mixer or a mapping of them: {place} is "
        f"{type(found).__name__}; see docs/contract.md"
    )
