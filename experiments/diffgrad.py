"""diffGrad against Adam at the same and at half the learning rate (arXiv 1909.11015).

    python -m experiments.diffgrad                                       # digits and the paper's three functions
    python -m experiments.diffgrad --preset paper                        # ResNet-50 on CIFAR-10: a GPU or TPU, hours
    python -m experiments.diffgrad --preset paper --data tfds:cifar100 --batch-size 32

The published numbers came from code whose previous gradient was the present one: Adam at half the learning rate. The
repaired rule is close to that as long as gradients change by much less than 1, so a comparison needs Adam at both
rates. The default shows it where a CPU can. Digits come with scikit-learn; CIFAR with TensorFlow Datasets, which needs
TensorFlow to prepare pictures (once).
"""

import dataclasses
import functools
import json
import math
from typing import Any, Literal

from experiments import claims, cli
from experiments.claims import Claim, Report, Table


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a classifier with Adam, Adam at half the learning rate, and diffGrad."""

    data: str = "digits"
    """digits (8 x 8, 10 classes) or tfds:NAME, a set of pictures with splits train and test."""
    data_dir: str | None = None
    """Folder of TensorFlow Datasets; None takes its default."""
    model: Literal["mlp", "resnet"] = "mlp"
    hidden: int = 128
    """Width of the MLP's hidden layer."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Bottleneck blocks in each stage of the ResNet; (3, 4, 6, 3) is ResNet-50."""
    width: int = 64
    """Channels of the ResNet's first stage."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    epochs: int = 30
    drop_after: int | None = None
    """Epochs until the learning rate falls to a tenth."""
    batch_size: int = 64
    augment: bool = False
    """Random crops (4 pixels of padding) and flips."""
    seeds: int = 5
    """Runs of each optimizer and rate, seeded 0, 1, ..."""

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch_size", 1), ("seeds", 2), ("hidden", 1), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.learning_rates:
            raise ValueError("learning_rates is empty; give at least one")


PRESETS = {
    "smoke": Config(epochs=2, seeds=2, learning_rates=(3e-3,)),
    "default": Config(),
    # The set-up of the authors' code and of its reruns; the model and data of the paper's tables.
    "paper": Config(
        data="tfds:cifar10",
        model="resnet",
        learning_rates=(1e-3,),
        epochs=100,
        drop_after=80,
        batch_size=128,
        augment=True,
        seeds=3,
    ),
}

ADAM, HALF, DIFFGRAD = "Adam", "Adam, half the rate", "diffGrad"
_COLORS = {ADAM: "#4c72b0", HALF: "#8c8c8c", DIFFGRAD: "#c44e52"}


def main(config: Config, run: cli.Run) -> Report:
    """Train with each optimizer, rate and seed; then the paper's one-dimensional functions."""
    paths = one_dimensional_paths()
    try:
        data = load(config.data, config.data_dir)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise cli.UserError(str(error)) from error
    rows = train_all(config, data, run)
    accuracy, table = _accuracies(config, rows)
    return Report(
        claims=[*_toy_claims(paths), *_training_claims(config, rows, accuracy)],
        tables={"test accuracy": table, "one dimension": _toy_table(paths)},
        figures={"diffgrad": _figure(config, rows, accuracy, paths)},
        notes=[
            f"{config.data}: {len(data['train'][1])} training and {len(data['test'][1])} test pictures; "
            f"{config.seeds} seeds, +- is one standard error",
            "friction is the mean coefficient over all coordinates and the steps of the last epoch; at 0.5 diffGrad is "
            "Adam at half the rate",
        ],
    )


# Data and models


def load(source: str, data_dir: str | None = None) -> dict[str, Any]:
    """{"train" and "test": (pictures [N, H, W, C] in float32, -1 to 1; labels [N] int32)}."""
    import numpy as np

    if source == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        pictures = (digits.images[order, :, :, None] / 8 - 1).astype(np.float32)
        labels = digits.target[order].astype(np.int32)
        return {"train": (pictures[:1400], labels[:1400]), "test": (pictures[1400:], labels[1400:])}
    if not source.startswith("tfds:"):
        raise ValueError(f"data is {source!r}; it must be 'digits' or 'tfds:NAME'")
    import tensorflow_datasets as tfds

    builder = tfds.builder(source.removeprefix("tfds:"), data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    data = {}
    for split in ("train", "test"):
        examples = list(builder.as_data_source(split))
        pictures = np.stack([example["image"] for example in examples])
        data[split] = (
            pictures.astype(np.float32) / 127.5 - 1,
            np.array([example["label"] for example in examples], np.int32),
        )
    return data


def make_model(config: Config, classes: int):
    """A Flax module: ``apply(variables, pictures, train)`` -> logits."""
    import flax.linen as nn
    import jax.numpy as jnp

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(config.hidden)(x.reshape(x.shape[0], -1)))
            return nn.Dense(classes)(x)

    class ResNet(nn.Module):
        """ResNet with bottlenecks and, for small pictures, a 3 x 3 stem without pooling."""

        @nn.compact
        def __call__(self, x, train):
            norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
            conv = functools.partial(nn.Conv, use_bias=False)
            x = nn.relu(norm()(conv(config.width, (3, 3))(x)))
            for stage, count in enumerate(config.blocks):
                channels = config.width * 2**stage
                for block in range(count):
                    stride = 2 if stage and not block else 1
                    y = nn.relu(norm()(conv(channels, (1, 1))(x)))
                    y = nn.relu(norm()(conv(channels, (3, 3), strides=stride, padding=1)(y)))
                    y = norm()(conv(4 * channels, (1, 1))(y))
                    if x.shape != y.shape:
                        x = norm()(conv(4 * channels, (1, 1), strides=stride)(x))
                    x = nn.relu(x + y)
            return nn.Dense(classes)(jnp.mean(x, (1, 2)))

    return MLP() if config.model == "mlp" else ResNet()


def _augmented(pictures, key):
    import jax
    import jax.numpy as jnp

    def one(picture, key):
        flip, place = jax.random.split(key)
        height, width, _ = picture.shape
        row, column = jax.random.randint(place, (2,), 0, 9)
        padded = jnp.pad(picture, ((4, 4), (4, 4), (0, 0)))
        crop = jax.lax.dynamic_slice(padded, (row, column, 0), (height, width, picture.shape[2]))
        return jnp.where(jax.random.bernoulli(flip), crop[:, ::-1], crop)

    return jax.vmap(one)(pictures, jax.random.split(key, len(pictures)))


# Training


def train_all(config: Config, data, run: cli.Run) -> list[dict]:
    """One row for each optimizer, rate and seed; rows of an interrupted run are kept, each as it is finished."""
    from tqdm import tqdm

    finished = run.directory / "runs.jsonl"
    rows = [json.loads(line) for line in finished.read_text().splitlines()] if finished.exists() else []
    done = {(row["optimizer"], row["learning_rate"], row["seed"]) for row in rows}
    todo = [
        (name, rate, seed)
        for rate in config.learning_rates
        for name in (ADAM, HALF, DIFFGRAD)
        for seed in range(config.seeds)
        if (name, rate, seed) not in done
    ]
    steps = _programs(config, data)
    for name, rate, seed in tqdm(todo, desc="runs"):
        rows.append({"optimizer": name, "learning_rate": rate, "seed": seed} | train(steps, config, name, rate, seed))
        claims.write_atomic(finished, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def train(steps, config: Config, name: str, learning_rate: float, seed: int) -> dict:
    """Test accuracy, training loss and mean friction (nan for Adam) of each epoch."""
    import jax

    init, epoch, evaluate = steps[DIFFGRAD if name == DIFFGRAD else ADAM]
    scale = 0.5 if name == HALF else 1.0
    key = jax.random.key(seed)
    state = init(key)
    row = {"accuracy": [], "loss": [], "friction": []}
    for number in range(config.epochs):
        dropped = 0.1 if config.drop_after is not None and number >= config.drop_after else 1.0
        state, loss, friction = epoch(state, jax.random.fold_in(key, number), scale * dropped * learning_rate)
        row["loss"].append(float(loss))
        row["friction"].append(float(friction))
        row["accuracy"].append(float(evaluate(state)))
    return row


def _programs(config: Config, data) -> dict[str, tuple]:
    """For Adam and diffGrad: jitted init(key), epoch(state, key, learning rate) and evaluate(state)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxskip.optim import diffgrad_friction, scale_by_diffgrad

    pictures, labels = map(jnp.asarray, data["train"])
    batches = len(labels) // config.batch_size
    if not batches:
        raise cli.UserError(f"a batch of {config.batch_size} is more than the {len(labels)} training pictures")
    model = make_model(config, int(np.max(data["train"][1])) + 1)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, False))

    def evaluate(state):
        variables, _ = state
        x, y = data["test"]
        hits = [np.argmax(apply(variables, x[i : i + 1000]), 1) == y[i : i + 1000] for i in range(0, len(y), 1000)]
        return np.concatenate(hits).mean()

    def programs(rule):
        @jax.jit
        def init(key):
            variables = model.init(key, pictures[:1], False)
            return variables, rule.init(variables["params"])

        def step(carry, batch):
            (variables, opt_state), rate = carry
            indices, key = batch
            x, y = pictures[indices], labels[indices]
            x = _augmented(x, key) if config.augment else x

            def loss_fn(params):
                logits, changed = model.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

            (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
            friction = jnp.nan
            if hasattr(opt_state, "prev_grad"):
                xi = jax.tree.map(lambda prev, g: diffgrad_friction(prev, g).sum(), opt_state.prev_grad, grads)
                friction = optax.tree.sum(xi) / optax.tree.size(grads)
            updates, opt_state = rule.update(grads, opt_state)
            params = jax.tree.map(lambda p, u: p - rate * u, variables["params"], updates)
            return ((variables | changed | {"params": params}, opt_state), rate), (loss, friction)

        @functools.partial(jax.jit, donate_argnums=0)
        def epoch(state, key, rate):
            order = jax.random.permutation(key, len(labels))[: batches * config.batch_size]
            keys = jax.random.split(jax.random.fold_in(key, 1), batches)
            (state, _), (losses, frictions) = jax.lax.scan(step, (state, rate), (order.reshape(batches, -1), keys))
            return state, losses.mean(), frictions.mean()

        return init, epoch, evaluate

    return {ADAM: programs(optax.scale_by_adam()), DIFFGRAD: programs(scale_by_diffgrad())}


# The paper's one-dimensional functions


def one_dimensional_paths() -> dict[str, dict[str, Any]]:
    """Function -> rule -> the 299 positions from x = -1 that the authors' notebook plots (lr 0.1, b1 0.95)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxskip.optim import diffgrad

    def slopes(x):
        f1, f2, f3 = x
        pieces = [f3 <= -0.5, f3 <= -0.4, f3 <= 0, f3 <= 0.4, f3 <= 0.5]
        return jnp.stack(
            [
                jnp.where(f1 <= 0, 2 * f1 + 0.6, 2 * f1 - 0.4),
                jnp.where(f2 <= -0.9, -40.0, f2 * jnp.cos(8 * f2) + jnp.sin(8 * f2) + 3 * f2 * f2),
                jnp.select(pieces, [2 * f3, 1.0, -7 / 8, 7 / 8, -1.0], 2 * f3),
            ]
        )

    rules = {
        ADAM: optax.adam(0.1, b1=0.95),
        HALF: optax.adam(0.05, b1=0.95),
        DIFFGRAD: diffgrad(0.1, b1=0.95, eps_mode="optax"),
        "without absolute value": diffgrad(0.1, b1=0.95, friction="sigmoid", eps_mode="optax"),
        "wide": diffgrad(0.1, b1=0.95, friction="wide_abs_sigmoid", eps_mode="optax"),
    }

    def walk(rule):  # the rules are elementwise, so that one walk in three dimensions is three in one
        def step(carry, _):
            x, state = carry
            updates, state = rule.update(slopes(x), state, x)
            return (x + updates, state), x + updates

        start = jnp.full(3, -1.0)
        return jax.lax.scan(step, (start, rule.init(start)), length=299)[1]

    walks = jax.jit(lambda: [walk(rule) for rule in rules.values()])()
    return {
        name: {rule: np.asarray(path)[:, i] for rule, path in zip(rules, walks, strict=True)}
        for i, name in enumerate(("F1", "F2", "F3"))
    }


def _toy_claims(paths) -> list[Claim]:
    ends = {rule: float(path[-1]) for rule, path in paths["F1"].items()}
    wanted = {ADAM: 0.2, DIFFGRAD: -0.3, HALF: -0.3}
    return [
        Claim(
            f"on F1 {rule} ends in the {'better minimum, -0.3' if x < 0 else 'poorer minimum, 0.2'}",
            expected=f"{x} +- 0.001",
            measured=round(ends[rule], 5),
            holds=abs(ends[rule] - x) <= 1e-3,
            source="arXiv 1909.11015" if rule != HALF else "ours: the control, so friction is not what F1 shows",
        )
        for rule, x in wanted.items()
    ]


def _toy_table(paths) -> Table:
    rows = [
        [f"{name}, {rule}", *(round(float(path[n - 1]), 6) for n in (10, 50, 299))]
        for name, walks in paths.items()
        for rule, path in walks.items()
    ]
    return Table(["function, rule", "x after 10 steps", "50 steps", "299 steps"], rows)


# The report


def _mean(values) -> float:
    return sum(values) / len(values)


def _standard_error(values) -> float:
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _accuracies(config: Config, rows) -> tuple[dict[tuple[str, float], list[float]], Table]:
    """Final test accuracies in percent, by optimizer and rate, in the order of the seeds; and the table of them."""
    accuracy, table = {}, []
    for rate in config.learning_rates:
        for name in (ADAM, HALF, DIFFGRAD):
            chosen = [row for row in rows if (row["optimizer"], row["learning_rate"]) == (name, rate)]
            chosen.sort(key=lambda row: row["seed"])
            values = accuracy[name, rate] = [100 * row["accuracy"][-1] for row in chosen]
            friction = _mean([row["friction"][-1] for row in chosen]) if name == DIFFGRAD else None
            loss = _mean([row["loss"][-1] for row in chosen])
            table.append([rate, name, round(_mean(values), 2), round(_standard_error(values), 2), loss, friction])
    header = ["learning rate", "optimizer", "test accuracy (%)", "+-", "training loss", "friction"]
    return accuracy, Table(header, table)


def _training_claims(config: Config, rows, accuracy) -> list[Claim]:
    frictions = {
        rate: max(r["friction"][-1] for r in rows if (r["optimizer"], r["learning_rate"]) == (DIFFGRAD, rate))
        for rate in config.learning_rates
    }
    found = [
        Claim(
            "the mean friction coefficient ends near 0.5, where diffGrad is Adam at half the rate",
            expected="< 0.55 on every seed and at every rate",
            measured=", ".join(f"{friction:.4f} at {rate:g}" for rate, friction in frictions.items()),
            holds=max(frictions.values()) < 0.55,
            source="ours: trap of the method",
        )
    ]
    for rate in config.learning_rates:
        pairs = zip(accuracy[DIFFGRAD, rate], accuracy[HALF, rate], strict=True)
        differences = [a - b for a, b in pairs]
        bound = _standard_error(differences) + 0.5
        found.append(
            Claim(
                f"at {rate:g} diffGrad's test accuracy is that of Adam at half the rate",
                expected="within 0.5 points + 1 standard error",
                measured=f"{_mean(differences):+.2f} points, bound {bound:.2f}",
                holds=abs(_mean(differences)) <= bound,
                source="ours: equivalence with the control",
            )
        )
    best = {name: max((accuracy[name, rate] for rate in config.learning_rates), key=_mean) for name in _COLORS}
    gains = {name: _mean(best[DIFFGRAD]) - _mean(best[name]) for name in (ADAM, HALF)}
    errors = {name: math.hypot(_standard_error(best[DIFFGRAD]), _standard_error(best[name])) for name in gains}
    found.append(
        Claim(
            "diffGrad's test accuracy beats both Adam and Adam at half the rate, each at its best rate",
            expected="by more than 1 standard error",
            measured="; ".join(f"{gains[n]:+.2f} +- {errors[n]:.2f} points over {n}" for n in gains),
            holds=all(gains[name] > errors[name] for name in gains),
            source="arXiv 1909.11015, abstract (its control was Adam at the full rate)",
        )
    )
    return found


def _figure(config: Config, rows, accuracy, paths):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    toy, bars, curve = figure.subplots(1, 3)
    for name in _COLORS:
        toy.plot(paths["F1"][name], color=_COLORS[name], label=name, linestyle="--" if name == HALF else "-")
    toy.axhline(-0.3, color="black", linewidth=0.6, linestyle=":")
    toy.axhline(0.2, color="black", linewidth=0.6, linestyle=":")
    toy.set(xlabel="steps", ylabel="x", title="F1: better minimum -0.3, poorer 0.2")
    toy.legend(frameon=False)
    positions = range(len(config.learning_rates))
    for shift, name in zip((-0.2, 0.0, 0.2), _COLORS, strict=True):
        values = [accuracy[name, rate] for rate in config.learning_rates]
        errors = [_standard_error(v) for v in values]
        places = [p + shift for p in positions]
        bars.errorbar(places, [_mean(v) for v in values], errors, fmt="o", capsize=4, color=_COLORS[name], label=name)
    bars.set_xticks(list(positions), [f"{rate:g}" for rate in config.learning_rates])
    bars.set(
        xlabel="learning rate",
        ylabel="test accuracy (%), +- standard error",
        title=f"{config.data}, {config.epochs} epochs",
    )
    for style, rate in zip(("-", "--", ":", "-."), config.learning_rates, strict=False):
        chosen = [r["friction"] for r in rows if (r["optimizer"], r["learning_rate"]) == (DIFFGRAD, rate)]
        means = [_mean(epoch) for epoch in zip(*chosen, strict=True)]
        curve.plot(range(1, config.epochs + 1), means, style, color=_COLORS[DIFFGRAD], label=f"{rate:g}")
    curve.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    curve.set(xlabel="epochs", ylabel="mean friction coefficient", title="0.5 is Adam at half the rate")
    curve.legend(frameon=False, title="learning rate")
    for axes in (toy, bars, curve):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
