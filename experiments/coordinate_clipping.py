"""Directional sharpness of optimizers' steps, and training with clipped coordinates (arXiv 2306.00204).

    python -m experiments.coordinate_clipping                            # a tiny model on Python source
    python -m experiments.coordinate_clipping --preset paper --data DIR  # gpt2-small on your code: a GPU or TPU

One trajectory is trained (by Adam, by SGD); at every step all rules update their own moments with the same gradients,
and at the probe steps their directions are compared from the same point, on held-out text. Afterwards rules train on
their own, each at several learning rates.

The paper's tasks start from pretrained networks (t5-small on English-French, GPT-Neo 125M on Python), which are not
here: the `paper` preset has the second task's model size, data, batch, rules and probe steps on a fresh gpt2-small, so
its learning rates are a start for your own search.
"""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable
from typing import Any, Literal, get_args

from experiments import claims, cli
from experiments.claims import Claim, Report, Table

Rule = Literal[
    "sgd",
    "sgd_clip",
    "normalized_sgd",
    "normalized_sgd_clip",
    "sign_sgd",
    "adam",
    "adam_clip",
    "adam_clip_update",
    "adafactor",
    "adafactor_clip",
    "lion",
    "lion_clip_update",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare directions from one point, then train with the rules."""

    model: Literal["gpt2-tiny", "gpt2-small", "gpt2-medium", "gpt2-large"] = "gpt2-tiny"
    data: str = "pysrc"
    """pysrc (Python's standard library), a text file or folder, a folder with train.bin and val.bin, or tfds:NAME."""
    context_length: int = 32
    batch_size: int = 16
    directions: tuple[Rule, ...] = ("sgd", "sgd_clip", "adam", "adam_clip", "sign_sgd")
    """Rules to compare at the probe steps; sgd, sgd_clip, adam and adam_clip are always among them."""
    adam_learning_rate: float = 2e-3
    """Of the trajectory that Adam trains."""
    sgd_learning_rate: float = 0.1
    """Of the trajectory that SGD trains."""
    probes: tuple[int, ...] = (20, 60, 120)
    """Steps after which the next directions are compared."""
    probe_batches: int = 2
    """Held-out batches that sharpness and losses are averaged over."""
    probe_batch_size: int = 64
    trained: tuple[tuple[Rule, float], ...] = (
        *(("sgd", rate) for rate in (0.1, 0.3, 1.0)),
        *(("sgd_clip", rate) for rate in (0.1, 0.3, 1.0)),
        *(("adam", rate) for rate in (1e-3, 2e-3, 4e-3)),
        *(("adam_clip", rate) for rate in (3.2e-2, 6.4e-2, 1.28e-1)),
    )
    """Rules to train with and their learning rates, each from scratch; the best rate of each rule counts."""
    train_steps: int = 120
    method: Literal["sort", "histogram", "ema"] = "histogram"
    """How the threshold is found: sort is the paper's; histogram is at most 0.8 % lower and far cheaper."""
    seeds: int = 3

    def __post_init__(self):
        for name in ("seeds", "train_steps", "probe_batches", "probe_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        missing = {"sgd", "sgd_clip", "adam", "adam_clip"} - set(self.directions)
        if missing:
            raise ValueError(f"directions leaves out {sorted(missing)}, which the claims need")
        if not self.probes or min(self.probes) < 1:
            raise ValueError(f"probes is {self.probes}; give steps of at least 1")


PRESETS = {
    "smoke": Config(
        context_length=16,
        batch_size=4,
        probes=(2,),
        probe_batch_size=4,
        trained=(("sgd", 1.0), ("sgd_clip", 1.0)),
        train_steps=3,
        seeds=1,
    ),
    "default": Config(),
    # 10,000 files in batches of 32 sequences: about 320 steps an epoch, probes after epochs 2, 5, 10 and 20.
    "paper": Config(
        model="gpt2-small",
        context_length=1024,
        batch_size=32,
        directions=get_args(Rule),
        adam_learning_rate=1e-4,
        sgd_learning_rate=2e-4,
        probes=(640, 1600, 3200, 6400),
        probe_batches=16,
        probe_batch_size=8,
        trained=(
            ("sgd", 1e-3),
            ("sgd_clip", 5e-3),
            ("adam", 2e-3),
            ("adam_clip", 3e-3),
            ("adafactor", 1e-2),
            ("adafactor_clip", 3e-2),
            ("lion", 2e-3),
            ("sign_sgd", 2e-3),
            ("normalized_sgd", 5e-4),
            ("normalized_sgd_clip", 6e-4),
        ),
        train_steps=6400,
        seeds=1,
    ),
}


def main(config: Config, run: cli.Run) -> Report:
    """Probe both trajectories, train with the rules, compare."""
    try:
        setup = prepare(config)
    except (ValueError, OSError, ImportError) as error:
        raise cli.UserError(str(error)) from error
    probed = _resumed(
        run.directory / "probes.jsonl",
        [(trainer, seed) for trainer in ("adam", "sgd") for seed in range(config.seeds)],
        lambda job: {"probes": probe(setup, *job)},
    )
    trained = _resumed(
        run.directory / "training.jsonl",
        [(rule, rate, seed) for rule, rate in config.trained for seed in range(config.seeds)],
        lambda job: {"losses": train(setup, *job)},
    )
    best = _best_rates(config, trained)
    tables = {
        f"sharpness along {trainer}'s trajectory": _probe_table(config, probed, trainer) for trainer in ("adam", "sgd")
    }
    return Report(
        claims=[*_sharpness_claims(probed), *_training_claims(best)],
        tables=tables | {"training": _training_table(config, trained)},
        figures={"sharpness": _figure(config, probed, best)},
        notes=[
            f"{setup.num_params:,} parameters; {setup.corpus.name}, fingerprint {setup.corpus.fingerprint}",
            "tables show the median over seeds; ratio: sharpness over that of SGD's direction at the same point; "
            "cos: with minus the held-out gradient; drop: of the held-out loss at the best of 24 step lengths",
            f"training: mean loss of the last {_tail(config)} of {config.train_steps} steps",
        ],
    )


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for the caches of compiled programs
class Setup:
    """What all runs share."""

    config: Config
    corpus: Any  # jaxskip.data.Corpus
    num_params: int
    init: Callable  # key -> params
    loss: Callable  # params, batch -> mean loss
    probes: Any  # held-out batches, stacked


def prepare(config: Config) -> Setup:
    """Load the data and build the model, in float32 and without fused attention, for the Hessian's sake."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxskip.data import evaluation_windows, load_corpus
    from jaxskip.models import Decoder, decoder_config

    corpus = load_corpus(config.data)
    model = Decoder(
        decoder_config(
            config.model,
            vocab_size=corpus.vocab_size,
            context_length=config.context_length,
            dtype=jnp.float32,
            attention="xla",
        )
    )
    batches = evaluation_windows(
        corpus.validation,
        batch_size=config.probe_batch_size,
        context_length=config.context_length,
        num_batches=config.probe_batches,
        vocab_size=corpus.vocab_size,
    )

    def init(key):
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    num_params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    return Setup(config, corpus, num_params, init, loss, stacked)


def make_rule(name: Rule, learning_rate, method: str = "sort"):
    """The paper's rule of that name as an Optax transformation."""
    import optax

    from jaxskip import optim

    share = {"sgd_clip": 0.1, "normalized_sgd_clip": 0.1}.get(name, 0.5 if "clip" in name else 0.0)
    options = {"fraction": share, "method": method}
    if name == "sign_sgd":
        return optax.chain(
            optim.sgd_coordinate_clip(1.0, fraction=0.0), optax.scale_by_sign(), optax.scale(learning_rate)
        )
    if name == "lion":
        return optax.lion(learning_rate, weight_decay=0.0)
    if name == "adam_clip_update":
        return optim.adam_clip_update(learning_rate, **options)
    if name.startswith("adafactor"):
        return optim.adafactor_coordinate_clip(learning_rate, min_dim_size_to_factor=32, **options)
    if name == "lion_clip_update":
        return optim.lion_coordinate_clip(learning_rate, **options)
    if name.startswith("adam"):
        return optim.adam_clip_first_moment(learning_rate, **options)
    return optim.sgd_coordinate_clip(learning_rate, normalize=name.startswith("normalized"), **options)


# The two parts


def probe(setup: Setup, trainer: Literal["adam", "sgd"], seed: int) -> list[dict]:
    """At each probe step: rule -> sharpness, cos, best_drop, best_step, of directions from the same point."""
    import jax
    import optax

    config = setup.config
    step, measure = _probe_programs(setup)
    rate = config.adam_learning_rate if trainer == "adam" else config.sgd_learning_rate
    params = setup.init(jax.random.key(seed))
    states = {name: make_rule(name, 1.0, config.method).init(params) for name in config.directions}
    found = []
    for number, batch in zip(range(max(config.probes) + 1), _batches(setup, seed), strict=False):
        states, updates = step(params, states, batch)
        if number in config.probes:
            reports = {name: measure(params, u, setup.probes) for name, u in updates.items()}
            found.append({"step": number, "rules": jax.tree.map(float, reports)})
        params = optax.tree.add_scale(params, rate, updates[trainer])
    return found


def train(setup: Setup, name: Rule, learning_rate: float, seed: int) -> list[float]:
    """The training loss of each step."""
    import jax

    tx, step = _train_program(setup, name)
    params = setup.init(jax.random.key(seed))
    state, losses = tx.init(params), []
    for _, batch in zip(range(setup.config.train_steps), _batches(setup, seed), strict=False):
        params, state, loss = step(params, state, batch, learning_rate)
        losses.append(loss)
    return [float(loss) for loss in losses]


@functools.cache
def _probe_programs(setup: Setup):
    """The directions of all rules from one gradient, and the measurement of one direction."""
    import jax

    from jaxskip.analysis import update_report

    config = setup.config
    rules = {name: make_rule(name, 1.0, config.method) for name in config.directions}

    @jax.jit
    def step(params, states, batch):
        grads = jax.grad(setup.loss)(params, batch)
        pairs = {name: rule.update(grads, states[name], params) for name, rule in rules.items()}
        updates, states = ({name: pair[i] for name, pair in pairs.items()} for i in range(2))
        return states, updates

    @jax.jit
    def measure(params, update, batches):
        return update_report(setup.loss, params, {"": update}, batches=batches)[""]

    return step, measure


@functools.cache
def _train_program(setup: Setup, name: str):
    import jax
    import optax

    rule = make_rule(name, 1.0, setup.config.method)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, rate):
        loss, grads = jax.value_and_grad(setup.loss)(params, batch)
        updates, state = rule.update(grads, state, params)
        return optax.tree.add_scale(params, rate, updates), state, loss

    return rule, step


def _batches(setup: Setup, seed: int):
    from jaxskip.data import TokenWindows

    return TokenWindows(
        setup.corpus.train,
        batch_size=setup.config.batch_size,
        context_length=setup.config.context_length,
        vocab_size=setup.corpus.vocab_size,
        seed=seed,
    )


def _resumed(path, jobs: list[tuple], work: Callable[[tuple], dict]) -> list[dict]:
    """One row a job, in a file that grows with each: those of an interrupted run are not done again."""
    from tqdm import tqdm

    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for job in tqdm(jobs[len(rows) :], desc=path.stem):
        rows.append({"job": list(job), **work(job)})
        claims.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


# The report


def _sharpness_claims(probed: list[dict]) -> list[Claim]:
    points: dict[tuple[str, int], list[dict]] = {}
    for row in probed:
        for found in row["probes"]:
            rules = found["rules"] | {"ratio": _ratios(found["rules"])}
            points.setdefault((row["job"][0], found["step"]), []).append(rules)
    first = min(step for _, step in points)

    def claim(statement, bound, value: Callable[[dict], float], holds: Callable[[float], bool], only=None):
        by_seed = [[value(rules) for rules in runs] for (_, step), runs in points.items() if only in (None, step)]
        medians = sorted(map(statistics.median, by_seed))
        single = [holds(x) for values in by_seed for x in values]
        return Claim(
            statement,
            expected=f"{bound} at each of {len(medians)} probes, median over seeds",
            measured=f"at {sum(map(holds, medians))} of them, from {medians[0]:.3g} to {medians[-1]:.3g}; "
            f"in {sum(single)} of {len(single)} single runs",
            holds=all(map(holds, medians)),
            source="arXiv 2306.00204",
        )

    return [
        claim("SGD's direction has a positive sharpness", "> 0", lambda r: r["sgd"]["sharpness"], lambda x: x > 0),
        claim(
            "clipping 10 % of the gradient lowers the sharpness of SGD's direction (ratio to SGD's)",
            "< 0.7",
            lambda r: r["ratio"]["sgd_clip"],
            lambda x: x < 0.7,
        ),
        claim(
            "Adam's direction is less sharp than SGD's (ratio to SGD's)",
            "< 0.5",
            lambda r: r["ratio"]["adam"],
            lambda x: x < 0.5,
        ),
        claim(
            "clipping 50 % in Adam's first moment lowers its sharpness further (difference of the ratios)",
            "< 0",
            lambda r: r["ratio"]["adam_clip"] - r["ratio"]["adam"],
            lambda x: x < 0,
        ),
        claim(
            f"after {first} steps SGD's best step gains more with clipped coordinates (difference of the drops)",
            "> 0",
            lambda r: r["sgd_clip"]["best_drop"] - r["sgd"]["best_drop"],
            lambda x: x > 0,
            only=first,
        ),
    ]


def _ratios(rules: dict) -> dict[str, float]:
    scale = abs(rules["sgd"]["sharpness"])
    return {name: values["sharpness"] / scale for name, values in rules.items()}


def _probe_table(config: Config, probed: list[dict], trainer: str) -> Table:
    rows = []
    for i, step in enumerate(sorted(config.probes)):
        at = [row["probes"][i]["rules"] for row in probed if row["job"][0] == trainer]
        for name in config.directions:
            median = {key: statistics.median(rules[name][key] for rules in at) for key in at[0][name]}
            ratio = statistics.median(_ratios(rules)[name] for rules in at)
            values = (median["sharpness"], ratio, median["cos"], median["best_drop"], median["best_step"])
            rows.append([step, name, *values])
    return Table(["step", "direction", "sharpness", "ratio", "cos", "drop", "length of the step"], rows)


def _tail(config: Config) -> int:
    return max(config.train_steps // 6, 1)


def _finals(config: Config, trained: list[dict]) -> dict[tuple[str, float], list[float]]:
    """Mean loss of the last steps, by rule and rate, in the order of the seeds."""
    finals: dict[tuple[str, float], list[float]] = {}
    for row in trained:
        name, rate, _ = row["job"]
        finals.setdefault((name, rate), []).append(statistics.fmean(row["losses"][-_tail(config) :]))
    return finals


def _training_table(config: Config, trained: list[dict]) -> Table:
    rows = [
        [name, rate, statistics.median(losses), min(losses), max(losses)]
        for (name, rate), losses in _finals(config, trained).items()
    ]
    return Table(["rule", "learning rate", "training loss (median)", "least", "most"], rows)


def _best_rates(config: Config, trained: list[dict]) -> dict[str, dict]:
    """rule -> its best rate by the median loss (a diverged one is the worst), losses by seed, and curves."""
    best: dict[str, dict] = {}
    for (name, rate), losses in _finals(config, trained).items():
        score = statistics.median(loss if math.isfinite(loss) else math.inf for loss in losses)
        if name not in best or score < best[name]["score"]:
            curves = [row["losses"] for row in trained if row["job"][:2] == [name, rate]]
            best[name] = {"rate": rate, "score": score, "losses": losses, "curves": curves}
    return best


def _training_claims(best: dict[str, dict]) -> list[Claim]:
    found = []
    for plain, clip in (("sgd", "sgd_clip"), ("adam", "adam_clip")):
        if plain in best and clip in best:
            pairs = list(zip(best[plain]["losses"], best[clip]["losses"], strict=True))
            found.append(
                Claim(
                    f"{plain} ends at a lower training loss with clipped coordinates, each at its best learning rate",
                    expected="lower on every seed",
                    measured="; ".join(f"{b:.3f} against {a:.3f}" for a, b in pairs)
                    + f" (rates {best[clip]['rate']:g} and {best[plain]['rate']:g})",
                    holds=all(b < a for a, b in pairs),
                    source="arXiv 2306.00204, abstract",
                )
            )
    return found


_COLORS = {"sgd": "#c44e52", "adam": "#4c72b0", "adafactor": "#55a868", "lion": "#8172b2"}


def _color(name: str) -> str:
    return next((color for prefix, color in _COLORS.items() if name.startswith(prefix)), "#8c8c8c")


def _figure(config: Config, probed: list[dict], best: dict[str, dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    *panels, curves = figure.subplots(1, 3)
    lowest = min(min(_ratios(found["rules"]).values()) for row in probed for found in row["probes"])
    scale = {"value": "log"} if lowest > 0 else {"value": "symlog", "linthresh": 1e-2}
    for axes, trainer in zip(panels, ("adam", "sgd"), strict=True):
        names = [name for name in config.directions if name != "sgd"]
        for i, step in enumerate(sorted(config.probes)):
            for row in probed:
                if row["job"][0] == trainer:
                    ratios = _ratios(row["probes"][i]["rules"])
                    places = [j + 0.2 * (i - (len(config.probes) - 1) / 2) for j in range(len(names))]
                    label = f"{step} steps" if row["job"][1] == 0 else None
                    shade = str(0.65 * (1 - (i + 1) / len(config.probes)))
                    axes.plot(places, [ratios[n] for n in names], "o", color=shade, markersize=4, label=label)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale(**scale)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set(title=f"trajectory of {trainer}", ylabel="sharpness / that of SGD's direction")
    panels[0].legend(frameon=False)
    for name, entry in best.items():
        means = [statistics.fmean(values) for values in zip(*entry["curves"], strict=True)]
        style = "--" if "clip" in name else "-"
        curves.plot(range(1, len(means) + 1), means, style, color=_color(name), label=f"{name}, {entry['rate']:g}")
    curves.set(xlabel="steps", ylabel="training loss (nats)", title="trained at the best learning rate")
    curves.legend(frameon=False)
    for axes in (*panels, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
