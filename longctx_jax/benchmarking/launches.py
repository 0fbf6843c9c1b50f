"""Counts what a compiled program starts on its device: kernels, library calls, copies.

Each instruction of the scheduled program that does work is one launch; those of a loop's body count
as often as the loop goes round, where the compiler knows how often.
"""

import re
from typing import Any

FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "while",
    "conditional",
    "call",
}
# name = type opcode(operands), attributes; types may be tuples.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\([^=]*?\)|\S+) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")


def count_launches(compiled: Any) -> int:
    """Returns the launches of one run of a compiled function; unknown trip counts count once.

    The longest branch of a conditional counts.
    """
    bodies, entry = _computations(re.sub(r"/\*.*?\*/", "", compiled.as_text()))

    def total(name: str) -> int:
        n = 0
        for line in bodies.get(name, ()):
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            opcode = found.group(1)
            if opcode == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                (body,) = re.findall(r"body=%?([\w.\-]+)", line)
                n += (int(trips.group(1)) if trips else 1) * total(body)
            elif opcode == "conditional":
                names = re.search(r"branch_computations=\{([^}]*)\}", line)
                branches = names.group(1).split(",") if names else []
                branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
                n += max((total(b.strip().lstrip("%")) for b in branches), default=0)
            elif opcode == "call":
                n += sum(map(total, re.findall(r"to_apply=%?([\w.\-]+)", line)))
            elif opcode not in FREE:
                n += 1
        return n

    return total(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the instruction lines of every computation, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = start.group(2)
            bodies[current] = []
            entry = current if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry
