"""Linear layer + cross-entropy: time, memory and gradient error of every implementation, beside the peers.

    python -m experiments.benchmarks.linear_cross_entropy                    # one GPU, under 8 minutes
    python -m experiments.benchmarks.linear_cross_entropy --shapes gemma --rows mosaic_gpu xla torch_compile --sweep
    python -m experiments.benchmarks.linear_cross_entropy --preset smoke     # tiny, on CPU

Inputs are bf16 and Zipf-distributed (`jax_linear_cross_entropy.zipf_inputs`). JAX and PyTorch run in a process of
their own, one after the other, and each measures its programs in two turns because a GPU's clock drifts. What was
measured is in measured.json at once: `--resume` continues a run that was killed. A peer that is missing is named.

The floor is one matrix product of N x V x D, which the forward pass alone needs.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Literal

from experiments import cli
from experiments.benchmarks.jax_linear_cross_entropy import OURS
from experiments.benchmarks.measuring import Results, described, in_a_process
from experiments.claims import Claim, Report, Table

TORCH_ROWS = ("torch_compile", "torch", "liger", "apple")
Row = Literal[
    "mosaic_gpu", "mosaic_tpu", "triton", "chunked", "xla", "tokamax", "torch_compile", "torch", "liger", "apple"
]
SHAPES = {  # tokens N, vocabulary V, width D
    "gemma": (8192, 256_000, 2304),
    "llama3": (8192, 128_256, 4096),
    "gpt2": (32_768, 50_304, 768),
    "gemma-32k": (32_768, 256_000, 2304),
    "tiny": (256, 1000, 64),
}
# FLOP/s of the best bf16 product seen there; elsewhere the rate that JAX reaches in the run.
_PRODUCT_RATE = {"NVIDIA H200": 790e12}
# At Gemma's shape on an H200: (ms, MB beyond the inputs; two gradients take 1161 MB).
_GOALS = {"forward": (15, 16), "kahan": (32, 1200), "exact": (65, 1450)}
_JAX_SHARE = 0.6  # of the time, when PyTorch runs too


@dataclasses.dataclass(frozen=True)
class Config:
    """Time, memory and gradient error of linear layer + cross-entropy."""

    shapes: tuple[Literal["gemma", "llama3", "gpt2", "gemma-32k", "tiny"], ...] = (
        "gemma",
        "llama3",
        "gpt2",
        "gemma-32k",
    )
    rows: tuple[Row, ...] = (*OURS, "xla", "tokamax", *TORCH_ROWS)  # pyright: ignore[reportAssignmentType]
    sweep: tuple[int, ...] = (16_384, 65_536, 131_072)
    """Further vocabulary sizes, for the figures."""
    sweep_rows: tuple[Row, ...] = ("mosaic_gpu", "mosaic_tpu", "xla", "torch_compile", "apple")
    sweep_tokens: int = 8192
    sweep_width: int = 2304
    repeats: int = 5
    """Samples a turn."""
    shuffle: bool = False
    """Token ids in random order instead of by frequency."""
    seconds: float = 450.0
    """What cannot start within this time is left out, and named."""


PRESETS = {
    "smoke": Config(
        shapes=("tiny",),
        rows=("mosaic_gpu", "chunked", "xla", "torch"),
        sweep=(512,),
        sweep_rows=("chunked", "xla", "torch"),
        sweep_tokens=256,
        sweep_width=64,
        repeats=2,
    ),
    "default": Config(),
    "paper": Config(repeats=10, seconds=3600.0),
}


def main(config: Config, run: cli.Run) -> Report:
    """Measure in one process a framework, then compare."""
    results = Results(run.directory / "measured.json")
    begin = time.time()
    names = dict.fromkeys((*config.rows, *(config.sweep_rows if config.sweep else ())))
    frameworks = {
        "jax": [name for name in names if name not in TORCH_ROWS],
        "torch": [name for name in names if name in TORCH_ROWS],
    }
    for framework, rows in frameworks.items():
        if rows:
            share = _JAX_SHARE if framework == "jax" and frameworks["torch"] else 1.0
            for event in _in_a_process(framework, rows, config, results, begin + share * config.seconds):
                results.add(event)
    return report(config, results)


def _product_ms(results: Results, size: tuple[int, int, int]) -> float | None:
    """Time of one product N x V x D at the best rate of the device."""
    jax_saw = results.framework("jax")
    rate = _PRODUCT_RATE.get(jax_saw.get("device", ""), 1e12 * jax_saw.get("tflops", 0))
    return 1e3 * 2 * size[0] * size[1] * size[2] / rate if rate else None


def _in_a_process(framework: str, rows: list[str], config: Config, results: Results, deadline: float) -> Iterator[dict]:
    shapes = {name: {"size": SHAPES[name], "rows": config.rows, "brief": False} for name in config.shapes}
    for vocabulary in config.sweep:
        size = (config.sweep_tokens, vocabulary, config.sweep_width)
        shapes[f"V={vocabulary}"] = {"size": size, "rows": config.sweep_rows, "brief": True}
    task = {
        "names": rows,
        "shapes": shapes,
        "repeats": config.repeats,
        "shuffle": config.shuffle,
        "deadline": deadline,
        "done": list(results.programs()),
    }
    module = f"{'peers.' if framework == 'torch' else ''}{framework}_linear_cross_entropy"
    return in_a_process(framework, module, task)


def report(config: Config, results: Results) -> Report:
    """Tables, claims and figures of what was measured."""
    programs = results.programs()
    tables = {}
    for name in config.shapes:
        tables[f"{name}: N = {SHAPES[name][0]}, V = {SHAPES[name][1]}, D = {SHAPES[name][2]}"] = _table(
            programs, name, SHAPES[name], _product_ms(results, SHAPES[name])
        )
    points = _points(config, programs)
    tables[f"against the vocabulary, N = {config.sweep_tokens}, D = {config.sweep_width}"] = Table(
        ["vocabulary", "implementation", "kind", "ms", "MB"],
        [[v, *line, round(p["ms"], 2), _mb(p)] for line, found in points.items() for v, p in sorted(found.items())],
    )
    rates = [described(event) for name in ("jax", "torch") if (event := results.framework(name))]
    samples = max((len(entry["times"]) for entry in programs.values()), default=0)
    return Report(
        claims=_claims(config, results),
        tables=tables,
        figures={
            "linear_cross_entropy_time": _figure(points, "ms", "ms", "Time against vocabulary size", config),
            "linear_cross_entropy_memory": _figure(points, "mb", "MB", "Memory beyond the inputs", config),
        },
        notes=[
            f"median of up to {samples} samples of at least 50 ms in two turns; MB = 2^20 bytes beyond the inputs: "
            "temporaries and outputs of the compiled program (JAX), peak of the allocator (PyTorch)",
            "one product: the time of N x V x D at "
            + ", ".join(f"{rate / 1e12:.0f} TFLOP/s on an {device}" for device, rate in _PRODUCT_RATE.items())
            + ", elsewhere at JAX's rate below; exact gradients need three products",
            "errors of gradients in roundings to bf16: 1 is the float32 gradient rounded; on 64 tokens, the 64 most "
            "frequent entries and 64 others" + (" (ids are shuffled: any entries)" if config.shuffle else ""),
            *rates,
            *results.missing(),
        ],
    )


def _mb(entry: dict | None) -> float | None:
    return round(entry["mb"], 1) if entry and entry.get("mb") is not None else None


def _table(programs: dict, shape: str, size: tuple[int, int, int], product: float | None) -> Table:
    header = [
        "implementation",
        "gradients",
        "forward ms",
        "forward + backward ms",
        "forward MB",
        "forward + backward MB",
        "forward TFLOP/s",
        "forward over one product",
        "forward + backward over one product",
        "error dE",
        "error dC, frequent",
        "error dC, others",
    ]
    rows = []
    for row, kind in dict.fromkeys((row, kind) for name, row, kind in programs if name == shape):
        if kind == "forward" and any(key[:2] == (shape, row) and key[2] != "forward" for key in programs):
            continue  # it stands beside each of its gradients
        forward = programs.get((shape, row, "forward"))
        both = None if kind == "forward" else programs[shape, row, kind]
        rows.append(
            [
                row,
                kind if both else None,
                *(entry and round(entry["ms"], 3) for entry in (forward, both)),
                *map(_mb, (forward, both)),
                forward and round(2 * size[0] * size[1] * size[2] / forward["ms"] / 1e9, 1),
                *(entry and product and round(entry["ms"] / product, 2) for entry in (forward, both)),
                *(round(x, 2) for x in (both or {}).get("error", ())),
            ]
        )
        rows[-1] += [None] * (len(header) - len(rows[-1]))
    rows.append(["one product", None, product and round(product, 3), *[None] * (len(header) - 3)])
    return Table(header, rows)


def _claims(config: Config, results: Results) -> list[Claim]:
    programs = results.programs()
    ours = next((row for row in OURS if any(key[1] == row for key in programs)), None)
    found = []
    for kind, (ms, mb) in _GOALS.items():
        entry = programs.get(("gemma", str(ours), kind))
        if entry and results.framework("jax").get("device") == "NVIDIA H200":
            what = "forward" if kind == "forward" else f"forward + backward, {kind}"
            found.append(
                Claim(
                    f"gemma, {what}: at most {ms} ms with at most {mb} MB beyond the inputs, on an H200",
                    expected=f"<= {ms} ms, <= {mb} MB",
                    measured=f"{entry['ms']:.2f} ms, {entry['mb']:.1f} MB ({ours})",
                    holds=entry["ms"] <= ms and entry["mb"] <= mb,
                    source="ours",
                )
            )
    for shape in (*config.shapes, *(f"V={v}" for v in config.sweep)):
        found += _against_peers(programs, shape, ours)
    for shape in config.shapes:
        errors = [programs.get((shape, str(ours), kind), {}).get("error") for kind in ("kahan", "exact")]
        if all(errors):
            added = [math.sqrt(max(a**2 - b**2, 0)) for a, b in zip(*errors, strict=True)][:2]
            found.append(
                Claim(
                    f"{shape}: the filter takes no more from the gradients of the embeddings and of frequent entries "
                    "than bf16 rounds away",
                    expected="<= 1 rounding beside the exact gradient's error",
                    measured=f"{added[0]:.2f} and {added[1]:.2f}",
                    holds=max(added) <= 1,
                    source="arXiv 2411.09009, section 4.3",
                )
            )
    return found


def _against_peers(programs: dict, shape: str, ours: str | None) -> list[Claim]:
    """That no peer of the run is faster: forward, and forward + backward with the filter where there is one."""
    filtered = "kahan" if (shape, ours, "kahan") in programs else "exact"
    ratios = {}
    for what, kind in (("forward", "forward"), ("forward + backward", filtered)):
        mine = programs.get((shape, str(ours), kind))
        peers = {
            f"{row} {peer_kind}": entry["ms"]
            for (name, row, peer_kind), entry in programs.items()
            if name == shape and row not in OURS and (peer_kind == "forward") == (kind == "forward")
        }
        if mine and peers:
            best = min(peers, key=lambda name: peers[name])
            ratios[what] = (mine["ms"] / peers[best], best)
    if not ratios:
        return []
    return [
        Claim(
            f"{shape}: never slower than the fastest peer ({ours}, gradients {filtered})",
            expected="<= 1.0 of its time",
            measured="; ".join(f"{what} {ratio:.3f} of {peer}" for what, (ratio, peer) in ratios.items()),
            holds=all(ratio <= 1 for ratio, _ in ratios.values()),
            source="ours",
        )
    ]


def _points(config: Config, programs: dict) -> dict[tuple[str, str], dict[int, dict]]:
    """(row, kind) -> vocabulary -> measurement, of all shapes with the sweep's tokens and width."""
    sizes = {f"V={v}": v for v in config.sweep}
    for name in config.shapes:
        if (SHAPES[name][0], SHAPES[name][2]) == (config.sweep_tokens, config.sweep_width):
            sizes[name] = SHAPES[name][1]
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for (shape, row, kind), entry in programs.items():
        if shape in sizes and row in config.sweep_rows:
            found.setdefault((row, kind), {})[sizes[shape]] = entry
    return found


_COLORS = {
    **dict.fromkeys(OURS, "#c44e52"),
    "xla": "#4c72b0",
    "tokamax": "#64b5cd",
    "torch_compile": "#dd8452",
    "torch": "#937860",
    "liger": "#8c8c8c",
    "apple": "#55a868",
}


def _figure(points: dict, key: str, unit: str, title: str, config: Config):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    sizes = sorted({v for found in points.values() for v in found})
    for axes, forward in zip(figure.subplots(1, 2), (True, False), strict=True):
        for (row, kind), found in points.items():
            known = sorted((v, entry[key]) for v, entry in found.items() if entry.get(key) is not None)
            if (kind == "forward") == forward and known and "full_c" not in kind:
                label = row if forward else f"{row}, {kind}"
                style = "-" if forward or "exact" in kind else "--"
                axes.plot(*zip(*known, strict=True), style, marker="o", markersize=4, color=_COLORS[row], label=label)
        axes.set(xlabel="vocabulary size", ylabel=unit, xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{v:,}" for v in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.set_title("forward" if forward else "forward + backward", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}; {config.sweep_tokens:,} tokens, width {config.sweep_width:,}, bf16")
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
