"""One update of every rule in `jaxskip.optim`: time and state, beside Optax's rules and PyTorch's fused AdamW.

    python -m experiments.benchmarks.optimizers                                   # one GPU, about 3 minutes
    python -m experiments.benchmarks.optimizers --rules optax.adamw sophia torch.adamw
    python -m experiments.benchmarks.optimizers --preset smoke                    # tiny, on CPU

An update is a program that takes gradients and donated float32 parameters and state, and applies the updates. A sample
enqueues as many updates as take 50 ms and waits once; all rules are measured in turn, several times, because a GPU's
clock drifts. JAX and PyTorch run in a process of their own, one after the other. What was measured is in measured.json
at once: `--resume` continues a run that was killed. The states of all rules are held at once, 61 GB by default: take
fewer `--rules` on a smaller GPU.

The floor is the least memory traffic of the rule (each array read once and, if it changes, written once; once more for
each sum that must be known first) at the rate of a large copy.
"""

import dataclasses
import statistics
from typing import Literal

from experiments import cli
from experiments.benchmarks.jax_optimizers import RULES
from experiments.benchmarks.measuring import Results, described, measure_in_turn
from experiments.claims import Claim, Report, Table

TORCH_RULES = ("torch.adamw",)
_PEERS = ("optax.adamw", "optax.lion", "optax.sgd", *TORCH_RULES)
# Bytes a second of the best copy seen there; elsewhere the rate that JAX reaches in the run.
_COPY_RATE = {"NVIDIA H200": 4.3e12}
_LARGEST_RATIO = 1.25
_JAX_SHARE = 0.85  # of the time, when PyTorch runs too


@dataclasses.dataclass(frozen=True)
class Config:
    """Time of one update and bytes of state of every update rule."""

    model: Literal["gpt2-tiny", "gpt2-small", "gpt2-medium", "gpt2-large"] = "gpt2-medium"
    """Whose parameters are updated."""
    rules: tuple[str, ...] = (*RULES, *TORCH_RULES)
    repeats: int = 5
    """Samples a turn."""
    turns: int = 3
    copy_mb: int = 2000
    """Size of the copy that tells the memory's rate."""
    seconds: float = 240.0
    """What cannot start within this time is left out, and named."""

    def __post_init__(self):
        unknown = set(self.rules) - {*RULES, *TORCH_RULES}
        if unknown:
            raise ValueError(f"rules: {sorted(unknown)} unknown; choose from {[*RULES, *TORCH_RULES]}")


PRESETS = {
    "smoke": Config(
        model="gpt2-tiny",
        rules=("optax.adamw", "sophia", "diffgrad", "lion_clip", "torch.adamw"),
        repeats=2,
        turns=2,
        copy_mb=8,
    ),
    "default": Config(),
    "paper": Config(repeats=10, turns=5, seconds=600.0),
}


def main(config: Config, run: cli.Run) -> Report:
    """Measure in one process a framework, then compare."""
    results = Results(run.directory / "measured.json")
    task = {name: getattr(config, name) for name in ("model", "repeats", "turns", "copy_mb")}
    ours, peers = ([name for name in config.rules if name in rules] for rules in (RULES, TORCH_RULES))
    # PyTorch's process asks JAX for shapes alone.
    frameworks = [
        ("jax", "jax_optimizers", ours, {}),
        ("torch", "peers.torch_optimizers", peers, {"JAX_PLATFORMS": "cpu"}),
    ]
    measure_in_turn(results, frameworks, task, config.seconds, _JAX_SHARE)
    return report(config, results)


def report(config: Config, results: Results) -> Report:
    """Table, claims and figure of what was measured."""
    rows = {row: entry for (model, row, _), entry in results.programs().items() if model == config.model}
    rate = _copy_rate(results)
    samples = max((len(entry["times"]) for entry in rows.values()), default=0)
    return Report(
        claims=_claims(results, rows),
        tables={f"one update, {config.model}, float32": _table(rows, rate)},
        figures={"optimizers": _figure(rows, rate, config)} if rows else {},
        notes=[
            f"median and least of up to {samples} samples of at least 50 ms; MB = 2^20 bytes; temporary: beyond "
            "parameters, gradients and state",
            "least traffic: each array read once and, if it changes, written once; once more for each sum or threshold "
            "that must be known before an array can change. The floor is its time at "
            + (f"{rate / 1e12:.3g} TB/s" if rate else "the rate of a copy"),
            "of AdamW's rate: time a byte of least traffic, over that of optax.adamw",
            "*_clip: method 'ema', whose threshold follows from update to update; sophia_refresh: the moving average "
            "of the curvature, on every 10th step; fira_refresh: two rounds of subspace iteration, every 200 steps",
            *[described(event) for name in ("jax", "torch") if (event := results.framework(name))],
            *results.missing(),
        ],
    )


def _copy_rate(results: Results) -> float | None:
    """Bytes a second of the device's memory."""
    seen = results.framework("jax") or results.framework("torch")
    return _COPY_RATE.get(seen["device"], 1e12 * seen["copy_tbps"]) if seen else None


def _over_adamw(rows: dict, name: str) -> float | None:
    """Time a byte of least traffic, over optax.adamw's."""
    if "optax.adamw" not in rows or not rows[name]["least_mb"]:
        return None
    per_byte, of_adamw = (rows[row]["ms"] / rows[row]["least_mb"] for row in (name, "optax.adamw"))
    return per_byte / of_adamw


def _table(rows: dict, rate: float | None) -> Table:
    header = [
        "rule",
        "bound by",
        "ms",
        "least ms",
        "over torch.adamw",
        "state MB",
        "temporary MB",
        "least traffic MB",
        "floor ms",
        "ms over floor",
        "of AdamW's rate",
    ]
    torch = rows.get("torch.adamw")
    body = []
    for name, entry in rows.items():
        floor = rate and 1e3 * entry["least_mb"] * 2**20 / rate
        ratio = _over_adamw(rows, name)
        body.append(
            [
                name,
                entry["bound"],
                round(entry["ms"], 3),
                round(min(entry["times"]), 3),
                torch and round(entry["ms"] / torch["ms"], 3),
                round(entry["state_mb"], 1),
                None if entry["mb"] is None else round(entry["mb"], 1),
                round(entry["least_mb"], 1),
                floor and round(floor, 3),
                floor and round(entry["ms"] / floor, 2),
                ratio and round(ratio, 3),
            ]
        )
    return Table(header, body)


def _claims(results: Results, rows: dict) -> list[Claim]:
    """On a GPU: each elementwise rule of ours needs little more time than its traffic costs AdamW's kernel."""
    if results.framework("jax").get("device", "cpu") == "cpu":
        return []
    found = []
    for name, entry in rows.items():
        ratio = _over_adamw(rows, name)
        if name not in _PEERS and entry["bound"] == "elementwise" and ratio is not None:
            found.append(
                Claim(
                    f"{name}: at most {_LARGEST_RATIO} times the time that its traffic costs optax.adamw",
                    expected=f"<= {_LARGEST_RATIO}",
                    measured=round(ratio, 3),
                    holds=ratio <= _LARGEST_RATIO,
                    source="ours",
                )
            )
    return found


def _figure(rows: dict, rate: float | None, config: Config):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(rows))
    colors = ["#8c8c8c" if name in _PEERS else "#c44e52" for name in names]
    axes.barh(names, [rows[name]["ms"] for name in names], color=colors, height=0.7)
    if rate:
        floors = [1e3 * rows[name]["least_mb"] * 2**20 / rate for name in names]
        axes.plot(floors, names, "|", color="black", markersize=9, label="least traffic at the rate of a copy")
        axes.legend(frameon=False, fontsize=8)
    longest = sorted(rows[name]["ms"] for name in names)
    if longest[-1] > 10 * statistics.median(longest):
        axes.set_xscale("log")
    axes.set(xlabel="ms an update", title=f"One update of {config.model}'s parameters, float32")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
