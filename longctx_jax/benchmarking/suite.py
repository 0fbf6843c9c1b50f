"""What a suite is: one value that says what it measures, how that is drawn, and how it is told.

A suite lives in a folder of its own, whose `__init__.py` declares `SUITE` (and imports nothing
heavy), and has one line in `registry.py`. scripts.benchmark knows neither names nor options.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longctx_jax.benchmarking.rows import Fields, Flat, Row, within

if TYPE_CHECKING:  # both are slow to import
    from longctx_jax.benchmarking.timing import Limits
    from longctx_jax.figures.panels import Group


class RequestError(ValueError):
    """A flag asks for what the suite does not have."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks a suite for.

    Attributes:
        config: a whole config; each suite says which fields count.
        parts: of the suite's, which to run.
        shapes: names and sizes (fields of config.model) of models to measure on a GPU.
        options: values of the suite's options.
        mixers: kinds that patterns may name; suites that compare mixers take outside ones along.
    """

    config: Any
    limits: "Limits"
    parts: Sequence[str]
    shapes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mixers: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag of single suites: a list of words, or a switch.

    Attributes:
        words: what the list may hold: those, or those for a request; None = anything.
        default: what an empty list stands for.
        is_switch: True or False instead of a list.
        is_real: measures nothing sensible in a quick run, and refuses it.
    """

    name: str
    help: str
    words: Sequence[str] | Callable[[Request], Sequence[str]] | None = None
    default: Sequence[str] = ()
    is_switch: bool = False
    is_real: bool = False


@dataclasses.dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        parts: in the order in which they run.
        rows: measures what is asked for; its cases need no field `suite`.
        panels: of the newest flat rows of one device.
        summary: a flat row about other rows as a sentence; "" for any other row.
        options: flags of its own.
        columns: of measured fields, beside those that every table shows.
        after: what else to do with all flat rows of the file, newest first of each case, and the
            environment of this run; returns lines to print.
    """

    parts: tuple[str, ...]
    rows: Callable[[Request], Iterator[Row]]
    panels: "Callable[[Sequence[Flat]], list[Group]]"
    summary: Callable[[Flat], str]
    options: tuple[Option, ...] = ()
    columns: tuple[str, ...] = ()
    after: Callable[[Request, Sequence[Flat], Fields], list[str]] | None = None


def rows_by_part(
    request: Request, measure: Mapping[str, Callable[[], Iterator[Row]]]
) -> Iterator[Row]:
    """Yields the rows of the parts asked for, each case with its part."""
    for part in request.parts:
        yield from within(measure[part](), part=part)


def checked(suites: Mapping[str, Suite], name: str, request: Request) -> Request:
    """Returns the request to a suite with what its empty lists stand for.

    Args:
        suites: all of them: an option of another suite is refused with the name of that one.
        name: of the suite.
        request: as given: its options are those that differ from nothing.

    Raises:
        RequestError: if a part, an option or a word is not the suite's.
    """
    suite = suites[name]
    _require_words("parts", request.parts, suite.parts, name)
    own = {option.name: option for option in suite.options}
    for given, value in request.options.items():
        if value and given not in own:
            owners = [n for n, s in suites.items() if any(o.name == given for o in s.options)]
            whose = " and ".join(f"--suite={owner}" for owner in owners)
            raise RequestError(f"--{given} belongs to {whose}: got --suite={name}; leave it out")
    options = {}
    for option in suite.options:
        value = request.options.get(option.name)
        if value and option.is_real and request.limits.is_quick:
            raise RequestError(
                f"--{option.name} needs real measurements: got --quick, whose shapes measure "
                "nothing; leave one of them out"
            )
        if not option.is_switch and option.words is not None:
            words = option.words(request) if callable(option.words) else option.words
            _require_words(option.name, value or (), words, name)
        options[option.name] = bool(value) if option.is_switch else value or option.default
    return dataclasses.replace(request, parts=request.parts or suite.parts, options=options)


def _require_words(flag: str, given: Sequence[str], known: Sequence[str], suite: str) -> None:
    unknown = [word for word in given if word not in known]
    if unknown:
        raise RequestError(
            f"--{flag} must be among {', '.join(known)} in the suite {suite}: got "
            f"{', '.join(unknown)}"
        )
