"""GR-KAN beside an MLP, KAT beside a ViT of equal size, and what the blocked backward pass saves (arXiv 2505.13813).

    python -m experiments.flashkat                                      # digits: 3 minutes on two cores
    python -m experiments.flashkat --data segments                      # drawn pictures: needs no scikit-learn
    python -m experiments.flashkat --preset paper                       # KAT-T's size on CIFAR-100: a GPU, a few hours

Digits come with scikit-learn. Training is plain: AdamW, a cosine, no augmentation. The paper trains on ImageNet with
mixup and CutMix, for which this has no pipeline; its preset here is the paper's network and optimizer on small
pictures. The times of the GPU and TPU kernels are in experiments.benchmarks.group_rational.
"""

import dataclasses
import functools
import json
import time
from typing import Any, Literal

from experiments import claims, cli
from experiments.claims import Claim, Report, Table
from experiments.diffgrad import load


@dataclasses.dataclass(frozen=True)
class Config:
    """Train both pairs of networks; time both ways of adding up the coefficients' gradients."""

    data: str = "digits"
    """digits (8 x 8, 10 classes; needs scikit-learn), segments (drawn like them), or tfds:NAME, a set of pictures."""
    data_dir: str | None = None
    """Folder of TensorFlow Datasets; None takes its default."""
    seeds: int = 3
    hidden: int = 64
    """Hidden channels of the MLP and of the GR-KAN layer on all pixels."""
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 3e-3
    patch_size: int = 2
    embed_dim: int = 48
    num_layers: int = 2
    num_heads: int = 3
    drop_path_rate: float = 0.0
    transformer_steps: int = 500
    transformer_batch_size: int = 64
    transformer_learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: int = 4096
    """Rows of 768 channels on which both backward passes are timed."""

    def __post_init__(self):
        for name in ("seeds", "steps", "transformer_steps", "batch_size", "transformer_batch_size", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


PRESETS = {
    "smoke": Config(data="segments", seeds=1, steps=60, transformer_steps=10, num_layers=1, rows=64),
    "default": Config(),
    "paper": Config(
        data="tfds:cifar100",
        hidden=1024,
        steps=20_000,
        batch_size=1024,
        learning_rate=1e-3,
        patch_size=4,
        embed_dim=192,
        num_layers=12,
        drop_path_rate=0.1,
        transformer_steps=15_000,  # 300 epochs of 50,000
        transformer_batch_size=1024,
        dtype="bfloat16",
        rows=201_728,
    ),
}
MLP, GRKAN, VIT, MIMETIC, KAT = "GELU MLP", "GR-KAN", "ViT", "ViT with KAT's attention", "KAT"
_COLORS = {MLP: "#8c8c8c", GRKAN: "#4c72b0", VIT: "#8c8c8c", MIMETIC: "#dd8452", KAT: "#4c72b0"}
_TRANSFORMERS = (VIT, MIMETIC, KAT)
_POINTS = 20  # at which losses are measured


def main(config: Config, run: cli.Run) -> Report:
    """Train each network with each seed, then time."""
    try:
        data = segments() if config.data == "segments" else load(config.data, config.data_dir)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise cli.UserError(str(error)) from error
    rows = train_all(config, data, run)
    timed = backward_times(config)
    return Report(
        claims=[*_layer_claims(rows), *_transformer_claims(rows), _speed_claim(config, timed)],
        tables={"networks": _table(config, rows), "backward pass": _speed_table(timed)},
        figures={"flashkat": _figure(config, rows)},
        notes=[
            f"{config.data}: {len(data['train'][1])} training and {len(data['test'][1])} test pictures; means over "
            f"{config.seeds} seeds, +- is one standard error",
            f"{MLP} and {GRKAN}: all pixels to {config.hidden} channels to the classes, {config.steps} steps of "
            f"{config.batch_size}; {', '.join(_TRANSFORMERS)}: {config.num_layers} blocks of {config.embed_dim}, "
            f"patches of {config.patch_size}, {config.transformer_steps} steps of {config.transformer_batch_size}; "
            f"weight decay {config.weight_decay} on matrices, not on coefficients",
        ],
    )


def segments() -> dict[str, Any]:
    """Ten classes of 8 x 8 pictures: the digits of a clock, moved, scaled in brightness, in noise; as `load` gives."""
    import numpy as np

    rng = np.random.default_rng(0)
    bars = (np.s_[0, 0:4], np.s_[0:3, 0], np.s_[0:3, 3], np.s_[2, 0:4], np.s_[2:5, 0], np.s_[2:5, 3], np.s_[4, 0:4])
    lit = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")
    shapes = np.zeros((10, 5, 4))
    for shape, code in zip(shapes, lit, strict=True):
        for bar, on in zip(bars, code, strict=True):
            if on == "1":
                shape[bar] = 1
    labels = rng.integers(0, 10, 1797).astype(np.int32)
    pictures = rng.normal(0, 0.35, (1797, 8, 8, 1))
    places = rng.integers(0, (4, 5), (1797, 2))
    for picture, label, (row, column) in zip(pictures, labels, places, strict=True):
        picture[row : row + 5, column : column + 4, 0] += rng.uniform(0.7, 1.3) * shapes[label]
    pictures = np.clip(2 * pictures - 1, -1, 1).astype(np.float32)
    return {"train": (pictures[:1400], labels[:1400]), "test": (pictures[1400:], labels[1400:])}


# Training


def networks(config: Config, data) -> dict[str, Any]:
    """Name -> Flax module, (pictures, deterministic) -> logits."""
    import flax.linen as nn
    import jax.numpy as jnp

    from jaxskip import models
    from jaxskip.nn import GRKAN as Layer

    classes, side = int(data["train"][1].max()) + 1, data["train"][0].shape[1]

    class Pixels(nn.Module):
        gelu: bool

        @nn.compact
        def __call__(self, x, deterministic=True):
            x = x.reshape(x.shape[0], -1)
            if not self.gelu:
                return Layer(classes, config.hidden, name="layer")(x)
            return nn.Dense(classes)(nn.gelu(nn.Dense(config.hidden)(x), approximate=False))

    transformer = functools.partial(
        models.KAT,
        num_classes=classes,
        image_size=side,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        drop_path_rate=config.drop_path_rate,
        dtype=jnp.dtype(config.dtype),
    )
    return {
        MLP: Pixels(True),
        GRKAN: Pixels(False),
        VIT: transformer(mlp="gelu", attention_init="trunc_normal_002"),
        # The control: KAT's code starts attention in a way of its own, which is not what GR-KAN is about.
        MIMETIC: transformer(mlp="gelu"),
        KAT: transformer(),
    }


def train_all(config: Config, data, run: cli.Run) -> list[dict]:
    """One row for each network and seed; rows of an interrupted run are kept, each as it is finished."""
    from tqdm import tqdm

    finished = run.directory / "runs.jsonl"
    rows = [json.loads(line) for line in finished.read_text().splitlines()] if finished.exists() else []
    done = {(row["network"], row["seed"]) for row in rows}
    built = networks(config, data)
    compiled = functools.cache(lambda name: _programs(config, built[name], data, name in _TRANSFORMERS))
    for name, seed in tqdm([(name, seed) for name in built for seed in range(config.seeds)], desc="runs"):
        if (name, seed) not in done:
            rows.append({"network": name, "seed": seed} | train(compiled(name), seed))
            claims.write_atomic(finished, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _programs(config: Config, model, data, transformer: bool) -> dict[str, Any]:
    """Of one network, jitted: init(key), advance(state, key), loss(state), accuracy(state); and how long to go on."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxskip.nn import rational_decay_mask

    steps = config.transformer_steps if transformer else config.steps
    batch = config.transformer_batch_size if transformer else config.batch_size
    rate = config.transformer_learning_rate if transformer else config.learning_rate
    schedule = optax.cosine_decay_schedule(rate, steps) if transformer else rate
    tx = optax.adamw(schedule, weight_decay=config.weight_decay, mask=rational_decay_mask)
    pictures, labels = map(jnp.asarray, data["train"])
    chunk = max(1, steps // _POINTS)

    def cross_entropy(params, x, y, **options):
        logits = model.apply({"params": params}, x, **options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def init(key):
        params = model.init(key, pictures[:1])["params"]
        return params, tx.init(params)

    def step(state, key):
        params, state = state
        draw, drop = jax.random.split(key)
        chosen = jax.random.randint(draw, (batch,), 0, len(labels))
        options = {"deterministic": False, "rngs": {"dropout": drop}}
        grads = jax.grad(cross_entropy)(params, pictures[chosen], labels[chosen], **options)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def advance(state, key):
        return jax.lax.scan(step, state, jax.random.split(key, chunk))[0]

    predict = jax.jit(lambda state, x: model.apply({"params": state[0]}, x).argmax(1))

    def accuracy(state):
        x, y = data["test"]
        hits = [predict(state, x[i : i + 1000]) == y[i : i + 1000] for i in range(0, len(y), 1000)]
        return jnp.concatenate(hits).mean()

    return {
        "init": jax.jit(init),
        "advance": jax.jit(advance),
        "loss": jax.jit(lambda state: cross_entropy(state[0], pictures[:10_000], labels[:10_000])),
        "accuracy": accuracy,
        "chunk": chunk,
        "chunks": steps // chunk,
    }


def train(programs: dict[str, Any], seed: int) -> dict:
    """Training loss along the way, test accuracy, milliseconds a step, parameters, largest |b| of an identity."""
    import jax
    import jax.numpy as jnp

    key, init_key = jax.random.split(jax.random.key(seed))
    state = programs["init"](init_key)
    losses, times = [], []
    for number in range(programs["chunks"]):
        begin = time.perf_counter()
        state = jax.block_until_ready(programs["advance"](state, jax.random.fold_in(key, number)))
        times.append(1e3 * (time.perf_counter() - begin) / programs["chunk"])
        losses.append(float(programs["loss"](state)))
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state[0])]
    bs = [float(jnp.abs(leaf).max()) for name, leaf in leaves if "act1" in name and "denominator" in name]
    return {
        "loss": losses,
        "accuracy": float(programs["accuracy"](state)),
        "milliseconds": min(times),  # of the chunks, of which the first compiles
        "parameters": sum(leaf.size for _, leaf in leaves),
        "largest_b": max(bs, default=0.0),
    }


# The backward pass


def backward_passes(rows: int):
    """(x [rows, 768], coefficients of 8 groups, cotangent; what to call -> (dx, da, db) of these four)."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.group_rational import group_rational

    keys = jax.random.split(jax.random.key(0), 2)
    x, g = (jax.random.normal(key, (rows, 768)) for key in keys)
    a = jnp.tile(jnp.array([[0.0, 0.5, 0.25, 0.05, 0.006, 0.0003]]), (8, 1))
    b = jnp.tile(jnp.array([[0.001, 0.1, 0.001, 0.0006]]), (8, 1))
    group = jnp.broadcast_to(jnp.arange(768) // 96, x.shape).reshape(-1)

    def one_by_one(x, a, b, g):
        a_of, b_of = (jnp.repeat(value, 96, axis=0) for value in (a, b))
        terms = jax.vmap(
            jax.vmap(lambda x, a, b, g: jax.vjp(lambda *c: group_rational(c[0][None], *c[1:])[0], x, a, b)[1](g)),
            (0, None, None, 0),
        )
        dx, da, db = terms(x, a_of[:, None], b_of[:, None], g)
        return dx, *(jnp.zeros((8, t.shape[-1])).at[group].add(t.reshape(len(group), -1)) for t in (da, db))

    def ours(x, a, b, g):
        return jax.vjp(group_rational, x, a, b)[1](g)

    return (x, a, b, g), {"each element by itself": one_by_one, "blocks": ours}


def backward_times(config: Config) -> dict[str, float]:
    """Milliseconds of each of `backward_passes`."""
    import jax

    arguments, passes = backward_passes(config.rows)
    found = {}
    for name, f in passes.items():
        f = jax.jit(f)
        jax.block_until_ready(f(*arguments))
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            times.append(1e3 * (time.perf_counter() - begin))
        found[name] = min(times)
    return found


# The report


def _of(rows, name: str, field: str) -> list:
    return [row[field] for row in sorted(rows, key=lambda row: row["seed"]) if row["network"] == name]


def _mean(values) -> float:
    return sum(values) / len(values)


def _error(values) -> float:
    mean = _mean(values)
    return (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) / len(values)) ** 0.5


def _layer_claims(rows) -> list[Claim]:
    losses = {name: _mean([loss[-1] for loss in _of(rows, name, "loss")]) for name in (MLP, GRKAN)}
    difference = 100 * (_mean(_of(rows, GRKAN, "accuracy")) - _mean(_of(rows, MLP, "accuracy")))
    least_b = min(_of(rows, GRKAN, "largest_b"))
    return [
        Claim(
            "a GR-KAN layer reaches a much lower training loss than the GELU MLP of equal size",
            expected="< 0.2 of it",
            measured=f"{losses[GRKAN] / losses[MLP]:.3g} ({losses[GRKAN]:.3g} against {losses[MLP]:.3g})",
            holds=losses[GRKAN] < 0.2 * losses[MLP],
            source="ours, after arXiv 2409.10594",
        ),
        Claim(
            "their test accuracies agree",
            expected="within 1 point",
            measured=f"{difference:+.2f} points",
            holds=abs(difference) < 1,
            source="ours",
        ),
        Claim(
            "denominators that start at 0 learn: |b| has the derivative +1 there",
            expected="largest |b| > 0.001 on every seed",
            measured=f"{least_b:.3g} at least",
            holds=least_b > 0.001,
            source="trap of the method",
        ),
    ]


def _transformer_claims(rows) -> list[Claim]:
    accuracy = {name: [100 * value for value in _of(rows, name, "accuracy")] for name in _TRANSFORMERS}
    slower = _mean(_of(rows, KAT, "milliseconds")) / _mean(_of(rows, VIT, "milliseconds"))
    found = []
    for other in (VIT, MIMETIC):
        gain = _mean(accuracy[KAT]) - _mean(accuracy[other])
        error = (_error(accuracy[KAT]) ** 2 + _error(accuracy[other]) ** 2) ** 0.5
        means = f"{_mean(accuracy[KAT]):.2f} against {_mean(accuracy[other]):.2f} %"
        found.append(
            Claim(
                f"KAT classifies better than the network of equal size '{other}' (ImageNet, T: 74.6 against 72.7 %)",
                expected="> 0 points",
                measured=f"{gain:+.2f} points ({means}), one standard error {error:.2f}",
                holds=gain > 0,
                source="arXiv 2409.10594, table of ImageNet results" if other == VIT else "ours: the control",
            )
        )
    return [
        *found,
        Claim(
            "a training step of KAT takes little longer than the ViT's (paper: 0.71 of its pictures a second, T)",
            expected="<= 1.41 times",
            measured=f"{slower:.2f} times",
            holds=slower <= 1.41,
            source="arXiv 2505.13813, on an H200",
        ),
    ]


def _speed_claim(config: Config, timed: dict[str, float]) -> Claim:
    slow, fast = timed.values()
    return Claim(
        f"adding up coefficient gradients by blocks beats adding each element by itself ([{config.rows}, 768])",
        expected="> 1 times as fast",
        measured=f"{slow / fast:.3g} times ({slow:.3g} against {fast:.3g} ms)",
        holds=slow > fast,
        source="arXiv 2505.13813 (140 times on an H200)",
    )


def _table(config: Config, rows) -> Table:
    header = ["network", "parameters", "test accuracy (%)", "+-", "training loss", "ms a step", "largest |b|"]
    table = []
    for name in _COLORS:
        accuracy = [100 * value for value in _of(rows, name, "accuracy")]
        table.append(
            [
                name,
                _of(rows, name, "parameters")[0],
                round(_mean(accuracy), 2),
                round(_error(accuracy), 2),
                float(f"{_mean([loss[-1] for loss in _of(rows, name, 'loss')]):.3g}"),
                round(_mean(_of(rows, name, "milliseconds")), 3),
                round(max(_of(rows, name, "largest_b")), 4),
            ]
        )
    return Table(header, table)


def _speed_table(timed: dict[str, float]) -> Table:
    return Table(["coefficient gradients", "ms"], [[name, round(ms, 3)] for name, ms in timed.items()])


def _figure(config: Config, rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, pair, steps in zip(
        figure.subplots(1, 2), ((MLP, GRKAN), _TRANSFORMERS), (config.steps, config.transformer_steps), strict=True
    ):
        for name in pair:
            for loss in _of(rows, name, "loss"):
                at = [steps * (i + 1) / len(loss) for i in range(len(loss))]
                axes.plot(at, loss, color=_COLORS[name], label=name if loss is _of(rows, name, "loss")[0] else None)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("training loss")
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
