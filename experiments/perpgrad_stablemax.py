"""Grokking without weight decay: ⊥Grad and StableMax against plain AdamW (arXiv 2501.04697).

    python -m experiments.perpgrad_stablemax                                     # 2 minutes on two CPU cores
    python -m experiments.perpgrad_stablemax --recipes perp_sgd --epochs 500
    python -m experiments.perpgrad_stablemax --preset paper                      # all rows of the paper: a GPU

A small network learns a + b mod 113 from 40 % of all pairs, full batch. AdamW memorises them and stays at chance on the
rest: its gradient aligns with the weights (naive loss minimisation), the logits only grow, and in 16 bits the softmax
collapses. ⊥AdamW, the same without that component, generalises; so does strong weight decay, the control which shows
that ⊥Grad explains grokking rather than being the fastest way to it.

The `paper` preset adds StableMax (100,000 epochs), the sweep over the softmax's precision, ⊥SGD, and the other tasks;
the rows in float64 are emulated on TPU: run those on CPU or GPU. The transformer is ``--model transformer`` with
``--adamw.weight-decay 1.5 --adamw.learning-rate 0.001 --perp-adamw.learning-rate 0.001 --epochs 5000``.
"""

import contextlib
import dataclasses
import math
from typing import Any, Literal

from experiments import cli
from experiments.claims import Claim, Report, Table

Name = Literal["adamw", "perp_adamw", "adamw_decay", "perp_sgd", "stablemax", "softmax16", "softmax32", "softmax64"]
Task = Literal["add", "subtract", "multiply", "parity"]
DTypes = Literal["bfloat16", "float16", "float32", "float64"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train."""

    loss: Literal["softmax", "stablemax"] = "softmax"
    softmax_dtype: DTypes = "float32"
    """Precision that the softmax cross-entropy is computed in."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of everything else."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    perp: Literal["none", "leaf", "global", "axis"] = "none"
    """What ⊥Grad takes as one vector, or none of it."""
    rescale: bool = True
    """Restore the gradient's norm (authors' code) or not (paper)."""
    learning_rate: float = 0.005
    b2: float = 0.99
    eps: float = 1e-25
    weight_decay: float = 0.0
    momentum: float = 0.0
    """Of SGD."""
    logit_scale: float = 1.0
    """The logits times this, and the learning rate divided by its square."""
    epochs: int | None = None
    """None takes the run's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the same network on the same pairs with several recipes, and watch train and test accuracy."""

    recipes: tuple[Name, ...] = ("adamw", "perp_adamw", "adamw_decay")
    tasks: tuple[Task, ...] = ("add",)
    """Arithmetic modulo `modulus`, or the parity of 3 of 43 bits."""
    model: Literal["mlp", "transformer"] = "mlp"
    modulus: int = 113
    width: int = 200
    """Hidden units of the MLP's two layers."""
    train_fraction: float = 0.4
    """Of all pairs; the rest is the test set. Parity has 2000 examples and takes half."""
    epochs: int = 300
    eval_every: int = 10
    seeds: int = 3
    seed: int = 0
    adamw: Recipe = Recipe()
    perp_adamw: Recipe = Recipe(perp="leaf")
    adamw_decay: Recipe = Recipe(learning_rate=0.01, weight_decay=8.0, b2=0.999, eps=1e-8)
    perp_sgd: Recipe = Recipe(
        loss="stablemax", dtype="float64", optimizer="sgd", perp="leaf", learning_rate=10.0, momentum=0.8
    )
    stablemax: Recipe = Recipe(loss="stablemax", learning_rate=0.01, b2=0.999)
    softmax16: Recipe = Recipe(softmax_dtype="float16", learning_rate=5e-4)
    softmax32: Recipe = Recipe(learning_rate=5e-4)
    softmax64: Recipe = Recipe(softmax_dtype="float64", learning_rate=5e-4)

    def __post_init__(self):
        if not self.recipes or not self.tasks:
            raise ValueError("recipes and tasks must each name at least one")
        if not 0 < self.train_fraction < 1:
            raise ValueError(f"train_fraction is {self.train_fraction}; it must be between 0 and 1")
        if self.model == "transformer" and "parity" in self.tasks:
            raise ValueError("the transformer reads pairs of numbers: leave parity to --model mlp")


PRESETS = {
    "smoke": Config(modulus=11, width=24, epochs=6, eval_every=3, seeds=1),
    "default": Config(),
    "paper": Config(
        recipes=("adamw", "perp_adamw", "adamw_decay", "perp_sgd", "stablemax", "softmax16", "softmax32", "softmax64"),
        tasks=("add", "multiply", "parity"),
        epochs=500,
        eval_every=20,
        stablemax=Recipe(loss="stablemax", learning_rate=0.01, b2=0.999, epochs=100_000),
        softmax16=Recipe(softmax_dtype="float16", learning_rate=5e-4, epochs=20_000),
        softmax32=Recipe(learning_rate=5e-4, epochs=20_000),
        softmax64=Recipe(softmax_dtype="float64", learning_rate=5e-4, epochs=20_000),
    ),
}


def main(config: Config, run: cli.Run) -> Report:
    """Train with each recipe on each task and seed, then compare."""
    from jaxskip.training import CheckpointError

    try:
        curves = {
            (task, name): train(getattr(config, name), task, config, run.directory / f"{task}-{name}")
            for task in config.tasks
            for name in config.recipes
        }
    except (CheckpointError, FloatingPointError, OSError) as error:
        raise cli.UserError(str(error)) from error
    return report(config, curves)


# The data


def dataset(task: Task, config: Config, seed: int) -> tuple[dict, dict, int]:
    """Train and test examples {"x": [N, inputs], "label": [N]}, and the number of classes."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if task == "parity":
        x = rng.integers(0, 2, (2000, 43)).astype(np.int32)
        label, classes, share = x[:, :3].sum(1) % 2, 2, 0.5
    else:
        first = 1 if config.model == "transformer" else 0  # as the authors' two data sets
        numbers = np.arange(first, config.modulus, dtype=np.int32)
        x = np.stack(np.meshgrid(numbers, numbers, indexing="ij"), -1).reshape(-1, 2)
        a, b = x.T
        label = {"add": a + b, "subtract": a - b, "multiply": a * b}[task] % config.modulus
        classes, share = config.modulus, config.train_fraction
    order = rng.permutation(len(x))
    cut = round(share * len(x))
    train, test = ({"x": x[rows], "label": label[rows].astype(np.int32)} for rows in (order[:cut], order[cut:]))
    return train, test, classes


class FullBatch:
    """The whole training set, again and again."""

    def __init__(self, batch: dict):
        self._batch = batch

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        return self._batch

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        """Nothing to restore: every batch is the same."""


# The networks


def make_model(task: Task, classes: int, config: Config):
    """(key -> params, (params, x) -> logits); the MLP has no biases and PyTorch's initialisation, as the authors'."""
    import jax

    if config.model == "transformer":
        return _transformer(classes)
    inputs = 43 if task == "parity" else 2 * config.modulus
    sizes = (inputs, config.width, config.width, classes)

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            f"layer{i}": jax.random.uniform(keys[i - 1], sizes[i - 1 : i + 1], minval=-1, maxval=1)
            / sizes[i - 1] ** 0.5
            for i in (1, 2, 3)
        }

    def apply(params, x):
        first = params["layer1"]
        if task == "parity":
            hidden = x.astype(first.dtype) @ first
        else:  # two one-hot vectors times the matrix
            hidden = first[x[:, 0]] + first[config.modulus + x[:, 1]]
        hidden = jax.nn.relu(jax.nn.relu(hidden) @ params["layer2"])
        return hidden @ params["layer3"]

    return init, apply


def _transformer(classes: int):
    """One post-norm encoder layer of width 128 with 4 heads over the two numbers, read at the second."""
    import flax.linen as nn
    import jax.numpy as jnp

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Embed(classes, 128)(x) + self.param("position", nn.initializers.normal(1.0), (1, 2, 128))
            h = nn.LayerNorm()(h + nn.MultiHeadDotProductAttention(4)(h))
            h = nn.LayerNorm()(h + nn.Dense(128)(nn.relu(nn.Dense(2048)(h))))
            return nn.Dense(classes)(h[:, -1])

    model = Encoder()
    return lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"], lambda p, x: model.apply(
        {"params": p}, x
    )


# Training


def make_optimizer(recipe: Recipe):
    """The recipe's chain: ⊥Grad before the optimizer."""
    import optax

    from jaxskip.optim import perp_grad

    rate = recipe.learning_rate / recipe.logit_scale**2
    if recipe.optimizer == "sgd":
        rule = optax.chain(
            optax.add_decayed_weights(recipe.weight_decay), optax.sgd(rate, momentum=recipe.momentum or None)
        )
    else:
        rule = optax.adamw(rate, b2=recipe.b2, eps=recipe.eps, weight_decay=recipe.weight_decay)
    if recipe.perp == "none":
        return rule
    return optax.chain(perp_grad(scope=recipe.perp, rescale=recipe.rescale), rule)


def _x64(recipe: Recipe):
    """64-bit types for the recipes that ask for them; JAX before 0.8 has the switch elsewhere."""
    if "float64" not in (recipe.dtype, recipe.softmax_dtype):
        return contextlib.nullcontext()
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def train(recipe: Recipe, task: Task, config: Config, directory) -> list[list[dict]]:
    """Train one network a seed, resuming what `directory` holds; for each the rows of its metrics.jsonl."""
    import jax
    import jax.numpy as jnp

    from jaxskip import losses, training

    sets = {seed: dataset(task, config, seed) for seed in range(config.seed, config.seed + config.seeds)}
    init, apply = make_model(task, sets[config.seed][2], config)
    epochs = recipe.epochs or config.epochs
    mesh = training.make_mesh(1, devices=jax.devices()[:1])
    tx = make_optimizer(recipe)

    def loss_fn(params, batch, key):
        del key
        logits = recipe.logit_scale * apply(params, batch["x"])
        if recipe.loss == "stablemax":
            each = losses.stablemax_cross_entropy_with_integer_labels(logits, batch["label"])
        else:
            each = losses.cross_entropy_in_dtype(logits, batch["label"], jnp.dtype(recipe.softmax_dtype))
        return each.mean(), {"train_accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}

    def train_seed(seed):
        train_set, test_set, _ = sets[seed]
        state = training.init_state(
            lambda key: jax.tree.map(lambda w: w.astype(recipe.dtype), init(key)), tx, jax.random.key(seed), mesh
        )
        _, rows = training.fit(
            state,
            step,
            FullBatch(train_set),
            mesh=mesh,
            steps=epochs,
            directory=directory / str(seed),
            save_every=max(epochs // 4, 50),
            evaluate=lambda params: {name: float(v) for name, v in measure(params, train_set, test_set).items()},
            eval_every=config.eval_every,
            title=f"{directory.name}-{seed}",
        )
        return rows

    with _x64(recipe):
        step = training.make_train_step(loss_fn, tx)
        measure = jax.jit(_measurement(loss_fn, apply, recipe.logit_scale))
        return [train_seed(seed) for seed in sets]


def _measurement(loss_fn, apply, logit_scale: float):
    """(params, train set, test set) -> scalars: test accuracy, collapse by dtype, alignment and length by layer."""
    import jax
    import jax.numpy as jnp

    from jaxskip.analysis import nlm_alignment, softmax_collapse_fraction, zero_loss_fraction

    def measure(params, train_set, test_set):
        grads = jax.grad(lambda p: loss_fn(p, train_set, None)[0])(params)
        logits = logit_scale * apply(params, train_set["x"])
        right = apply(params, test_set["x"]).argmax(-1) == test_set["label"]
        values = {"test_accuracy": right.mean(), "zero_loss": zero_loss_fraction(logits, train_set["label"])}
        for dtype in ("bfloat16", "float16", "float32"):
            values[f"collapse_{dtype}"] = softmax_collapse_fraction(logits, dtype)
        for prefix, tree in (
            ("cosine", nlm_alignment(params, grads)),
            ("length", jax.tree.map(lambda w: jnp.sqrt(jnp.sum(w * w)), params)),
        ):
            for path, value in jax.tree.leaves_with_path(tree):
                values[f"{prefix}_{jax.tree_util.keystr(path, simple=True, separator='_')}"] = value
        return values

    return measure


# The report


def report(config: Config, curves: dict) -> Report:
    """Judge the last epoch of every seed."""
    header = ["task", "recipe", "epochs", "train accuracy", "test accuracy", "epoch of 90 % test",
              "collapse bf16 / f16 / f32", "cos(w, -g) by layer", "length of w by layer", "seconds"]  # fmt: skip
    return Report(
        claims=[*_claims(config, curves), _margins_claim()],
        tables={
            "last epoch (each seed)": Table(header, [_row(task, name, runs) for (task, name), runs in curves.items()]),
            "loss and gradient of the label's logit at logits (m, 0, 0, -m)": _margins_table(),
        },
        figures={f"curves_{task}": _figure(task, config, curves) for task in config.tasks},
        notes=[
            f"{config.model}, {config.seeds} seed(s), full batch; modulus {config.modulus}, "
            f"{config.train_fraction:.0%} of the pairs are trained on",
        ],
    )


def _last(runs: list[list[dict]], name: str) -> list[float]:
    return [rows[-1][name] for rows in runs]


def _first_above(rows: list[dict], bound: float) -> int | None:
    return next((row["step"] for row in rows if row.get("test_accuracy", 0) >= bound), None)


def _list(values) -> str:
    return ", ".join("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)


def _row(task, name, runs) -> list[Any]:
    layers = [key.removeprefix("cosine_") for key in runs[0][-1] if key.startswith("cosine_")]
    few = layers if len(layers) <= 3 else []

    def by_layer(prefix, digits):
        return ", ".join(f"{sum(_last(runs, f'{prefix}_{n}')) / len(runs):.{digits}f}" for n in few) or None

    collapse = (sum(_last(runs, f"collapse_{t}")) / len(runs) for t in ("bfloat16", "float16", "float32"))
    return [
        task,
        name,
        runs[0][-1]["step"],
        _list(_last(runs, "train_accuracy")),
        _list(_last(runs, "test_accuracy")),
        _list(_first_above(rows, 0.9) for rows in runs),
        " / ".join(f"{share:.3g}" for share in collapse),
        by_layer("cosine", 2),
        by_layer("length", 0),
        round(sum(_last(runs, "seconds")) / len(runs), 1),
    ]


def _claims(config: Config, curves: dict) -> list[Claim]:
    """The claims about addition, where the recipes are the paper's and the run long enough."""
    if config.model != "mlp" or config.epochs < 200 or "add" not in config.tasks:
        return []
    found = []
    grokked = [("perp_adamw", "⊥AdamW", 0.9, "section 5 and figure 6"), ("adamw_decay", "control: AdamW with weight "
                "decay 8", 0.9, "the authors' issue 8"), ("perp_sgd", "⊥SGD with StableMax", 0.9, "section 5.1"),
               ("stablemax", "AdamW with StableMax", 0.9, "section 3.3")]  # fmt: skip
    for name, title, bound, source in grokked:
        if runs := curves.get(("add", name)):
            test = _last(runs, "test_accuracy")
            found.append(
                Claim(
                    f"{title}{'' if 'decay' in title else ', without weight decay,'} generalises on every seed within "
                    f"{runs[0][-1]['step']} epochs",
                    expected=f"test accuracy >= {bound:.0%}",
                    measured=_list(test),
                    holds=min(test) >= bound,
                    source=f"arXiv 2501.04697, {source}",
                )
            )
    if runs := curves.get(("add", "adamw")):
        train, test, cosine = (_last(runs, n) for n in ("train_accuracy", "test_accuracy", "cosine_layer3"))
        narrow, wide = _last(runs, "collapse_bfloat16"), _last(runs, "collapse_float32")
        found += [
            Claim(
                "AdamW on the same pairs memorises and does not generalise",
                expected="train accuracy 100 %, test accuracy <= 5 %",
                measured=f"train {_list(train)}; test {_list(test)}",
                holds=min(train) == 1 and max(test) <= 0.05,
                source="arXiv 2501.04697, figure 6",
            ),
            Claim(
                "its gradient then points along the output layer's weights (naive loss minimisation)",
                expected="cos(w, -g) of layer 3 >= 0.8",
                measured=_list(cosine),
                holds=min(cosine) >= 0.8,
                source="arXiv 2501.04697, section 4",
            ),
            Claim(
                "the softmax of its logits has collapsed in bfloat16 and not in float32: the delay comes first",
                expected="share >= 0.9 in bfloat16, 0 in float32",
                measured=f"{_list(narrow)}; {_list(wide)}",
                holds=min(narrow) >= 0.9 and max(wide) == 0,
                source="arXiv 2501.04697, section 3; bounds ours",
            ),
        ]
    return found


MARGINS = (10.0, 30.0, 1e3, 1e6)


def _margins() -> list[tuple[float, ...]]:
    """(softmax loss, its slope, StableMax loss, its slope) in float32 at each margin."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxskip.losses import stablemax_cross_entropy_with_integer_labels

    found = []
    for m in MARGINS:
        z, label = jnp.array([m, 0.0, 0.0, -m]), jnp.array(0)
        row = []
        for loss in (optax.softmax_cross_entropy_with_integer_labels, stablemax_cross_entropy_with_integer_labels):
            value, grad = jax.jit(jax.value_and_grad(loss))(z, label)
            row += [float(value), float(grad[0])]
        found.append(tuple(row))
    return found


def _margins_table() -> Table:
    header = ["m", "softmax loss", "slope", "StableMax loss", "slope"]
    return Table(header, [[f"{m:g}", *(f"{v:.2g}" for v in row)] for m, row in zip(MARGINS, _margins(), strict=True)])


def _margins_claim() -> Claim:
    rows = dict(zip(MARGINS, _margins(), strict=True))
    collapsed = all(rows[m][:2] == (0.0, 0.0) for m in MARGINS[1:])
    return Claim(
        "in float32 softmax's loss and gradient are exactly zero from a margin of 30 on, StableMax's never are",
        expected="StableMax: 0.063 at 30, 0.0020 at 1e3, slope below 0 at 1e6",
        measured=f"{rows[30.0][2]:.3f}, {rows[1e3][2]:.4f}, slope {rows[1e6][3]:.1e}; softmax zero: {collapsed}",
        holds=collapsed
        and math.isclose(rows[30.0][2], 0.063, abs_tol=1e-3)
        and math.isclose(rows[1e3][2], 2e-3, abs_tol=1e-4)
        and rows[1e6][3] < 0,
        source="arXiv 2501.04697, section 3",
    )


_COLORS = {"adamw": "#4c72b0", "perp_adamw": "#c44e52", "adamw_decay": "#8c8c8c", "perp_sgd": "#dd8452",
           "stablemax": "#55a868", "softmax16": "#64b5cd", "softmax32": "#8172b3", "softmax64": "#937860"}  # fmt: skip


def _figure(task, config: Config, curves: dict):
    """Train and test accuracy by epoch, the alignment of the last layer, and the collapse in bfloat16."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    accuracy, cosine, collapse = figure.subplots(1, 3)
    for name in config.recipes:
        for i, rows in enumerate(curves[task, name]):
            evaluated = [row for row in rows if "test_accuracy" in row]
            steps = [row["step"] for row in evaluated]
            options = {"color": _COLORS[name], "linewidth": 1.3}
            label = name if i == 0 else None
            accuracy.plot([r["step"] for r in rows], [r["train_accuracy"] for r in rows], ":", **options)
            accuracy.plot(steps, [row["test_accuracy"] for row in evaluated], label=label, **options)
            if "cosine_layer3" in evaluated[-1]:
                cosine.plot(steps, [row["cosine_layer3"] for row in evaluated], label=label, **options)
            collapse.plot(steps, [row["collapse_bfloat16"] for row in evaluated], label=label, **options)
    accuracy.plot([], [], ":", color="black", label="train (dotted)")
    accuracy.set(ylabel="accuracy, test solid", title=task)
    cosine.set(ylabel="cos(w, -g), layer 3", title="naive loss minimisation")
    collapse.set(ylabel="share of one-hot softmaxes in bfloat16", title="softmax collapse")
    for axes in (accuracy, cosine, collapse):
        axes.set(xlabel="epoch", ylim=(-0.05, 1.05))
        axes.set_xscale("log" if max(len(rows) for rows in curves[task, config.recipes[0]]) > 2000 else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    accuracy.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
