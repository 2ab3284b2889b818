"""Attention that skips: as fast as cuDNN's with nothing skipped, and the time falls with what is skipped.

    python -m experiments.benchmarks.skip_attention                   # one GPU, under a minute
    python -m experiments.benchmarks.skip_attention --preset smoke    # tiny, on CPU

Sequences: normal numbers, causal; a share of the 128 x 128 blocks of the triangle is left out at random, another choice
for each head, the choice an argument of the program (its lists are made on the device, inside the time). Work is
counted as 4 d for each kept pair of a query and a key, times 3.5 with the backward pass. Decoding: one token a sequence
over a full cache, of which some sequences skip the layer; the floor reads the others' keys and values once at the rate
of a large copy.
"""

import dataclasses

from experiments import cli
from experiments.benchmarks.measuring import Results, described, measure_in_turn
from experiments.claims import Claim, Report, Table

ROWS = ("ours", "cudnn", "tokamax", "xla")
_COPY_RATE = {"NVIDIA H200": 4.3e12}
_OF_CUDNN = 0.9
_OF_THE_SHARE = 0.85  # with a share s skipped: at most (1 - s) / this of the dense time
_DECODE_SLACK = 0.1  # of the time with all sequences, over their share


@dataclasses.dataclass(frozen=True)
class Config:
    """Time of attention with blocks and sequences left out."""

    rows: tuple[str, ...] = ("ours", "cudnn", "tokamax")
    sequences: tuple[int, int, int, int] = (4, 8192, 16, 128)
    """Batch, tokens, heads, head width."""
    skipped: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    decode: tuple[int, ...] = (64, 8192, 8, 32, 128)
    """Batch, slots, key/value heads, query heads, head width; empty leaves decoding out."""
    active: tuple[float, ...] = (1.0, 0.5, 0.25)
    dtype: str = "bfloat16"
    repeats: int = 5
    turns: int = 2
    copy_mb: int = 1000
    seconds: float = 50.0
    """What cannot start within this time is left out, and named."""

    def __post_init__(self):
        if unknown := {*self.rows} - {*ROWS}:
            raise ValueError(f"rows: {sorted(unknown)} unknown; choose from {list(ROWS)}")


PRESETS = {
    "smoke": Config(
        rows=("ours", "xla"),
        sequences=(1, 1024, 2, 64),
        decode=(4, 256, 2, 4, 64),
        dtype="float32",
        repeats=2,
        turns=1,
        copy_mb=8,
    ),
    "default": Config(),
    "paper": Config(repeats=20, seconds=600.0),
}


def main(config: Config, run: cli.Run) -> Report:
    """Measure in a process of its own, then compare."""
    results = Results(run.directory / "measured.json")
    names = ("sequences", "skipped", "decode", "active", "dtype", "repeats", "turns", "copy_mb")
    task = {name: getattr(config, name) for name in names}
    measure_in_turn(results, [("jax", "jax_skip_attention", config.rows, {})], task, config.seconds, 1.0)
    return report(config, results)


def report(config: Config, results: Results) -> Report:
    """Tables and claims of what was measured."""
    programs, seen = results.programs(), results.framework("jax")
    rate = _COPY_RATE.get(seen["device"], 1e12 * seen["copy_tbps"]) if seen else None
    batch, length, heads, width = config.sequences
    title = f"sequences: batch {batch}, {length} tokens, {heads} heads of {width}, {config.dtype}"
    return Report(
        claims=_claims(programs, seen.get("device", "cpu")),
        tables={
            title: _sequences(programs),
            f"decoding: (batch, slots, key heads, query heads, width) = {config.decode}": _decoding(programs, rate),
        },
        figures={"skip_attention": _figure(programs)} if programs else {},
        notes=[
            f"median of up to {config.repeats * config.turns} samples of at least 50 ms; MB = 2^20 bytes",
            "error: largest difference from float32 arithmetic in 32 rows of the first sequence",
            *([described(seen)] if seen else []),
            *results.missing(),
        ],
    )


def _sequences(programs: dict) -> Table:
    header = ["row", "program", "ms", "least ms", "TFLOP/s on kept work", "of the dense time", "temporary MB", "error"]
    rows = []
    for (shape, row, kind), entry in programs.items():
        if shape == "sequences":
            rate = entry["flops"] / entry["ms"] / 1e9
            ratio = _of_dense(programs, row, kind)
            least = min(entry["times"])
            found = [row, kind, round(entry["ms"], 3), round(least, 3), round(rate, 1), ratio and round(ratio, 3)]
            rows.append([*found, round(entry["mb"], 1), entry.get("error")])
    return Table(header, rows)


def _of_dense(programs: dict, row: str, kind: str) -> float | None:
    """The time over that of the same program with nothing skipped."""
    entry = programs["sequences", row, kind]
    dense = programs.get(("sequences", row, kind.replace(f"{entry['share']:.0%} of the blocks skipped, ", "")))
    return entry["ms"] / dense["ms"] if entry["share"] and dense else None


def _decoding(programs: dict, rate: float | None) -> Table:
    header = ["row", "active", "ms", "least ms", "read MB", "floor ms", "over the floor", "of the time with all"]
    rows = []
    for (shape, row, kind), entry in programs.items():
        if shape == "decode":
            floor = 1e3 * entry["read_mb"] * 2**20 / rate if rate else None
            whole = programs.get(("decode", row, "100% of the sequences"))
            found = [row, kind, round(entry["ms"], 4), round(min(entry["times"]), 4), round(entry["read_mb"], 1), floor]
            rows.append(
                [*found, floor and round(entry["ms"] / floor, 2), whole and round(entry["ms"] / whole["ms"], 3)]
            )
    return Table(header, rows)


def _claims(programs: dict, device: str) -> list[Claim]:
    if device == "cpu":
        return []
    found = []
    for what in ("forward", "forward + backward"):
        ours, peer = (programs.get(("sequences", row, f"causal, {what}")) for row in ("ours", "cudnn"))
        if ours and peer:
            ratio = peer["ms"] / ours["ms"]
            rates = [entry["flops"] / entry["ms"] / 1e9 for entry in (ours, peer)]
            found.append(
                Claim(
                    f"{what}, causal, nothing skipped: the speed beside cuDNN's",
                    expected=f">= {_OF_CUDNN}",
                    measured=f"{ratio:.3f} ({rates[0]:.0f} of {rates[1]:.0f} TFLOP/s)",
                    holds=ratio >= _OF_CUDNN,
                    source="ours",
                )
            )
    for (shape, row, kind), entry in programs.items():
        ratio = _of_dense(programs, row, kind) if shape == "sequences" else None
        if ratio is not None:
            bound = (1 - entry["share"]) / _OF_THE_SHARE
            found.append(
                Claim(
                    f"{kind}: the time falls with the work",
                    expected=f"<= {bound:.3f} of the dense time",
                    measured=f"{ratio:.3f}",
                    holds=ratio <= bound,
                    source="ours",
                )
            )
    whole = programs.get(("decode", "ours", "100% of the sequences"))
    for (shape, row, kind), entry in programs.items():
        if (shape, row) == ("decode", "ours") and whole and entry["share"] < 1:
            ratio, bound = entry["ms"] / whole["ms"], entry["share"] + _DECODE_SLACK
            found.append(
                Claim(
                    f"decoding, {kind} active: the time falls with the bytes",
                    expected=f"<= {bound:.2f} of the time with all",
                    measured=f"{ratio:.3f}",
                    holds=ratio <= bound,
                    source="ours",
                )
            )
    return found


def _figure(programs: dict):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for what, color in (("forward", "#4c72b0"), ("forward + backward", "#c44e52")):
        points = sorted(
            (1 - entry["share"], _of_dense(programs, row, kind) or 1.0)
            for (shape, row, kind), entry in programs.items()
            if (shape, row) == ("sequences", "ours") and kind.startswith("causal") and kind.endswith(f", {what}")
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=what)
    axes.plot([0, 1], [0, 1], "--", color="#8c8c8c", label="the work")
    axes.set(
        xlabel="share of the blocks that is kept", ylabel="share of the dense time", xlim=(0, 1.05), ylim=(0, None)
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
