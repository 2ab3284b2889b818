"""What benchmarks share: processes that measure one framework each, times, and a file that keeps them.

What was measured is an event: a JSON object a line from the measuring process, one of

    {"framework": "jax", "device": "NVIDIA H200", ...}            what the process runs on, and its best rate
    {"shape": ..., "row": ..., "kind": ..., "times": [ms], ...}   samples of one program, and facts about it
    {"shape": ..., "row": ..., "kind": ..., "mean": ..., "var": ...}     mean absolute value and variance of an error
    {"shape": ..., "row": ..., "kind": ..., "missing": "why"}     a program that was left out
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from experiments import claims

_CHAIN_SECONDS = 0.05
OUT_OF_TIME = "out of time (--seconds)"


@dataclasses.dataclass(frozen=True)
class Program:
    """One thing to time. ``build`` compiles it and gives (call, MB beyond the inputs or None)."""

    row: str
    kind: str
    build: Callable[[], tuple[Callable[[], Any], float | None]]


def emit(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def milliseconds(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> list[float]:
    """Time of a call in each of ``repeats`` samples; short calls are enqueued several at a time."""
    wait(call())
    begin = time.perf_counter()
    wait(call())
    chained = max(1, math.ceil(_CHAIN_SECONDS / (time.perf_counter() - begin)))
    times = []
    for _ in range(repeats):
        out, begin = None, time.perf_counter()
        for _ in range(chained):
            out = call()
        wait(out)
        times.append(1e3 * (time.perf_counter() - begin) / chained)
    return times


def jax_copy_rate(mb: int) -> dict[str, float]:
    """TB/s, read and written, of copying an array in JAX."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((mb, 2**18), jnp.float32)
    copy = jax.jit(jnp.copy)
    times = milliseconds(lambda: copy(x), jax.block_until_ready, 5)
    return {"copy_mb": mb, "copy_tbps": 2 * x.nbytes / statistics.median(times) / 1e9}


def jax_one_at_a_time(call: Callable[[], Any]) -> Callable[[], Any]:
    """Waits for each call on the CPU, whose virtual devices share threads: a run that devices begin before the run
    before has ended can take the threads that this one waits for.
    """
    import jax

    return (lambda: jax.block_until_ready(call())) if jax.default_backend() == "cpu" else call


def compiled_together(lower: Mapping[Hashable, Callable[[], Any]]) -> Callable[[Hashable], Any]:
    """key -> its compiled program; the first that is asked for waits until all are there, so that none is timed beside
    a compiler.

    The first is compiled alone: the others take over the kernels that XLA chose there for operations of equal shape.
    """

    @functools.cache
    def programs() -> dict[Hashable, concurrent.futures.Future]:
        found: dict[Hashable, concurrent.futures.Future] = {}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for key, lowering in lower.items():
                try:
                    found[key] = pool.submit(lowering().compile)
                except Exception as error:  # is raised again where the program is asked for
                    found[key] = concurrent.futures.Future()
                    found[key].set_exception(error)
                if len(found) == 1:
                    concurrent.futures.wait(found.values())
        return found

    return lambda key: programs()[key].result()


def in_turns(
    task: dict,
    shape: str,
    programs: Sequence[Program],
    wait: Callable,
    facts: Callable[[Program, Any], dict],
    turns: int = 2,
) -> None:
    """Build and time each program, then time all of them again, turn by turn; an event for every time."""
    done = [tuple(key) for key in task["done"]]
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for program in programs:
        name = {"shape": shape, "row": program.row, "kind": program.kind}
        if tuple(name.values()) in done:
            continue
        if time.time() > task["deadline"]:
            emit(**name, missing=OUT_OF_TIME)
            continue
        try:
            call, mb = program.build()
            emit(**name, mb=mb, **facts(program, call()), times=milliseconds(call, wait, task["repeats"]))
        except Exception as error:  # a peer that fails must not take the others' figures along
            emit(**name, missing=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        calls[program.row, program.kind] = call
    for _ in range(turns - 1):
        for (row, kind), call in calls.items():
            if time.time() < task["deadline"]:
                emit(shape=shape, row=row, kind=kind, times=milliseconds(call, wait, task["repeats"]))


def in_a_process(
    framework: str, module: str, task: Mapping[str, Any], environment: Mapping[str, str] = {}
) -> Iterator[dict]:
    """The events of ``measure(task)`` of a module in a process of its own; that it failed is an event too."""
    if importlib.util.find_spec(framework) is None:
        missing = f"{framework} is not installed"
        yield from ({"shape": "", "row": row, "kind": "", "missing": missing} for row in task["names"])
        return
    code = f"import sys; from experiments.benchmarks.{module} import measure; measure(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(task)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        for line in process.stdout or ():
            if line.startswith('{"'):
                yield json.loads(line)
            else:
                print(line, end="")
    if process.returncode:
        why = f"it ended with exit code {process.returncode}; its output is above"
        yield {"shape": "", "row": f"the {framework} process", "kind": "", "missing": why}


def measure_in_turn(
    results: "Results",
    frameworks: Sequence[tuple[str, str, Sequence[str], Mapping[str, str]]],
    task: Mapping[str, Any],
    seconds: float,
    first_share: float,
) -> None:
    """Measure (framework, module, rows, environment) one after the other, each in a process of its own.

    What cannot start within ``seconds`` is left out; the first has ``first_share`` of them where others follow.
    """
    begin = time.time()
    asked = [framework for framework in frameworks if framework[2]]
    for number, (framework, module, rows, environment) in enumerate(asked):
        share = first_share if number == 0 and len(asked) > 1 else 1.0
        details = {**task, "names": list(rows), "deadline": begin + share * seconds, "done": list(results.programs())}
        # Two processes on one GPU must not reserve each other's memory.
        for event in in_a_process(
            framework, module, details, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment}
        ):
            results.add(event)


class Results:
    """What was measured so far: in memory, and in a file that is rewritten with every event."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.events: list[dict] = [event for event in stored if "missing" not in event]  # a resumed run tries again

    def add(self, event: dict) -> None:
        self.events.append(event)
        claims.write_atomic(self._path, json.dumps(self.events, indent=1) + "\n")
        print(described(event), flush=True)

    def programs(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """(shape, row, kind) -> "ms" (median), "times" and the facts of what was timed."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for event in self.events:
            if "times" in event:
                entry = found.setdefault((event["shape"], event["row"], event["kind"]), {})
                times = [*entry.get("times", []), *event["times"]]
                entry |= {**event, "times": times, "ms": statistics.median(times)}
        return found

    def missing(self) -> list[str]:
        """A line for each thing that was asked for and is not there."""
        return list(dict.fromkeys(described(event) for event in self.events if "missing" in event))

    def framework(self, name: str) -> dict[str, Any]:
        """Device and best rate, as seen by the framework's process."""
        return next((event for event in self.events if event.get("framework") == name), {})


def described(event: dict) -> str:
    """An event in one line of English."""
    if "framework" in event:
        seen = f"{event['framework']} on {event['device']}"
        if "tflops" in event:
            return f"{seen}: one bf16 product of {event['size']}^3 at {event['tflops']:.3g} TFLOP/s"
        return f"{seen}: a copy of {event['copy_mb']:.0f} MB at {event['copy_tbps']:.3g} TB/s, read and written"
    name = " ".join(filter(None, (event["shape"], event["row"], event["kind"])))
    if "missing" in event:
        return f"{name}: left out, {event['missing']}"
    if "mean" in event:
        return f"{name}: off by {event['mean']:.3g} on average, variance {event['var']:.3g}"
    memory = f", {event['mb']:.1f} MB" if event.get("mb") is not None else ""
    return f"{name}: {statistics.median(event['times']):.3f} ms{memory}"
