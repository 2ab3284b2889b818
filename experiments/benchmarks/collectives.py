"""What devices exchange in a compiled program, read off its text."""

import math
import re
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def collectives(hlo: str) -> dict[str, dict[str, Any]]:
    """kind -> "program": how many there are, "runs": how many run a call, "mb": MB that they give a device a call.

    ``hlo`` is `jax.stages.Compiled.as_text()`. A loop counts as often as it runs (once where XLA does not know), a
    conditional as if all branches ran. MB = 2^20 bytes of results: of an all-gather the gathered array, of a
    reduce-scatter the device's piece.

    >>> collectives('''ENTRY %main (x: f32[256]) -> f32[1024] {
    ...   ROOT %all-gather = f32[1024]{0} all-gather(%x), dimensions={0}
    ... }''')
    {'all-gather': {'program': 1, 'runs': 1, 'mb': 0.00390625}}
    """
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, int] = {}
    # A computation is printed before those that call it.
    for name, lines in reversed(_computations(hlo)):
        times = 1 if name is None else runs.get(name, 0)
        for line in lines:
            trips = _TRIPS.search(line)
            for role, called in _CALLED.findall(line):
                each = int(trips[1]) if trips and role == "body" else 1
                runs[called] = runs.get(called, 0) + times * each
            for branches in _BRANCHES.findall(line):
                for called in re.findall(r"[\w.-]+", branches):
                    runs[called] = runs.get(called, 0) + times
            if times and (match := _COLLECTIVE.search(line)):
                entry = found.setdefault(match[2], {"program": 0, "runs": 0, "mb": 0.0})
                entry["program"] += 1
                entry["runs"] += times
                entry["mb"] += times * _result_bytes(match[1], match[2], bool(match[3])) / 2**20
    return found


def _computations(hlo: str) -> list[tuple[str | None, list[str]]]:
    """(name, lines) in order; the name of the entry is None."""
    found: list[tuple[str | None, list[str]]] = []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            found.append((None if match[1] else match[2], []))
        elif found:
            found[-1][1].append(line)
    return found


def _result_bytes(shape: str, kind: str, started: bool) -> int:
    """Bytes of a collective's results; one that is only started gives back its operands too, before the results."""
    shape = re.sub(r"/\*.*?\*/|\{[^}]*\}", "", shape)
    if started and shape.startswith("(("):
        shape = shape[shape.index(")") + 1 :]
    elif started and shape.startswith("(") and kind != "all-reduce":
        arrays = _SHAPE.findall(shape)
        return _bytes(*arrays[1])
    return sum(_bytes(*array) for array in _SHAPE.findall(shape))


def _bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.ceil(math.prod(map(int, filter(None, dimensions.split(",")))) * bits / 8)
