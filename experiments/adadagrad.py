"""AdAdaGrad: batches that grow by a test on gradient noise, against constant ones (arXiv 2402.11215).

    python -m experiments.adadagrad                                        # logistic regression on digits, 3 minutes
    python -m experiments.adadagrad --preset paper                         # ResNet-18 on CIFAR-10: hours on one GPU

The default run trains the same regression with AdaGrad at equal samples: constant batches of 8, 64 and 1024, the norm
test at several eta, and the coordinate tests. The `paper` preset is the CIFAR-10 row of the authors' script: ResNet-18,
AdaGrad, eta 0.5, batches from 32 to 50,000, learning rate 0.05 to 0.005 by samples over 10 million; batch statistics
are replaced by group normalisation, because samples must not depend on each other. Its data comes from TensorFlow
Datasets.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from typing import Any, Literal

from experiments import cli
from experiments.claims import Claim, Report, Table


@dataclasses.dataclass(frozen=True)
class Config:
    """Train one model with constant and with adaptive batches, on the same number of samples."""

    model: Literal["logistic", "resnet18"] = "logistic"
    data: str = "digits"
    """digits (needs scikit-learn) or tfds:NAME, a set of pictures with splits train and test."""
    samples: int = 60_000
    """Samples a run may use."""
    constant: tuple[int, ...] = (8, 64, 1024)
    """Sizes of the constant batches."""
    b0: int = 8
    """First size of the adaptive batches."""
    b_max: int = 1024
    etas: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    """Of the norm test."""
    coordinate_eta: float | None = 0.5
    """Of the coordinate tests; None leaves them out."""
    max_growth: float = math.inf
    """Largest growth of the batch a test; inf as in the paper."""
    buckets: Literal["pow2", "exact"] = "exact"
    """Of the norm test. exact: the sizes that it wants, as in the paper; pow2: doublings of b0."""
    statistics: Literal["per_sample", "chunk"] = "per_sample"
    """Where the variance comes from: all samples, or the means of micro-batches."""
    micro: int = 2
    """Micro-batch: sizes are multiples of it."""
    interval: int = 1
    """Steps between tests."""
    learning_rate: float = 0.5
    final_learning_rate: float | None = None
    """None: constant; else cosine by samples, after a warm-up of a tenth, until nine tenths."""
    initial_accumulator: float = 1e-2
    weight_decay: float = 0.0
    seeds: int = 3

    def __post_init__(self):
        if not self.constant or any(size % self.micro for size in self.constant):
            raise ValueError(f"constant={self.constant} must name multiples of micro={self.micro}")
        if self.samples < self.b0 or self.seeds < 1:
            raise ValueError(f"samples={self.samples} and seeds={self.seeds} leave nothing to train")


PRESETS = {
    "smoke": Config(samples=1_000, constant=(8, 64), etas=(1.0,), b_max=256, coordinate_eta=None, seeds=1),
    "default": Config(),
    "paper": Config(
        model="resnet18",
        data="tfds:cifar10",
        samples=10_000_000,
        constant=(128, 2048, 8192),
        b0=32,
        b_max=50_000,
        etas=(0.5,),
        coordinate_eta=None,
        buckets="pow2",
        statistics="chunk",
        micro=16,
        learning_rate=0.05,
        final_learning_rate=0.005,
        initial_accumulator=0.0,
        weight_decay=5e-4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run."""

    sizes: tuple[int, ...]  # batch size of each step
    loss: float  # on the training set, at the end
    accuracy: float  # on the test set
    programs: int  # compilations of the step, all seeds together


def main(config: Config, run: cli.Run) -> Report:
    """Train with every schedule and seed."""
    try:
        data = load(config.data)
        largest = max(config.b_max, *config.constant)
        if largest > len(data[0]):
            raise ValueError(f"a batch of {largest} exceeds the {len(data[0])} training samples of {config.data}")
        controllers = schedules(config, len(data[0]))
    except (ImportError, ValueError, OSError) as error:
        raise cli.UserError(str(error)) from error
    outcomes = {}
    for name, controller in controllers.items():
        step = make_step(config, controller, data)
        outcomes[name] = [train(config, controller, data, step, seed) for seed in range(config.seeds)]
        print(f"{name}: {len(outcomes[name][0].sizes)} steps, accuracy {outcomes[name][0].accuracy:.4f}", flush=True)
    return Report(
        claims=_claims(config, outcomes),
        tables={"schedules": _table(outcomes)},
        figures={"adadagrad": _figure(config, outcomes)},
        notes=[
            f"{config.samples:,} samples a run, {config.seeds} seeds; steps, losses and accuracies are means",
            "programs is the number of compilations of the training step, all seeds together",
        ],
    )


def constant_name(size: int) -> str:
    return f"constant {size}"


def norm_name(eta: float) -> str:
    return f"norm test, eta {eta:g}"


def schedules(config: Config, dataset_size: int) -> dict[str, Any]:
    """Name -> `AdaptiveBatch`; a constant batch is one that has nowhere to grow."""
    from jaxskip.training import AdaptiveBatch, CoordinateTest, LeafTest, NormTest

    grow = functools.partial(
        AdaptiveBatch,
        b0=config.b0,
        b_max=config.b_max,
        max_growth=config.max_growth,
        interval=config.interval,
        buckets=config.buckets,
        micro=config.micro,
        dataset_size=dataset_size,
    )
    plans = {
        constant_name(size): AdaptiveBatch(NormTest(), size, size, micro=config.micro, buckets="pow2")
        for size in config.constant
    }
    plans |= {norm_name(eta): grow(NormTest(eta)) for eta in config.etas}
    if config.coordinate_eta is not None:
        eta = config.coordinate_eta
        # These keep all gradients of a batch, so each size is a program of its own, and there should be few.
        plans[f"every coordinate, eta {eta:g}"] = grow(CoordinateTest(eta, quantile=1.0), buckets="pow2")
        plans[f"median coordinate, eta {eta:g}"] = grow(CoordinateTest(eta), buckets="pow2")
        plans[f"every tensor, eta {eta:g}"] = grow(LeafTest(eta))
        plans["norm test, eta 0.1, growth at most 2"] = grow(NormTest(0.1), max_growth=2.0)
    return plans


def load(source: str) -> tuple[Any, Any, Any, Any]:
    """Training pictures [N, H, W, C] in float32, -1 to 1, and labels; test pictures and labels."""
    import numpy as np

    if source == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x = (digits.images[order, :, :, None] / 8 - 1).astype(np.float32)
        y = digits.target[order].astype(np.int32)
        return x[:1400], y[:1400], x[1400:], y[1400:]
    if not source.startswith("tfds:"):
        raise ValueError(f"data is {source!r}; it must be 'digits' or 'tfds:NAME'")
    import tensorflow_datasets as tfds

    builder = tfds.builder(source.removeprefix("tfds:"))
    builder.download_and_prepare(file_format="array_record")
    arrays = []
    for split in ("train", "test"):
        examples = list(builder.as_data_source(split))
        arrays.append(np.stack([example["image"] for example in examples]).astype(np.float32) / 127.5 - 1)
        arrays.append(np.array([example["label"] for example in examples], np.int32))
    return tuple(arrays)


def make_model(config: Config, classes: int):
    """A Flax module: pictures [B, H, W, C] -> logits [B, classes]."""
    import flax.linen as nn
    import jax.numpy as jnp

    class Logistic(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(classes, kernel_init=nn.initializers.zeros)(x.reshape(x.shape[0], -1))

    class ResNet18(nn.Module):
        """He et al.'s 18 layers with a 3 x 3 stem, for 32 x 32 pictures, group normalisation inside."""

        @nn.compact
        def __call__(self, x):
            conv = functools.partial(nn.Conv, use_bias=False)
            norm = functools.partial(nn.GroupNorm, num_groups=32)
            x = nn.relu(norm()(conv(64, (3, 3))(x)))
            for stage in range(4):
                for block in range(2):
                    stride = 2 if stage and not block else 1
                    y = nn.relu(norm()(conv(64 * 2**stage, (3, 3), strides=stride, padding=1)(x)))
                    y = norm()(conv(64 * 2**stage, (3, 3))(y))
                    if x.shape != y.shape:
                        x = norm()(conv(64 * 2**stage, (1, 1), strides=stride)(x))
                    x = nn.relu(x + y)
            return nn.Dense(classes)(jnp.mean(x, (1, 2)))

    return Logistic() if config.model == "logistic" else ResNet18()


def train(config: Config, controller, data, step, seed: int) -> Outcome:
    """One run with the step of `make_step`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxskip.training import epoch_rows

    x, y, test_x, test_y = data
    model, tx = _model_and_optimizer(config, y)
    params = model.init(jax.random.key(seed), x[:1])["params"]
    opt_state, state, sizes = tx.init(params), controller.init(), []
    while state.samples < config.samples:
        rows = epoch_rows(len(x), state.samples, state.batch_size, seed=seed)
        params, opt_state, terms = step(params, opt_state, rows)
        sizes.append(state.batch_size)
        state = controller.update(state, terms)

    @jax.jit
    def evaluate(params, x, y):
        logits = model.apply({"params": params}, x)
        return jnp.sum(_losses(logits, y)), jnp.sum(jnp.argmax(logits, -1) == y)

    def mean(x, y, which):
        parts = [evaluate(params, x[i : i + 2000], y[i : i + 2000])[which] for i in range(0, len(x), 2000)]
        return float(np.sum(parts)) / len(x)

    return Outcome(tuple(sizes), mean(x, y, 0), mean(test_x, test_y, 1), step.compilations())


def _model_and_optimizer(config: Config, labels):
    import optax

    from jaxskip.optim import scale_by_adagrad, scale_by_sample_schedule

    tx = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        scale_by_adagrad(config.initial_accumulator),
        scale_by_sample_schedule(_learning_rate(config)),
    )
    return make_model(config, int(labels.max()) + 1), tx


def _learning_rate(config: Config):
    """Samples -> rate."""
    import optax

    if config.final_learning_rate is None:
        return optax.constant_schedule(config.learning_rate)
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.samples // 10, 9 * config.samples // 10, config.final_learning_rate
    )


def _losses(logits, labels):
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_step(config: Config, controller, data):
    """(params, opt_state, row numbers [b]) -> (params, opt_state, terms), with `compilations()`.

    With few sizes each has a program of its own, and the next one is compiled in the background. With any size one
    program adds up as many micro-batches as it is told to; tests that keep all gradients cannot be told.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxskip.training import BucketPrograms, gradient_stats

    x, y = (jnp.asarray(a) for a in data[:2])
    model, tx = _model_and_optimizer(config, data[1])
    test = controller.test

    def advance(params, opt_state, rows, size, **options):
        def loss_fn(p, r):
            return jnp.mean(_losses(model.apply({"params": p}, x[r]), y[r]))

        stats = gradient_stats(loss_fn, params, rows, detail=test.detail, **options)
        updates, opt_state = tx.update(stats.grad, opt_state, params, batch_size=size)
        return optax.apply_updates(params, updates), opt_state, test.terms(stats)

    if controller.buckets == "exact":
        options = {"mode": config.statistics, "chunk": config.micro}

        @jax.jit
        def counted(params, opt_state, rows, size):
            return advance(params, opt_state, rows, size, count=size // config.micro, **options)

        def step(params, opt_state, rows):
            padded = np.zeros(controller.b_max, np.int32)
            padded[: len(rows)] = rows
            return counted(params, opt_state, padded, np.int32(len(rows)))

        step.compilations = counted._cache_size
        return step

    def bucket(params, opt_state, rows):
        size = rows.shape[0]
        return advance(params, opt_state, rows, size, mode=config.statistics, chunk=_chunk(size, config.micro))

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x[:1])["params"])
    shapes = (params, jax.eval_shape(tx.init, params))
    programs = BucketPrograms(
        jax.jit(bucket), lambda size: (*shapes, jax.ShapeDtypeStruct((size,), jnp.int32)), controller.sizes
    )

    def step(params, opt_state, rows):
        return programs(len(rows))(params, opt_state, rows.astype(np.int32))

    step.compilations = lambda: programs.compilations
    return step


def _chunk(size: int, micro: int) -> int:
    """Eight chunks or more, of 256 samples at most and `micro` at least."""
    most = max(micro, min(256, size // 8))
    return next(c for c in range(most, 0, -1) if size % c == 0)


def _mean(values) -> float:
    return statistics.fmean(values)


def _table(outcomes) -> Table:
    def size_at(outcome, step):
        return outcome.sizes[step - 1] if len(outcome.sizes) >= step else None

    rows = [
        [
            name,
            round(_mean(len(o.sizes) for o in runs)),
            round(_mean(o.loss for o in runs), 4),
            round(_mean(o.accuracy for o in runs), 4),
            *(size_at(runs[0], step) for step in (1, 5, 10, 20, 50)),
            max(o.programs for o in runs),
        ]
        for name, runs in outcomes.items()
    ]
    places = [f"b at step {step}, seed 0" for step in (1, 5, 10, 20, 50)]
    return Table(["schedule", "steps", "training loss", "test accuracy", *places, "programs"], rows)


def _claims(config: Config, outcomes) -> list[Claim]:
    adaptive = {name: runs for name, runs in outcomes.items() if not name.startswith("constant")}
    grown = [o.sizes for runs in adaptive.values() for o in runs]
    programs = max(o.programs for runs in adaptive.values() for o in runs)
    bound = 1 + math.ceil(math.log2(config.b_max / config.b0))
    claims = [
        Claim(
            "batches never shrink nor pass their maximum, under every test",
            expected=f"non-decreasing, <= {config.b_max}",
            measured=f"{sum(map(_monotone, grown))} of {len(grown)} runs, largest {max(map(max, grown))}",
            holds=all(map(_monotone, grown)) and max(map(max, grown)) <= config.b_max,
            source="arXiv 2402.11215, algorithm 1",
        ),
        Claim(
            "a growing batch costs few compilations",
            expected=f"<= {bound}",
            measured=programs,
            holds=programs <= bound,
            source="ours",
        ),
    ]
    eta, small, large = norm_name(1.0), constant_name(8), constant_name(1024)
    if config.model != "logistic" or not {eta, small, large} <= outcomes.keys():
        return claims
    steps = [len(o.sizes) / len(c.sizes) for o, c in zip(outcomes[eta], outcomes[small], strict=True)]
    accuracy = {name: _mean(o.accuracy for o in outcomes[name]) for name in (eta, small, large)}
    tenth = [o.sizes[9] for o in outcomes[eta]]
    least = max(accuracy[large], accuracy[small] - 0.03)
    claims += [
        Claim(
            "the norm test with eta 1 takes at most 3 % of the steps of batch 8 at equal samples, on every seed",
            expected="<= 0.03",
            measured=round(max(steps), 4),
            holds=max(steps) <= 0.03,
            source="arXiv 2402.11215, training efficiency; ours",
        ),
        Claim(
            "and its test accuracy is no worse than that of batch 1024 and within 3 points of batch 8 (means)",
            expected=f">= {least:.4f}",
            measured=round(accuracy[eta], 4),
            holds=accuracy[eta] >= least,
            source="arXiv 2402.11215, generalisation; ours",
        ),
        Claim(
            "and its batch is still small after ten steps, on every seed",
            expected="<= 16",
            measured=max(tenth),
            holds=max(tenth) <= 16,
            source="ours",
        ),
    ]
    if norm_name(0.1) in outcomes:
        tenth = [o.sizes[9] for o in outcomes[norm_name(0.1)]]
        claims.append(
            Claim(
                "the authors' default eta 0.1 is a large constant batch from the tenth step on (a control: 1 / eta^2 "
                "a test is what noise alone asks for)",
                expected=f">= {config.b_max // 2}",
                measured=min(tenth),
                holds=min(tenth) >= config.b_max // 2,
                source="ours",
            )
        )
    return claims


def _monotone(sizes) -> bool:
    return all(a <= b for a, b in itertools.pairwise(sizes))


def _figure(config: Config, outcomes):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    growth, cost = figure.subplots(1, 2)
    shades = dict(
        zip((norm_name(eta) for eta in config.etas), ("#c44e52", "#dd8452", "#e8b04a", "#8172b3"), strict=False)
    )
    for name, color in shades.items():
        for outcome in outcomes[name]:
            label = name if outcome is outcomes[name][0] else None
            growth.step(range(1, len(outcome.sizes) + 1), outcome.sizes, where="post", color=color, label=label)
    growth.set(xlabel="steps", ylabel="batch size", xscale="log", yscale="log")
    growth.legend(frameon=False)
    for name, runs in outcomes.items():
        color = shades.get(name, "#4c72b0" if name.startswith("constant") else "#8c8c8c")
        x, y = _mean(len(o.sizes) for o in runs), _mean(o.accuracy for o in runs)
        cost.plot(x, y, "o", color=color)
        if name.startswith("constant"):
            cost.annotate(name, (x, y), textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)
    cost.set(xlabel=f"steps for {config.samples:,} samples", ylabel="test accuracy", xscale="log")
    cost.margins(0.15)
    for axes in (growth, cost):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
