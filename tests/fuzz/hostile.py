"""Hostile input for parsers, and what they may answer: a result, or an error of this project.

Errors of this project are its own `raise` statements of `ValueError`, and errors of the file
system; anything else that a parser lets through is a bug of it.
"""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.common import is_user_error

# Examples of a test: the same few each time, and many others.
SIZES = [pytest.param(40, id="fast"), pytest.param(1000, id="slow", marks=pytest.mark.slow)]
DEADLINE_MS = 3000  # of one example: nothing may hang, or allocate absurdly and so be slow

TEXTS = [
    b"",
    b"\x00",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"null",
    b"[]",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1e999, "loss": NaN}',
    b'{"\\ud800": "\\udfff"}',
    b'{"a": 1' + b" " * 70_000,
]
VALUES = [None, True, False, 0, -1, 2**31, 2**63, 10**300, -(10**4000), 0.5, 1e308, float("nan")]
VALUES += [float("inf"), "", "x", "\x00", "\ud800", "a/../b", "9" * 5000, [], {}, [[]], [None]]
VALUES += [{"": {}}, {"type": "Sequence"}, {"a": [1, "b"]}, ["x"] * 50]


def fuzz(n_examples, strategy, check, always=()):
    """Runs `check` on `always`, and on examples of `strategy`; few are the same ones every time."""
    for example in always:
        check(example)
    profile = settings(
        max_examples=n_examples,
        derandomize=n_examples < 100,
        database=None,
        deadline=DEADLINE_MS,
        suppress_health_check=list(HealthCheck),
    )
    profile(given(strategy)(check))()


def refused(parse, *names):
    """Calls `parse`; returns whether it raised an error of this project that holds `names`."""
    try:
        parse()
    except (ValueError, OSError) as error:
        assert is_user_error(error), f"{type(error).__name__} of a library: {error}"
        if not isinstance(error, OSError):
            for name in names:
                assert str(name) in str(error), f"{name} is not in: {error}"
        return True
    return False


@st.composite
def damaged_bytes(draw, raw):
    """Returns `raw` with a few bytes changed, cut, repeated or put in."""
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(raw)))
        size = draw(st.integers(1, 60))
        kind = draw(st.sampled_from(["change", "cut", "repeat", "insert", "end"]))
        if kind == "change" and place < len(raw):
            raw[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[place : place + size]
        elif kind == "repeat":
            raw[place:place] = raw[place : place + size]
        elif kind == "insert":
            raw[place:place] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "end":
            del raw[place:]
    return bytes(raw)


def values():
    """JSON values, odd ones above all."""
    leaves = st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=8)
    return leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=5), leaves)


@st.composite
def damaged_objects(draw, value):
    """Returns a copy of a JSON object with a few values replaced, added or left out, anywhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        node = value
        while True:
            if isinstance(node, dict) and node:
                key = draw(st.sampled_from(sorted(node)))
            elif isinstance(node, list) and node:
                key = draw(st.integers(0, len(node) - 1))
            else:
                break
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if kind == "remove":
                del node[key]
            elif kind == "add" and isinstance(node, dict):
                node[draw(st.text(max_size=5))] = copy.deepcopy(draw(values()))
            else:
                node[key] = copy.deepcopy(draw(values()))
            break
    return value


def json_files(value):
    """Contents of a file that should hold the JSON object `value`: bytes."""
    raw = json.dumps(value).encode()
    objects = damaged_objects(value).map(lambda v: json.dumps(v).encode())
    return objects | objects | damaged_bytes(raw) | st.sampled_from(TEXTS) | st.binary()
