"""The group-rational activation: time, bytes a second, memory and rounding of each implementation, and of FlashKAT's.

    python -m experiments.benchmarks.group_rational                                   # one GPU, some 2 minutes
    python -m experiments.benchmarks.group_rational --rows mosaic_gpu "mosaic_gpu 12x256" "mosaic_gpu 32x256"
    python -m experiments.benchmarks.group_rational --preset smoke                    # tiny, on CPU

The shape is that of KAT-B's first activation, 1024 pictures of 197 tokens. The floor is reading the inputs and writing
the results once at the rate of a large copy. A row is an implementation, with tiles of its own if named. Rounding: the
coefficients' gradients in float32 against float64, beside the same terms added in the order of KAT's kernel (one by
one) and of FlashKAT's (blocks of 64 rows). FlashKAT itself runs where its folder `rational_kat` and PyTorch are
importable. What was measured is in measured.json at once, and `--resume` continues.
"""

import dataclasses

from experiments import cli
from experiments.benchmarks.jax_group_rational import IMPLEMENTATIONS, least_bytes, sizes
from experiments.benchmarks.measuring import Results, described, measure_in_turn
from experiments.claims import Claim, Report, Table

PEERS = ("KAT", "FlashKAT")
_COPY_RATE = {"NVIDIA H200": 4.3e12}
_REACH = 1.3
# Milliseconds forward and backward at 1024x197x768 with 8 groups on an H200, by FlashKAT's repository at adb7aee.
_ANCHORS = {
    ("KAT", "float32"): (0.53, 1205.6),
    ("FlashKAT", "float32"): (0.78, 2.13),
    ("FlashKAT", "bfloat16"): (0.77, 2.42),
}
# Mean absolute error and variance of (dA, dB) in the paper's table; it does not say of which inputs.
_PAPER = {
    "KAT, in the paper": ((8.84e-2, 1.45e-2), (9.63e-2, 8.11e-2)),
    "FlashKAT, in the paper": ((8.42e-4, 1.35e-6), (9.81e-4, 1.11e-5)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Time and rounding of the group-rational activation."""

    shapes: tuple[str, ...] = ("1024x197x768",)
    groups: int = 8
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rows: tuple[str, ...] = ("mosaic_gpu", "chunked", "reference", *PEERS)
    rounding: str = "64x197x768"
    """The shape at which rounding is measured."""
    repeats: int = 10
    copy_mb: int = 2000
    seconds: float = 300.0
    """What cannot start within this time is left out, and named."""

    def __post_init__(self):
        names = {row.split()[0] for row in self.rows}
        if unknown := names - {*IMPLEMENTATIONS, *PEERS}:
            raise ValueError(f"rows: {sorted(unknown)} unknown; choose from {[*IMPLEMENTATIONS, *PEERS]}")
        if wrong := [shape for shape in (*self.shapes, self.rounding) if sizes(shape)[-1] % self.groups]:
            raise ValueError(f"shapes: the channels of {wrong} do not split into {self.groups} groups")


PRESETS = {
    "smoke": Config(shapes=("4x7x48",), rounding="16x197x96", rows=("chunked", "reference"), repeats=2, copy_mb=8),
    "default": Config(),
    "paper": Config(shapes=("1024x197x768", "1024x197x3072"), repeats=20, seconds=900.0),
}


def main(config: Config, run: cli.Run) -> Report:
    """Measure in one process a framework, then compare."""
    results = Results(run.directory / "measured.json")
    task = {name: getattr(config, name) for name in ("shapes", "groups", "dtypes", "repeats", "copy_mb", "rounding")}
    ours, peers = ([row for row in config.rows if (row in PEERS) is peer] for peer in (False, True))
    frameworks = [
        ("jax", "jax_group_rational", ours, {}),
        ("rational_kat", "peers.torch_group_rational", peers, {"JAX_PLATFORMS": "cpu"}),
    ]
    measure_in_turn(results, frameworks, task, config.seconds, 0.7)
    return report(config, results)


def report(config: Config, results: Results) -> Report:
    """Tables and claims of what was measured."""
    seen = results.framework("jax")
    rate = _COPY_RATE.get(seen["device"], 1e12 * seen["copy_tbps"]) if seen else None
    entries = {key: entry for key, entry in results.programs().items() if key[0] in config.shapes}
    for (shape, _, kind), entry in entries.items():
        entry["bytes"] = least_bytes(shape, *kind.split())
        entry["floor"] = rate and 1e3 * entry["bytes"] / rate
    errors = {
        (event["row"], event["kind"].removeprefix("rounding ")): (event["mean"], event["var"])
        for event in results.events
        if "mean" in event
    }
    anchors = [f"{name} {dtype} {forward} / {backward} ms" for (name, dtype), (forward, backward) in _ANCHORS.items()]
    return Report(
        claims=[*_speed(config, seen, entries), *_rounding(config, errors)],
        tables={
            "group rational, milliseconds": _times(entries),
            f"rounding of the coefficients' gradients at {config.rounding}, float32": _errors(errors),
        },
        figures={"group_rational": _figure(entries)} if entries else {},
        notes=[
            f"median and least of several samples; {config.groups} groups; MB = 2^20 bytes; temporary: what the "
            "program takes beyond inputs and results",
            f"for comparison, forward / backward at 1024x197x768 on an H200 (FlashKAT's repository at adb7aee): "
            f"{'; '.join(anchors)}",
            "the paper's rounding errors (arXiv:2505.13813) are of inputs it does not name",
            *[described(event) for name in ("jax", "rational_kat") if (event := results.framework(name))],
            *results.missing(),
        ],
    )


def _times(entries: dict) -> Table:
    header = [
        "shape",
        "dtype",
        "direction",
        "row",
        "ms",
        "least ms",
        "GB/s",
        "floor ms",
        "ms over floor",
        "temporary MB",
    ]
    rows = []
    for (shape, row, kind), entry in sorted(entries.items(), key=lambda item: (item[0][0], item[0][2])):
        rows.append(
            [
                shape,
                *kind.split(),
                row,
                round(entry["ms"], 4),
                round(min(entry["times"]), 4),
                round(entry["bytes"] / entry["ms"] / 1e6),
                entry["floor"] and round(entry["floor"], 4),
                entry["floor"] and round(entry["ms"] / entry["floor"], 3),
                None if entry["mb"] is None else round(entry["mb"], 1),
            ]
        )
    return Table(header, rows)


def _errors(errors: dict) -> Table:
    rows = {row: (errors[row, "dA"], errors[row, "dB"]) for row, kind in errors if kind == "dA"} | _PAPER
    return Table(
        ["order", "dA mean |error|", "dA variance", "dB mean |error|", "dB variance"],
        [[name, *(float(f"{value:.3g}") for pair in pairs for value in pair)] for name, pairs in rows.items()],
    )


def _speed(config: Config, seen: dict, entries: dict) -> list[Claim]:
    """Goals are a GPU's: what a CPU's caches hold is not read from memory."""
    if seen.get("device", "cpu") == "cpu":
        return []
    found = []
    for shape in config.shapes:
        for kind in (f"{dtype} {direction}" for dtype in config.dtypes for direction in ("forward", "backward")):
            mine = {row: e for (s, row, k), e in entries.items() if (s, k) == (shape, kind) and row not in PEERS}
            if mine:
                best = min(mine, key=lambda row: mine[row]["ms"])
                ratio = mine[best]["ms"] / mine[best]["floor"]
                statement = f"{shape}, {kind}: within {_REACH} times of the floor"
                measured = f"{ratio:.2f} ({mine[best]['ms']:.3f} ms, {best})"
                found.append(Claim(statement, f"<= {_REACH}", measured, ratio <= _REACH, "ours"))
    return found


def _rounding(config: Config, errors: dict) -> list[Claim]:
    found = []
    for row in config.rows:
        for name in ("dA", "dB"):
            if (row, name) in errors:
                mine, theirs, worst = (errors[r, name][0] for r in (row, "FlashKAT's order", "KAT's order"))
                statement = f"{row}: {name} is rounded at most as much as in FlashKAT's order of adding"
                measured = f"{mine:.2e} against {theirs:.2e}; KAT's order {worst:.2e}"
                found.append(Claim(statement, f"<= {theirs:.2e}", measured, mine <= theirs, "arXiv:2505.13813"))
    return found


def _figure(entries: dict):
    from matplotlib.figure import Figure

    groups = sorted({(shape, kind) for shape, _, kind in entries})
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(entries)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (shape, kind) in zip(panels, groups, strict=True):
        mine = {row: entry for (s, row, k), entry in entries.items() if (s, k) == (shape, kind)}
        names = list(reversed(mine))
        axes.barh(names, [mine[row]["ms"] for row in names], color="#4c72b0", height=0.7)
        if floor := next(iter(mine.values()))["floor"]:
            axes.axvline(floor, color="black", linewidth=1)
        axes.set_title(f"{shape}, {kind}; line: what moving the bytes takes", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms")
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
