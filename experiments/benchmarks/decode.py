"""A decoding step: with nothing skipped, with layers skipped, with blocks skipped token by token; beside Hugging Face.

    python -m experiments.benchmarks.decode                                        # one GPU, some 5 minutes
    python -m experiments.benchmarks.decode --shapes smollm2-135m --batches 1
    python -m experiments.benchmarks.decode --preset smoke                         # tiny, on CPU

Random weights, 16-bit on a GPU, 512-token prompts, greedy. Ours is the loop of `jaxskip.skipping.generate`: one program
that decodes 128 tokens. Hugging Face's figure is the difference between a long and a short answer. JAX and PyTorch run
in a process of their own, one after the other; what was measured is in measured.json at once, and `--resume` continues.
The floor is reading weights, cache and output matrix once at the rate of a large copy.
"""

import dataclasses

from experiments import cli
from experiments.benchmarks.jax_decode import ROWS, SHAPES
from experiments.benchmarks.measuring import Results, described, measure_in_turn
from experiments.claims import Claim, Report, Table

PEERS = ("transformers, compiled, static cache", "transformers, eager")
_COPY_RATE = {"NVIDIA H200": 4.3e12}
_JAX_SHARE = 0.6  # of the time, when PyTorch runs too
# (shape, batch) -> milliseconds with nothing skipped on one H200.
GOALS = {("llama-1b", 1): 1.0, ("llama-1b", 32): 2.0, ("smollm2-135m", 1): 0.7}
SHARES = {"half of the layers": 0.85, "feed-forward blocks, each token": 0.7}


@dataclasses.dataclass(frozen=True)
class Config:
    """Time of a decoding step."""

    shapes: tuple[str, ...] = ("llama-1b", "smollm2-135m")
    batches: tuple[int, ...] = (1, 32)
    rows: tuple[str, ...] = (*(row for row in ROWS if row not in ("stacked", "unrolled")), *PEERS)
    prompt: int = 512
    tokens: int = 128
    dtype: str = "bfloat16"
    repeats: int = 5
    copy_mb: int = 2000
    seconds: float = 500.0
    """What cannot start within this time is left out, and named."""
    xla_flags: str = ""
    """XLA_FLAGS of the JAX process."""

    def __post_init__(self):
        if unknown := {*self.shapes} - {*SHAPES}:
            raise ValueError(f"shapes: {sorted(unknown)} unknown; choose from {sorted(SHAPES)}")
        if unknown := {*self.rows} - {*ROWS, *PEERS}:
            raise ValueError(f"rows: {sorted(unknown)} unknown; choose from {[*ROWS, *PEERS]}")


PRESETS = {
    "smoke": Config(
        shapes=("tiny",),
        batches=(1, 2),
        prompt=32,
        tokens=8,
        dtype="float32",
        repeats=2,
        copy_mb=8,
        rows=("unrolled, fused", "half of the layers", "feed-forward blocks, each token"),
    ),
    "default": Config(),
    "paper": Config(repeats=20, seconds=1500.0),
}


def main(config: Config, run: cli.Run) -> Report:
    """Measure in one process a framework, then compare."""
    results = Results(run.directory / "measured.json")
    task = {
        name: getattr(config, name) for name in ("shapes", "batches", "prompt", "tokens", "dtype", "repeats", "copy_mb")
    }
    flags = {"XLA_FLAGS": config.xla_flags} if config.xla_flags else {}
    ours, peers = ([row for row in config.rows if row in rows] for rows in (ROWS, PEERS))
    # PyTorch's process imports JAX for shapes alone.
    frameworks = [
        ("jax", "jax_decode", ours, flags),
        ("transformers", "peers.torch_decode", peers, {"JAX_PLATFORMS": "cpu"}),
    ]
    measure_in_turn(results, frameworks, task, config.seconds, _JAX_SHARE)
    return report(config, results)


def report(config: Config, results: Results) -> Report:
    """Table and claims of what was measured."""
    seen = results.framework("jax")
    rate = _COPY_RATE.get(seen["device"], 1e12 * seen["copy_tbps"]) if seen else None
    entries = {
        key: {**entry, "ms": entry["ms"] / entry["tokens"], "least": min(entry["times"]) / entry["tokens"]}
        for key, entry in results.programs().items()
        if key[0] in config.shapes
    }
    return Report(
        claims=_claims(config, entries, results),
        tables={f"a decoding step, {config.dtype}": _table(entries, rate)},
        figures={"decode": _figure(entries, rate)} if entries else {},
        notes=[
            f"median and least of several samples; prompts of {config.prompt} tokens; MB = 2^20 bytes; temporary: what "
            "the program takes beyond weights and cache",
            "share of the bytes: time saved over bytes saved, against the same weights with nothing skipped",
            *([f"XLA_FLAGS={config.xla_flags}"] if config.xla_flags else []),
            *[described(event) for name in ("jax", "transformers") if (event := results.framework(name))],
            *results.missing(),
        ],
    )


def _share(entries: dict, key: tuple[str, str, str]) -> float | None:
    """Time saved over bytes saved."""
    entry = entries[key]
    form = ROWS.get(key[1], ("", ""))[0]
    whole = next((row for row, (lies, skips) in ROWS.items() if (lies, skips) == (form, "nothing")), None)
    plain = entries.get((key[0], whole, key[2]))
    if entry["skips"] == "nothing" or plain is None:
        return None
    return (1 - entry["ms"] / plain["ms"]) / (1 - entry["read_mb"] / plain["read_mb"])


def _table(entries: dict, rate: float | None) -> Table:
    header = ["network", "batch", "row", "ms a step", "least ms", "tokens/s", "read MB", "floor ms", "ms over floor",
              "share of the bytes", "temporary MB"]  # fmt: skip
    rows = []
    for key, entry in sorted(entries.items(), key=lambda item: (item[0][0], int(item[0][2].split()[1]))):
        shape, row, kind = key
        batch = int(kind.split()[1])
        read = entry.get("read_mb")
        floor = read and rate and 1e3 * read * 2**20 / rate
        share = _share(entries, key)
        rows.append(
            [
                shape,
                batch,
                row,
                round(entry["ms"], 3),
                round(entry["least"], 3),
                round(1e3 * batch / entry["ms"]),
                read and round(read, 1),
                floor,
                floor and round(entry["ms"] / floor, 2),
                share and round(share, 2),
                None if entry["mb"] is None else round(entry["mb"], 1),
            ]
        )
    return Table(header, rows)


def _claims(config: Config, entries: dict, results: Results) -> list[Claim]:
    if results.framework("jax").get("device", "cpu") == "cpu":
        return []
    found = []
    for (shape, batch), goal in GOALS.items():
        mine = {row: entry["ms"] for (s, row, kind), entry in entries.items()
                if (s, kind) == (shape, f"batch {batch}") and row in ROWS and entry["skips"] == "nothing"}  # fmt: skip
        if mine:
            best = min(mine, key=mine.__getitem__)
            found.append(
                Claim(
                    f"{shape}, batch {batch}: a step with nothing skipped, on an H200",
                    expected=f"<= {goal} ms",
                    measured=f"{mine[best]:.3f} ms ({best})",
                    holds=mine[best] <= goal,
                    source="ours",
                )
            )
    for (shape, row, kind), _ in entries.items():
        share = _share(entries, (shape, row, kind)) if row in SHARES else None
        if share is not None:
            found.append(
                Claim(
                    f"{shape}, {kind}: skipping {row} saves the time that its bytes promise",
                    expected=f">= {SHARES[row]:.0%}",
                    measured=f"{share:.0%}",
                    holds=share >= SHARES[row],
                    source="ours",
                )
            )
    return found


def _figure(entries: dict, rate: float | None):
    from matplotlib.figure import Figure

    groups = sorted(
        {(shape, kind) for shape, _, kind in entries}, key=lambda group: (group[0], int(group[1].split()[1]))
    )
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(entries)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (shape, kind) in zip(panels, groups, strict=True):
        mine = {row: entry for (s, row, k), entry in entries.items() if (s, k) == (shape, kind)}
        names = list(reversed(mine))
        colors = [
            "#8c8c8c" if row in PEERS else "#4c72b0" if mine[row]["skips"] == "nothing" else "#55a868" for row in names
        ]
        axes.barh(names, [mine[row]["ms"] for row in names], color=colors, height=0.7)
        if rate:
            floors = [(1e3 * mine[row]["read_mb"] * 2**20 / rate, row) for row in names if mine[row].get("read_mb")]
            axes.plot(*zip(*floors, strict=True), "|", color="black", markersize=9)
        axes.set_title(f"{shape}, {kind}; bar: what reading takes", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms a step")
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
