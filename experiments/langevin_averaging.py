"""Langevin dynamics whose average finds a planted direction while no iterate does (arXiv 2603.06028).

    python -m experiments.langevin_averaging                      # 2 minutes on two CPU cores
    python -m experiments.langevin_averaging --odd.eps 2          # a weaker drift
    python -m experiments.langevin_averaging --preset paper       # d = 100, and the phase diagram to d = 128: for a TPU

Tensor PCA of order 3 and 4 with all seeds and chains in one program, a phase diagram of the sample size that averaging
needs (the square of the signal's strength lambda stands for the sample size n), and the paper's own simulation, SGD on
one example at a time, on a single-index model. The control is in every row: chains must stay near the equator, where
the mean overlap is sqrt(2 / (pi d)), or plain optimisation would do and averaging would show nothing.
"""

import dataclasses
import functools
import itertools
import json
import math

from experiments import claims, cli
from experiments.claims import Claim, Report, Table


@dataclasses.dataclass(frozen=True)
class TensorPCA:
    """Tensor PCA with full-gradient Langevin dynamics."""

    k: int
    """Order of the tensor."""
    d: int
    """Dimension."""
    lam: float
    """Strength of the signal."""
    eps: float
    """Strength of the drift."""
    time: float
    """Total time of all chains of a seed."""
    dt: float = 5e-3


@dataclasses.dataclass(frozen=True)
class Phase:
    """Which signals averaging finds: tensor PCA with lambda² = d^a."""

    k: int = 3
    dimensions: tuple[int, ...] = (8, 12, 18, 24)
    exponents: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5)
    """The a."""
    seeds: int = 8
    """Pairs of problems whose noise has opposite signs: most of the luck cancels."""
    chains: int = 32
    """Chains of one problem, averaged."""
    eps_per_dimension: float = 4 / 30
    """The drift is eps = this * d."""
    time_factor: float = 2.0
    """The total time is this * d^k / eps²."""


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """SGD with one example a step on a single-index model, averaged."""

    orders: tuple[int, ...] = (3,)
    """Degrees k of the Hermite link."""
    d: int = 40
    samples_factor: int = 10
    """n = this * d^ceil(k/2)."""
    learning_rate: float = 0.6
    steps: int = 20_000
    """Of each chain."""
    chains: int = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """Average Langevin chains on problems with a planted direction."""

    odd: TensorPCA = TensorPCA(k=3, d=30, lam=90.0, eps=4.0, time=2000.0)
    weak: TensorPCA = TensorPCA(k=3, d=30, lam=6.0, eps=4.0, time=1000.0)
    """Too little signal: nothing may be found."""
    even: TensorPCA = TensorPCA(k=4, d=16, lam=48.0, eps=3.0, time=3000.0)
    seeds: int = 3
    chains: int = 16
    """Chains of a seed, each of the time / chains."""
    phase: Phase = Phase()
    minibatch: Minibatch = Minibatch()
    seed: int = 0

    def __post_init__(self):
        if self.odd.k % 2 == 0 or self.weak.k % 2 == 0 or self.even.k % 2:
            raise ValueError(
                f"odd.k={self.odd.k}, weak.k={self.weak.k}, even.k={self.even.k}; the first two must be odd"
                " numbers and the last an even one"
            )
        if self.phase.k % 2 == 0 or len(self.phase.dimensions) < 2 or len(self.phase.exponents) < 2:
            raise ValueError("phase needs an odd k and at least two dimensions and two exponents")


PRESETS = {
    "smoke": Config(
        odd=TensorPCA(k=3, d=10, lam=40.0, eps=3.0, time=100.0, dt=0.02),
        weak=TensorPCA(k=3, d=10, lam=1.0, eps=1.0, time=50.0, dt=0.02),
        even=TensorPCA(k=2, d=6, lam=20.0, eps=0.5, time=100.0, dt=0.02),
        seeds=1,
        chains=8,
        phase=Phase(dimensions=(4, 6), exponents=(-4.0, 4.0), seeds=2, chains=8),
        minibatch=Minibatch(d=6, steps=500, chains=4),
    ),
    "default": Config(),
    "paper": Config(
        chains=64,
        phase=Phase(dimensions=(32, 64, 128), exponents=tuple(1 + 0.125 * i for i in range(13)), seeds=10, chains=256),
        minibatch=Minibatch(orders=(3, 4, 5), d=100, learning_rate=0.1, steps=10_000_000, chains=16),
    ),
}


def main(config: Config, run: cli.Run) -> Report:
    """Run the three rows, the phase diagram and SGD, and judge."""
    rows = {
        name: _stage(run, name, functools.partial(tensor_pca, getattr(config, name), config))
        for name in ("odd", "weak", "even")
    }
    phase = _stage(run, "phase", lambda: phase_diagram(config.phase, config.seed))
    sgd = {
        k: _stage(run, f"minibatch{k}", functools.partial(minibatch, config.minibatch, k, config))
        for k in config.minibatch.orders
    }
    thresholds, slope = _thresholds(config.phase, phase)
    return Report(
        claims=[
            *_claims(config, rows),
            *_phase_claims(config.phase, phase, slope),
            *(_sgd_claim(config.minibatch, k, values) for k, values in sgd.items()),
        ],
        tables={
            "overlap with the planted direction": _rows_table(config, rows, sgd),
            "thresholds": _thresholds_table(config.phase, thresholds),
        },
        figures={
            "averages": _averages_figure(config, rows),
            "thresholds": _thresholds_figure(config.phase, phase, thresholds, slope),
        },
        notes=[
            f"{config.seeds} seed(s) of {config.chains} chains a row; "
            f"{2 * len(config.phase.exponents) * config.phase.seeds * config.phase.chains:,} chains in each program of "
            "the phase diagram",
            "the oracle is the partial trace of the same tensor, what averaging tends to; signs of even problems mean "
            "nothing",
        ],
    )


def _stage(run: cli.Run, name: str, compute):
    """What `compute` returns, or what an earlier session of this run found."""
    path = run.directory / "stages" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{name} ...", flush=True)
        claims.write_atomic(path, json.dumps(claims.to_json(compute())))
    return claims.from_json(json.loads(path.read_text(encoding="utf-8")))


def _overlaps(problem, result) -> dict:
    """What is measured of one seed, as arrays."""
    import jax.numpy as jnp

    from jaxskip.optim import partial_trace

    star = problem.theta_star
    values = {
        "first": result.estimate("odd") @ star,
        "iterates": jnp.abs(result.snapshots @ star).mean(),
        "last": jnp.abs(result.last @ star).mean(),
        "oracle": partial_trace(problem) @ star,
        "length": jnp.linalg.norm(result.mean),
        "average_so_far": result.trace_overlap(star),
        "iterate_by_block": jnp.abs(result.snapshots @ star).mean(-1),
    }
    if result.second_moment is not None:
        values["second"] = jnp.abs(result.estimate("even") @ star)
        values |= {name: jnp.abs(values[name]) for name in ("first", "oracle")}
    return values


def tensor_pca(setting: TensorPCA, config: Config) -> dict:
    """All seeds of one row at once; each value has a leading axis of seeds."""
    import jax

    from jaxskip.optim import spherical_langevin, tensor_pca_problem

    def one(key):
        problem_key, chain_key = jax.random.split(key)
        problem = tensor_pca_problem(problem_key, setting.d, setting.k, setting.lam)
        result = spherical_langevin(
            problem.drift,
            chain_key,
            setting.d,
            setting.eps,
            setting.time / config.chains,
            setting.dt,
            order="first" if setting.k % 2 else "both",
            chains=config.chains,
        )
        return _overlaps(problem, result)

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    return jax.device_get(jax.jit(jax.vmap(one))(keys))


def phase_diagram(phase: Phase, seed: int) -> dict:
    """Mean overlap over seeds of the average, of the last iterates and of the oracle: [dimension][exponent]."""
    import jax
    import jax.numpy as jnp

    from jaxskip.optim import partial_trace, spherical_langevin, tensor_pca_problem

    found = {"average": [], "last": [], "oracle": []}
    for d in phase.dimensions:
        eps, dt = phase.eps_per_dimension * d, 0.15 / d
        time = phase.time_factor * d**phase.k / eps**2 / phase.chains

        def one(key, lam, d=d, eps=eps, dt=dt, time=time):
            problem_key, chain_key = jax.random.split(key)
            problem = tensor_pca_problem(problem_key, d, phase.k, lam)
            result = spherical_langevin(problem.drift, chain_key, d, eps, time, dt, chains=phase.chains)
            star = problem.theta_star
            return result.estimate("odd") @ star, jnp.abs(result.last @ star).mean(), partial_trace(problem) @ star

        keys = jax.random.split(jax.random.key(seed), phase.seeds)
        lams = d ** (jnp.array(phase.exponents) / 2)
        over_seeds = jax.vmap(one, (0, None))
        over_signs = jax.vmap(over_seeds, (None, 0))  # the tensor is signal + noise / lam
        values = jax.jit(jax.vmap(over_signs, (None, 0)))(keys, jnp.stack([lams, -lams], axis=1))
        for name, value in zip(found, values, strict=True):
            found[name].append(value.mean((1, 2)).tolist())
    return found


def minibatch(options: Minibatch, k: int, config: Config) -> dict:
    """All seeds of SGD at once."""
    import jax

    from jaxskip.optim import minibatch_averaging, single_index_problem

    n = options.samples_factor * options.d ** math.ceil(k / 2)

    def one(key):
        problem_key, chain_key = jax.random.split(key)
        problem = single_index_problem(problem_key, options.d, n, k)
        result = minibatch_averaging(
            problem.sample_drift,
            chain_key,
            options.d,
            options.learning_rate,
            options.steps,
            order="first" if k % 2 else "both",
            chains=options.chains,
        )
        return _overlaps(problem, result)

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    return jax.device_get(jax.jit(jax.vmap(one))(keys))


def equator(d: int) -> float:
    """Mean |theta . theta*| of a uniform theta."""
    return math.sqrt(2 / (math.pi * d))


def _claims(config: Config, rows: dict) -> list[Claim]:
    odd, weak, even = rows["odd"], rows["weak"], rows["even"]
    away = {name: 1.165 * equator(getattr(config, name).d) for name in ("odd", "weak")}
    away["even"] = 1.305 * equator(config.even.d)  # at d = 30 and 16: 0.17 and 0.26
    successful = [(odd["first"], odd["oracle"]), (even["second"], even["oracle"])]
    excess = max(f - o for found, oracle in successful for f, o in zip(found, oracle, strict=True))
    return [
        Claim(
            f"tensor PCA, k = {config.odd.k}, d = {config.odd.d}, lambda = {config.odd.lam:g}: the average of the "
            "chains overlaps theta* while the chains stay near the equator, on every seed",
            expected=f"average >= 0.90, iterates <= {away['odd']:.2f}",
            measured=f"average {_list(odd['first'])}, iterates {_list(odd['iterates'])}",
            holds=min(odd["first"]) >= 0.9 and max(odd["iterates"]) <= away["odd"],
            source="arXiv 2603.06028, theorem 2 and figure 1",
        ),
        Claim(
            f"with too little signal (lambda = {config.weak.lam:g}) the average finds nothing",
            expected="<= 0.7",
            measured=_list(weak["first"]),
            holds=max(weak["first"]) <= 0.7,
            source="ours: the control",
        ),
        Claim(
            f"k = {config.even.k}, d = {config.even.d}, lambda = {config.even.lam:g}: the second moment finds theta*, "
            "the first does not, the chains stay near the equator",
            expected=f"second >= 0.95, first <= 0.6, iterates <= {away['even']:.2f}",
            measured=f"second {_list(even['second'])}, first {_list(even['first'])}, "
            f"iterates {_list(even['iterates'])}",
            holds=min(even["second"]) >= 0.95 and max(even["first"]) <= 0.6 and max(even["iterates"]) <= away["even"],
            source="arXiv 2603.06028, theorem 3 and figure 2",
        ),
        Claim(
            "averaging does no better than the partial trace of the same tensor",
            expected="overlap <= that of the partial trace + 0.02",
            measured=f"largest excess {excess:+.3f}",
            holds=excess <= 0.02,
            source="ours: linear response",
        ),
    ]


def _phase_claims(phase: Phase, found: dict, slope: float | None) -> list[Claim]:
    last = max(max(row) for row in found["last"])
    return [
        Claim(
            f"k = {phase.k}: the sample size at which the average overlaps by 0.5 grows like a power of d between "
            "k/2 and, with room for small d, the theorem's ceil(k/2)",
            expected="exponent in [1.5, 2.2]"
            if phase.k == 3
            else f"in [{phase.k / 2}, {math.ceil(phase.k / 2) + 0.2}]",
            measured="no threshold in the range" if slope is None else f"{slope:.2f}",
            holds=slope is not None and phase.k / 2 <= slope <= math.ceil(phase.k / 2) + 0.2,
            source="arXiv 2603.06028, theorem 2",
        ),
        Claim(
            "at none of these sample sizes do the last iterates of the same chains find it",
            expected="mean overlap < 0.5",
            measured=f"at most {last:.2f}",
            holds=last < 0.5,
            source="arXiv 2603.06028: iterates stay at the equator",
        ),
    ]


def _sgd_claim(options: Minibatch, k: int, values: dict) -> Claim:
    found = values["first" if k % 2 else "second"]
    near = 1.305 * equator(options.d)
    return Claim(
        f"single-index model, k = {k}, d = {options.d}: SGD on one example at a time, without added noise, averages to "
        "theta* while it stays near the equator",
        expected=f"average >= 0.8, iterates <= {near:.2f}",
        measured=f"average {_list(found)}, iterates {_list(values['iterates'])}",
        holds=min(found) >= 0.8 and max(values["iterates"]) <= near,
        source="arXiv 2603.06028: a conjecture there; bounds ours",
    )


def _list(values) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _mean(values) -> float:
    return round(sum(values) / len(values), 3)


def _rows_table(config: Config, rows: dict, sgd: dict) -> Table:
    header = [
        "problem",
        "first order",
        "second order",
        "iterates",
        "equator",
        "last iterate",
        "oracle",
        "length of mean",
    ]
    settings = [(f"k={s.k}, d={s.d}, lambda={s.lam:g}, eps={s.eps:g}", s.d, rows[name]) for name, s in (
        (name, getattr(config, name)) for name in rows)]  # fmt: skip
    settings += [(f"SGD, k={k}, d={config.minibatch.d}", config.minibatch.d, values) for k, values in sgd.items()]
    return Table(
        header,
        [
            [
                title,
                _list(v["first"]),
                _list(v["second"]) if "second" in v else None,
                _mean(v["iterates"]),
                round(equator(d), 3),
                _mean(v["last"]),
                _list(v["oracle"]),
                _mean(v["length"]),
            ]
            for title, d, v in settings
        ],
    )


def _crossing(exponents, overlaps) -> float | None:
    """The exponent at which the overlap first passes 0.5, between grid points by a straight line."""
    points = list(zip(exponents, overlaps, strict=True))
    for (a0, o0), (a1, o1) in itertools.pairwise(points):
        if o0 < 0.5 <= o1:
            return a0 + (a1 - a0) * (0.5 - o0) / (o1 - o0)
    return None


def _thresholds(phase: Phase, found: dict) -> tuple[dict, float | None]:
    """log n at the threshold for each dimension, and the slope of the average's against log d."""
    import numpy as np

    log_n = {}
    for name, rows in found.items():
        crossings = [_crossing(phase.exponents, row) for row in rows]
        log_n[name] = [a and a * math.log(d) for a, d in zip(crossings, phase.dimensions, strict=True)]
    points = [(math.log(d), y) for d, y in zip(phase.dimensions, log_n["average"], strict=True) if y is not None]
    slope = float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else None
    return log_n, slope


def _thresholds_table(phase: Phase, log_n: dict) -> Table:
    rows = []
    for i, d in enumerate(phase.dimensions):
        n = {name: None if values[i] is None else round(math.exp(values[i]), 1) for name, values in log_n.items()}
        rows.append([d, n["average"], n["oracle"], n["last"], d ** (phase.k / 2), d ** math.ceil(phase.k / 2)])
    header = ["d", "n for the average", "n for the partial trace", "n for the last iterate", "d^(k/2)", "d^ceil(k/2)"]
    return Table(header, rows)


_COLORS = {"average": "#c44e52", "last": "#4c72b0", "oracle": "#8c8c8c"}


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _averages_figure(config: Config, rows: dict):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (average, iterate) in enumerate(
        zip(rows["odd"]["average_so_far"], rows["odd"]["iterate_by_block"], strict=True)
    ):
        time = [config.odd.time * (n + 1) / len(average) for n in range(len(average))]
        left.plot(time, average, color=_COLORS["average"], label=None if i else "average so far")
        left.plot(time, iterate, color=_COLORS["last"], linewidth=1, label=None if i else "iterates, mean |overlap|")
    left.axhline(equator(config.odd.d), color="black", linestyle=":", linewidth=1, label="equator")
    left.set(
        xlabel="time, all chains together", ylabel="overlap with theta*", ylim=(0, 1.02), title=f"k = {config.odd.k}"
    )
    left.legend(frameon=False)
    series = [("first order", "first", "#dd8452"), ("second order", "second", "#c44e52"),
              ("iterates", "iterates", "#4c72b0"), ("oracle", "oracle", "#8c8c8c")]  # fmt: skip
    for offset, (label, name, color) in enumerate(series):
        places = [(i, row[name]) for i, row in enumerate(rows.values()) if name in row]
        right.bar(
            [i + 0.2 * (offset - 1.5) for i, _ in places],
            [_mean(values) for _, values in places],
            0.18,
            color=color,
            label=label,
        )
    settings = [getattr(config, name) for name in rows]
    right.set_xticks(range(len(rows)), [f"k = {s.k}, d = {s.d}\nlambda = {s.lam:g}" for s in settings])
    right.set(ylabel="mean overlap over seeds", ylim=(0, 1.02), title="what finds theta*")
    right.legend(frameon=False, ncols=2, loc="upper center")
    for axes in (left, right):
        _clean(axes)
    return figure


def _thresholds_figure(phase: Phase, found: dict, log_n: dict, slope: float | None):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, d in enumerate(phase.dimensions):
        shade = 0.35 + 0.65 * i / (len(phase.dimensions) - 1)
        for name, style in (("average", "-"), ("last", "-"), ("oracle", ":")):
            left.plot(phase.exponents, found[name][i], style, color=_COLORS[name], alpha=shade)
        left.plot([], [], color=_COLORS["average"], alpha=shade, label=f"average, d = {d}")
    left.plot([], [], color=_COLORS["last"], label="last iterates")
    left.plot([], [], ":", color=_COLORS["oracle"], label="partial trace")
    left.axhline(0.5, color="black", linewidth=0.8)
    left.set(
        xlabel="a, with lambda² = n = d^a", ylabel="mean overlap", ylim=(0, 1.02), title=f"tensor PCA, k = {phase.k}"
    )
    left.legend(frameon=False, fontsize="small")
    logs = [math.log(d) for d in phase.dimensions]
    for name, label in (("average", "average"), ("oracle", "partial trace")):
        points = [(d, math.exp(y)) for d, y in zip(phase.dimensions, log_n[name], strict=True) if y is not None]
        if points:
            right.loglog(*zip(*points, strict=True), "o-", color=_COLORS[name], label=label)
    known = [(x, y) for x, y in zip(logs, log_n["average"], strict=True) if y is not None]
    if known:
        x0, y0 = known[0]
        for power, style in ((phase.k / 2, "--"), (math.ceil(phase.k / 2), ":")):
            line = [math.exp(y0 + power * (x - x0)) for x in logs]
            right.loglog(phase.dimensions, line, style, color="black", linewidth=1, label=f"slope {power:g}")
    right.set_xticks(phase.dimensions, [str(d) for d in phase.dimensions])
    right.minorticks_off()
    title = "threshold (overlap 0.5)" + ("" if slope is None else f", fitted slope {slope:.2f}")
    right.set(xlabel="d", ylabel="n = lambda²", title=title)
    if known:
        right.legend(frameon=False)
    for axes in (left, right):
        _clean(axes)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
