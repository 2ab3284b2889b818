"""Training, SkipPipe and cross-entropy on all GPUs of one host, against one of them, in one run.

    python -m experiments.benchmarks.multi_device --devices 2                      # two GPUs, some three minutes
    python -m experiments.benchmarks.multi_device --devices 8 --parts pipeline
    python -m experiments.benchmarks.multi_device --devices 8 --preset smoke       # tiny; on virtual CPU devices too

Without a GPU the measuring process makes itself as many CPU devices as are asked for: they share the cores, so that
only what is computed is compared there, not how fast. What was measured is in measured.json at once, and `--resume`
continues.

Training: the loop's step for GPT-2 medium, with the devices along one axis of the mesh. Strong: all devices share the
rows that one device has; weak: each has as many. Efficiency: tokens/s of a device over those of one device alone.

Pipeline: SkipPipe's executor on a decoder, one stage a device. Two predictions, from times of single operations and
messages: that of `jaxskip.pipeline.simulate`, where a node goes on as soon as it can, and that of the executor's table,
where nodes that exchange messages in a tick end it together. Neither counts the sum over a stage's replicas nor what a
tick itself costs.
"""

import dataclasses
import os
from typing import Literal

import numpy as np

from experiments import cli
from experiments.benchmarks.measuring import Results, described, measure_in_turn
from experiments.claims import Claim, Report, Table
from jaxskip import pipeline
from jaxskip.pipeline import table

Part = Literal["training", "cross-entropy", "pipeline"]
ONE = "one device"
EFFICIENCY = 0.9
WITHIN = 0.15
OF_THE_GAIN = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
    """Time of a step on several devices."""

    devices: Literal[2, 4, 8] = 8
    parts: tuple[Part, ...] = ("training", "pipeline", "cross-entropy")
    model: Literal["gpt2-tiny", "gpt2-small", "gpt2-medium", "gpt2-large"] = "gpt2-medium"
    rows: int = 32
    """Sequences of one device in training."""
    dtype: str = "bfloat16"
    scan_unroll: int = 24
    loss_rows: int | None = 16384
    pipeline_layers: int = 24
    """A multiple of 2, 3 and 4, the numbers of stages."""
    pipeline_width: int = 1024
    pipeline_heads: int = 16
    pipeline_context: int = 1024
    pipeline_vocabulary: int = 8192
    pipeline_rows: int = 8
    """Sequences of a microbatch."""
    microbatches: int = 12
    """A multiple of 12, so that each origin, each choice of stages and each node has the same number of them."""
    cross_entropy: tuple[int, int, int] = (8192, 256_000, 2304)
    """Tokens, vocabulary and width."""
    repeats: int = 4
    copy_mb: int = 2000
    seconds: float = 300.0
    """What cannot start within this time is left out, and named."""


PRESETS = {
    "smoke": Config(
        model="gpt2-tiny",
        rows=8,
        dtype="float32",
        scan_unroll=1,
        loss_rows=None,
        pipeline_layers=12,
        pipeline_width=32,
        pipeline_heads=2,
        pipeline_context=16,
        pipeline_vocabulary=64,
        pipeline_rows=2,
        cross_entropy=(128, 512, 32),
        repeats=2,
        copy_mb=8,
        seconds=3600.0,
    ),
    "default": Config(),
    "paper": Config(repeats=20, seconds=1500.0),
}


def main(config: Config, run: cli.Run) -> Report:
    """Measure in one process, then compare."""
    results = Results(run.directory / "measured.json")
    task = {name: getattr(config, name) for name in ("devices", "microbatches", "cross_entropy", "repeats", "copy_mb")}
    task["training"] = {"model": config.model, "batch_size": config.rows, "dtype": config.dtype,
                        "scan_unroll": config.scan_unroll, "loss_rows": config.loss_rows}  # fmt: skip
    task["pipeline"] = {
        "vocab_size": config.pipeline_vocabulary,
        "context_length": config.pipeline_context,
        "num_layers": config.pipeline_layers,
        "num_heads": config.pipeline_heads,
        "embed_dim": config.pipeline_width,
    }
    task["pipeline_rows"] = config.pipeline_rows
    # Where gradients are compared with one device's to 1e-5; 16-bit ones cannot be.
    task["exact"] = {"vocab_size": 64, "context_length": 32, "num_layers": 12, "num_heads": 2, "embed_dim": 64}
    # One process has all of the GPUs: memory in one piece does not break up between programs of different size.
    # A dozen programs are compiled: with products as cuBLAS chooses them, instead of by trying, in seconds each.
    by_cublas = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {by_cublas}".strip()
    environment = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.85", "XLA_FLAGS": flags
    }  # fmt: skip
    frameworks = [("jax", "jax_multi_device", config.parts, environment)]
    measure_in_turn(results, frameworks, task, config.seconds, 1.0)
    seen = results.framework("jax")
    if seen and seen["machine"]["count"] < config.devices:
        raise cli.UserError(
            f"--devices {config.devices}, but {seen['machine']['count']} {seen['device']} attached; ask for as many or "
            "fewer, or take virtual devices of the CPU with JAX_PLATFORMS=cpu"
        )
    return report(config, results)


def report(config: Config, results: Results) -> Report:
    """Tables and claims of what was measured."""
    seen = results.framework("jax")
    entries = results.programs()
    training, cross_entropy, costs, timed, exact = (
        {key[1:]: entry for key, entry in entries.items() if key[0] == shape}
        for shape in ("training", "cross-entropy", "pipeline costs", "pipeline", "pipeline in float32")
    )
    efficiency = _efficiency(training, config.devices)
    predicted = {key: predict(entry, key[1], costs) for key, entry in timed.items() if _costed(entry, costs)}
    # In 16 bits both sides are rounded, and so is what each device adds to a sum: 2^-8 twice.
    bound = 1e-5 if config.dtype == "float32" else 2.0**-7
    claims = _equalities(training, cross_entropy, exact or timed, bound)
    if seen.get("machine", {}).get("platform", "cpu") != "cpu":
        claims += _speed_claims(config.devices, efficiency, timed, predicted)
    tables = {
        f"training step, {config.model}, {config.dtype}": _training_table(training, efficiency),
        "collectives": _collectives_table(training, cross_entropy),
        f"pipeline, {config.dtype}": _pipeline_table(timed, predicted, exact, config.devices),
        "one operation of the pipeline": _costs_table(costs),
        f"cross-entropy, {config.dtype}": _cross_entropy_table(cross_entropy),
    }
    figures = {"scaling": _figure(efficiency, timed, predicted)} if efficiency or predicted else {}
    if predicted:
        (row, order), shown = list(predicted.items())[-1]
        labels = [f"{node}, stage {stage}" for node, stage in enumerate(_topology(timed[row, order]).stage_of)]
        figures["timeline"] = pipeline.plot_timeline(shown.simulation, labels=labels)
    return Report(
        claims=claims,
        tables={name: content for name, content in tables.items() if content.rows},
        figures=figures,
        notes=[
            f"{config.devices} devices of one host and process; medians; MB = 2^20 bytes, of one device; rates of "
            "virtual CPU devices, which share the cores, say nothing",
            "efficiency: tokens/s of a device over those of one device alone; on GPUs products are as cuBLAS chooses "
            "them",
            "pipeline: loss and gradients, without an optimizer; simulated: jaxskip.pipeline.simulate, which takes "
            "work as it comes (gpipe: with memory for all microbatches); table: what the executor does, in its order",
            *(["timeline: as simulated, " + ", ".join(list(predicted)[-1])] if predicted else []),
            *([described(seen)] if seen else []),
            *results.missing(),
        ],
        **({"devices": seen["machine"]} if seen else {}),
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What times of single operations say of an iteration, in seconds."""

    simulation: pipeline.Simulation
    table: float
    busy: float  # of all nodes together

    def idle(self, seconds: float, nodes: int) -> float:
        """The share of an iteration of that length in which nodes compute nothing."""
        return 1 - self.busy / (nodes * seconds)


def _topology(entry: dict) -> pipeline.Topology:
    return pipeline.Topology(entry["stages"], entry["memory"])


def _hops(key: tuple[str, str]) -> int:
    return int(key[1].split()[0]) if key[0] == "message" else 1


def _costed(entry: dict, costs: dict) -> bool:
    """Whether times of all operations are there."""
    layers = f"{entry['layers']} layers"
    return {("F", layers), ("B", layers), ("H", "head")} <= {*costs} and any(row == "message" for row, _ in costs)


def predict(entry: dict, order: str, costs: dict) -> Prediction:
    """An iteration of that plan, simulated and by the table."""
    layers = f"{entry['layers']} layers"
    forward, backward, head = (1e-3 * costs[key]["ms"] for key in (("F", layers), ("B", layers), ("H", "head")))
    message = next(1e-3 * cost["ms"] / _hops(key) for key, cost in costs.items() if key[0] == "message")
    topology, paths = _topology(entry), [tuple(path) for path in entry["paths"]]
    scheduled = pipeline.compile_table(paths, topology, order)  # pyright: ignore[reportArgumentType]
    seconds = {table.F: forward, table.F0: forward, table.H: head, table.B: backward, table.B0: backward}
    busy = sum(lasts * np.sum(scheduled.op == op) for op, lasts in seconds.items())
    # The simulator takes work in the order in which it arrives; with memory for all, no forward pass waits.
    roomy = dataclasses.replace(topology, memory=len(paths)) if order == "gpipe" else topology
    link = np.full((topology.nodes, topology.nodes), message)
    simulated = pipeline.simulate(
        paths, roomy, pipeline.Costs(link, forward, head=head / forward, backward=backward / forward)
    )
    return Prediction(simulated, pipeline.table_seconds(scheduled, seconds, message), float(busy))


def _efficiency(training: dict, devices: int) -> dict[tuple[str, str], float]:
    """(axis, scaling) -> tokens/s of a device over those of one device alone."""
    if (ONE, "baseline") not in training:
        return {}
    rate = {key: entry["tokens"] / entry["ms"] for key, entry in training.items()}
    return {key: rate[key] / devices / rate[ONE, "baseline"] for key in rate if key[0] != ONE}


def _equalities(training: dict, cross_entropy: dict, checked: dict, bound: float) -> list[Claim]:
    """What is computed does not hang on the number of devices."""
    claims = []

    def add(statement: str, worst: float, bound: float, where: str):
        measured = f"{worst:.2g}, {where}"
        claims.append(Claim(statement, f"<= {bound:.2g}", measured, worst <= bound, source="ours"))

    first = training.get((ONE, "baseline"))
    strong = {axis: entry for (axis, scaling), entry in training.items() if scaling == "strong"}
    if first and strong:
        off = {
            (axis, of): abs(entry[of] / first[of] - 1) for axis, entry in strong.items() for of in ("loss", "grad_norm")
        }
        worst = max(off, key=off.__getitem__)
        statement = "loss and gradient norm of a training step are those of one device"
        add(statement, off[worst], bound, f"{worst[1]} over {worst[0]}")
    off = {key: entry["error"] for key, entry in checked.items() if "error" in entry}
    if off:
        worst = max(off, key=off.__getitem__)
        add("the pipeline's loss and gradients in float32 are those of one device", off[worst], 1e-5, ", ".join(worst))
    for entry in cross_entropy.values():
        if "errors" in entry:
            errors = entry["errors"]
            worst = max(errors, key=errors.__getitem__)
            statement = "vocabulary-parallel cross-entropy: loss and gradients are those of one device"
            add(statement, errors[worst], bound, worst)
    return claims


def _speed_claims(devices: int, efficiency: dict, timed: dict, predicted: dict) -> list[Claim]:
    claims = []

    def add(statement: str, expected: str, measured: str, holds: bool):
        claims.append(Claim(f"{devices} GPUs: {statement}", expected, measured, holds, source="ours"))

    weak = efficiency.get(("fsdp", "weak"))
    if weak is not None:
        add("weak-scaling efficiency of FSDP training", f">= {EFFICIENCY}", f"{weak:.3f}", weak >= EFFICIENCY)
    for (row, order), shown in predicted.items():
        off = _off(timed[row, order], shown.simulation.makespan)
        add(
            f"{row}, {order}: a step of the pipeline takes what the simulator says",
            f"within {WITHIN:.0%}",
            f"{off:+.1%}",
            abs(off) <= WITHIN,
        )
        full = predicted.get(("full", order))
        if row != "full" and full is not None:
            simulated = 1 - shown.simulation.makespan / full.simulation.makespan
            gained = 1 - timed[row, order]["ms"] / timed["full", order]["ms"]
            add(
                f"{row}, {order}: faster than the full pipeline by what the simulator says",
                f">= {OF_THE_GAIN:.0%} of {simulated:.1%}",
                f"{gained:.1%}",
                gained >= OF_THE_GAIN * simulated,
            )
    return claims


def _off(entry: dict, seconds: float) -> float:
    return 1e-3 * entry["ms"] / seconds - 1


def _training_table(training: dict, efficiency: dict) -> Table:
    header = ["devices along", "scaling", "tokens a step", "ms a step", "tokens/s a device", "efficiency", "state MB",
              "temporary MB"]  # fmt: skip
    first = training.get((ONE, "baseline"))
    rate = first and 1e3 * first["tokens"] / first["ms"]
    rows = []
    for key, entry in training.items():
        share = 1.0 if key[0] == ONE else efficiency.get(key)
        rows.append([*key, entry["tokens"], round(entry["ms"], 3), share and rate and round(share * rate),
                     share and round(share, 3), round(entry["state_mb"], 1), round(entry["mb"], 1)])  # fmt: skip
    return Table(header, rows)


def _collectives_table(training: dict, cross_entropy: dict) -> Table:
    rows = []
    for part, entries in (("training", training), ("cross-entropy", cross_entropy)):
        for (row, kind), entry in entries.items():
            rows += [
                [part, row, kind, name, found["program"], found["runs"], round(found["mb"], 3)]
                for name, found in sorted(entry["collectives"].items())
            ]
    return Table(["part", "devices along", "program", "collective", "in the program", "a step", "MB a step"], rows)


def _costs_table(costs: dict) -> Table:
    return Table(["operation", "of", "ms"], [[*key, entry["ms"] / _hops(key)] for key, entry in costs.items()])


def _pipeline_table(timed: dict, predicted: dict, exact: dict, devices: int) -> Table:
    header = ["paths", "order", "nodes of each stage", "ms a step", "simulated ms", "table ms", "off simulated",
              "off table", "idle", "idle simulated", "idle table", "tokens/s", "gradients off"]  # fmt: skip
    rows = []
    for key, entry in timed.items():
        sizes = "-".join(str(len(nodes)) for nodes in entry["stages"])
        told: list = [None] * 7
        if key in predicted:
            shown = predicted[key]
            both = shown.simulation.makespan, shown.table
            idle = [shown.idle(seconds, devices) for seconds in (1e-3 * entry["ms"], *both)]
            told = [*(1e3 * s for s in both), *(f"{_off(entry, s):+.1%}" for s in both), *(f"{x:.1%}" for x in idle)]
        error = exact.get(key, entry).get("error")
        rows.append([*key, sizes, round(entry["ms"], 3), *told, round(1e3 * entry["tokens"] / entry["ms"]), error])
    return Table(header, rows)


def _cross_entropy_table(cross_entropy: dict) -> Table:
    header = ["classifier", "ms", "against one device", "temporary MB", "classifier MB", "loss off", "embeddings off",
              "classifier off"]  # fmt: skip
    one = next((entry["ms"] for (row, _), entry in cross_entropy.items() if row == ONE), None)
    rows = []
    for (row, _), entry in cross_entropy.items():
        errors = [entry.get("errors", {}).get(name) for name in ("loss", "embeddings", "classifier")]
        place = row if row == ONE else f"split along {row}"
        sizes = round(entry["mb"], 1), round(entry["classifier_mb"], 1)
        rows.append([place, round(entry["ms"], 3), one and round(entry["ms"] / one, 3), *sizes, *errors])
    return Table(header, rows)


def _figure(efficiency: dict, timed: dict, predicted: dict):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    axes_names = list(dict.fromkeys(axis for axis, _ in efficiency))
    for shift, scaling, color in ((-0.2, "weak", "#4c72b0"), (0.2, "strong", "#9db4d6")):
        heights = {i + shift: efficiency.get((axis, scaling)) for i, axis in enumerate(axes_names)}
        shown = [(place, height) for place, height in heights.items() if height is not None]
        if shown:
            left.bar(*zip(*shown, strict=True), width=0.36, color=color, label=scaling)
    left.axhline(1.0, color="black", linewidth=0.8)
    left.set_xticks(range(len(axes_names)), axes_names)
    left.set_ylabel("of those of one device alone")
    left.set_title("training: tokens/s of a device", fontsize=9, loc="left")
    names = [f"{row}, {order}" for row, order in predicted]
    bars = {
        "measured": ([timed[key]["ms"] for key in predicted], "#4c72b0"),
        "simulated": ([1e3 * shown.simulation.makespan for shown in predicted.values()], "#55a868"),
        "table": ([1e3 * shown.table for shown in predicted.values()], "#8c8c8c"),
    }
    for i, (label, (heights, color)) in enumerate(bars.items()):
        right.barh([k + 0.27 * (i - 1) for k in range(len(names))], heights, height=0.25, color=color, label=label)
    right.set_yticks(range(len(names)), names, fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("ms a step")
    right.set_title("pipeline", fontsize=9, loc="left")
    for axes, shown in ((left, efficiency), (right, predicted)):
        axes.spines[["top", "right"]].set_visible(False)
        if shown:
            axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
