"""FiRST: routers that read a prompt and switch layers off for the sequence (arXiv 2410.12513), then adapters.

    python -m experiments.first_router                                           # 3 minutes on a laptop
    python -m experiments.first_router --preset paper --model LLAMA_DIR --data FILE_OR_DIR

By default an eight-layer byte model is trained on code and prose, then frozen; routers read the first 16 bytes of a
window, and all of the window skips what they say. All fixed sets of layers are measured on the same windows, so what
routing is worth can be read off: the distance to the best, the median and the worst set of its size.

The paper trains Llama-3-8B on 4,000 samples a task of WMT (translation) and CNN/DailyMail (summaries), with a penalty
of 0.01, and reports 15 % and 25 % of the layers skipped. Its numbers are BLEU and ROUGE; the `paper` preset takes a
folder from Hugging Face and text, and reports losses with the dual ascent on the penalty set to those shares.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

from experiments import cli, skipping_toy, smollm2
from experiments.claims import Claim, Report, Table

PAPER = "arXiv 2410.12513"


_TOY = skipping_toy.Toy(validation_windows=96)


@dataclasses.dataclass(frozen=True)
class Config:
    """Train routers on a frozen network, and adapters through what they leave."""

    model: str | None = None
    """A folder from Hugging Face or a .gguf file; None trains the toy."""
    toy: skipping_toy.Toy = _TOY
    data: str = "pysrc"
    """Text for `model`: pysrc, a text file or folder, or tfds:NAME."""
    context: int = 512
    """Tokens a window, for `model`."""
    batch_size: int = 8
    """Windows a step, for `model`."""
    prompt_tokens: int = 16
    """What the routers read."""
    penalties: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08)
    """lambda: what a kept layer costs, in nats."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of routers and their batches."""
    steps: int = 120
    learning_rate: float = 3e-2
    """Of Adam, for the routers."""
    weight_decay: float = 0.0
    """Of the routers: the paper's regulariser, whose weight is not given."""
    soft: tuple[tuple[float, float], ...] = ((0.05, 0.0), (0.05, 0.02))
    """(lambda, weight of the binarisation term) of runs with soft gates."""
    target_keep: tuple[float, ...] = (0.75,)
    """Shares of layers that dual ascent aims at."""
    lora_steps: int = 120
    """Steps of adapters through the skipped network; 0 leaves them out."""
    lora_rank: int = 8
    lora_learning_rate: float = 3e-3

    def __post_init__(self):
        length = self.toy.context if self.model is None else self.context
        if not 0 < self.prompt_tokens < length:
            raise ValueError(f"prompt_tokens is {self.prompt_tokens}; it must lie within a window of {length}")
        if not self.penalties or not self.seeds:
            raise ValueError("penalties and seeds need one value at least")


_TINY = skipping_toy.Toy(num_layers=3, width=16, heads=2, context=32, steps=4, code_bytes=200_000, validation_windows=8)
PRESETS = {
    "smoke": Config(toy=_TINY, penalties=(0.01, 0.04), seeds=(0,), steps=3, soft=(), target_keep=(), lora_steps=0),
    "default": Config(),
    "paper": Config(
        model="Meta-Llama-3-8B",
        penalties=(0.01,),
        seeds=(0,),
        prompt_tokens=256,
        steps=500,
        learning_rate=1e-3,
        soft=(),
        target_keep=(0.85, 0.75),
        lora_steps=500,
        lora_learning_rate=1e-4,
    ),
}


def main(config: Config, run: cli.Run) -> Report:
    """Routers with straight-through, soft and published gates, beside all fixed sets; then adapters."""
    study = prepare(config, run.directory)
    sets = fixed_sets(study)
    routed = [
        Trained("straight-through", penalty, seed, *train_routers(study, "straight_through", seed, penalty))
        for penalty, seed in itertools.product(config.penalties, config.seeds)
    ]
    for penalty, binarisation in config.soft:
        name = f"soft, binarisation {binarisation:g}" if binarisation else "soft"
        routed.append(Trained(name, penalty, 0, *train_routers(study, "soft", 0, penalty, binarisation=binarisation)))
    aimed = []
    for share in config.target_keep:
        target = share * study.config.num_layers
        trained = train_routers(study, "straight_through", 0, config.penalties[0], target=target)
        aimed.append((target, Trained(f"aimed at {target:g} layers", None, 0, *trained)))
    claims = [*_penalty_claims(study, routed, sets), _gradient_claim(study), *(_aim_claim(*pair) for pair in aimed)]
    tables = {
        "routers": _router_table([*routed, *(trained for _, trained in aimed)], sets),
        "layers kept, by kind of text": _kinds_table(study, routed),
        "layers read by a batch": _batch_table(study, routed),
    }
    if config.lora_steps:
        claim, tables["adapters"] = adapters(study, routed)
        claims.append(claim)
    return Report(
        claims=claims,
        tables=tables,
        figures={"routers": _figure(study, routed, sets)},
        notes=[
            f"{study.name}: {study.config.num_layers} layers, loss of the whole network {study.full:.3f} nats",
            "losses are of hard decisions, on the same windows as the fixed sets'",
        ],
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """The frozen network and its text."""

    options: Config
    name: str
    config: Any  # jaxskip.models.DecoderConfig
    params: Any
    batches: Any  # seed -> iterator of {"inputs", "targets"} int32 [B, T]
    validation: dict[str, Any]
    kinds: tuple[str, ...]  # of text, in equal parts of the validation windows
    full: float

    @property
    def policy(self):
        from jaxskip.skipping import FirstRouter

        return FirstRouter(protect=() if self.options.model is None else None, prompt="skip")


@dataclasses.dataclass(frozen=True)
class Trained:
    """Routers after training: g bool [L, N] and the loss on the validation windows, with hard decisions."""

    name: str
    penalty: float | None
    seed: int
    routers: Any
    g: Any
    loss: float

    @property
    def kept(self) -> float:
        return float(self.g.sum(axis=0).mean())


def prepare(options: Config, directory: pathlib.Path) -> Study:
    import numpy as np

    if options.model is None:
        config, params = skipping_toy.base(options.toy, directory)
        study = Study(
            options, "toy", config, params, functools.partial(skipping_toy.Batches, options.toy),
            skipping_toy.validation(options.toy), skipping_toy.KINDS, np.nan,
        )  # fmt: skip
    else:
        study = _pretrained(options)
    ones = np.ones((study.config.num_layers, len(study.validation["inputs"])), bool)
    return dataclasses.replace(study, full=float(_given_loss(study.config, study.params, study.validation, ones)))


def _pretrained(options: Config) -> Study:
    import numpy as np

    config, params, text, batches, validation = smollm2.with_text(
        str(options.model), options.data, batch_size=options.batch_size, context_length=options.context
    )
    return Study(options, str(options.model), config, params, batches, validation, (text,), np.nan)


def _cross_entropy(logits, targets):
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _routed(study: Study, params, routers, batch, gate):
    """(cross-entropy, rho [L, B])."""
    import jax.numpy as jnp

    from jaxskip.skipping import routed_forward

    tokens = batch["inputs"]
    prompt = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < study.options.prompt_tokens, tokens.shape)
    logits, rho = routed_forward(study.config, params, routers, tokens, prompt, gate=gate, policy=study.policy)
    return _cross_entropy(logits, batch["targets"]), rho


def _stacked(study: Study, seed: int, steps: int):
    import numpy as np

    found = list(itertools.islice(study.batches(seed + 1), steps))
    return {name: np.stack([batch[name] for batch in found]) for name in ("inputs", "targets")}


def train_routers(study: Study, gate, seed: int, penalty: float, *, binarisation: float = 0.0, target=None):
    """(routers, g bool [L, N], loss) after the penalty's training; with `target` dual ascent moves the penalty."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxskip.nn import init_routers

    routers = init_routers(jax.random.key(seed), study.config.num_layers, study.config.embed_dim)
    rate = 0.0 if target is None else 5e-4
    train, evaluate = _router_programs(study.options, study.config, gate)
    routers, penalty_at_end = train(
        study.params, routers, _stacked(study, seed, study.options.steps),
        jnp.float32(penalty), binarisation, target or 0.0, rate,
    )  # fmt: skip
    loss, rho = evaluate(study.params, routers, study.validation)
    g = np.asarray(rho) > study.policy.threshold
    print(
        f"{gate}, lambda {float(penalty_at_end):.3g}, seed {seed}: {g.sum(axis=0).mean():.2f} layers kept, "
        f"loss {float(loss):.4f}",
        flush=True,
    )
    return routers, g, float(loss)


@functools.lru_cache(maxsize=8)
def _router_programs(options: Config, config, gate):
    import jax
    import optax

    from jaxskip.skipping import binarize, dual_ascent, non_skip_penalty

    study = Study(options, "", config, None, None, {}, (), 0.0)
    tx = optax.adamw(options.learning_rate, weight_decay=options.weight_decay)

    @jax.jit
    def train(params, routers, batches, penalty, binarisation, target, rate):
        def loss(routers, penalty, batch):
            value, rho = _routed(study, params, routers, batch, gate)
            return value + penalty * non_skip_penalty(rho) + binarisation * binarize(rho), rho

        def step(carry, batch):
            routers, state, penalty = carry
            grads, rho = jax.grad(loss, has_aux=True)(routers, penalty, batch)
            updates, state = tx.update(grads, state, routers)
            penalty = dual_ascent(penalty, rho > study.policy.threshold, target_keep=target, rate=rate)
            return (optax.apply_updates(routers, updates), state, penalty), None

        (routers, _, penalty), _ = jax.lax.scan(step, (routers, tx.init(routers), penalty), batches)
        return routers, penalty

    return train, jax.jit(lambda params, routers, batch: _routed(study, params, routers, batch, "hard"))


def fixed_sets(study: Study) -> dict[int, list[tuple[float, tuple[int, ...]]]]:
    """size -> (loss, layers) of fixed sets, best first: all up to 8 layers, else 20 drawn of each size above 1."""
    import numpy as np

    layers = study.config.num_layers
    if layers <= 8:
        masks = np.array(list(itertools.product((False, True), repeat=layers))[1:])
    else:
        rng = np.random.default_rng(0)
        masks = np.zeros((20 * (layers - 2), layers), bool)
        for row, size in zip(masks, np.repeat(np.arange(2, layers), 20), strict=True):
            row[np.r_[0, layers - 1, rng.choice(np.arange(1, layers - 1), size - 2, replace=False)]] = True
    losses = np.asarray(_set_losses(study.config, study.params, study.validation, masks))
    found: dict[int, list] = {}
    for loss, mask in zip(losses, masks, strict=True):
        found.setdefault(int(mask.sum()), []).append((float(loss), tuple(np.flatnonzero(mask).tolist())))
    return {size: sorted(members) for size, members in found.items()} | {layers: [(study.full, tuple(range(layers)))]}


def _set_losses(config, params, batch, masks):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def losses(params, batch, masks):
        rows = batch["inputs"].shape[0]
        return jax.lax.map(lambda mask: _loss_given(config, params, batch, jnp.tile(mask[:, None], rows)), masks)

    return losses(params, batch, masks)


def _loss_given(config, params, batch, g):
    """Cross-entropy where g, bool [L, B], says which layers change which row, at all positions."""
    from jaxskip.skipping import FirstRouter, forward

    logits, _, _ = forward(config, params, batch["inputs"], policy=FirstRouter(), state=g)
    return _cross_entropy(logits, batch["targets"])


def _given_loss(config, params, batch, g):
    import jax

    return jax.jit(functools.partial(_loss_given, config))(params, batch, g)


def adapters(study: Study, routed: list[Trained]) -> tuple[Claim, Table]:
    """Phase 2, beside the same adapters on the whole network, on random sets and on a fixed one of that size."""
    import numpy as np

    options, layers = study.options, study.config.num_layers
    first = next(trained for trained in routed if trained.penalty == max(options.penalties))
    size = min(layers, max(2, round(first.kept)))
    rng = np.random.default_rng(0)

    def constant(mask):
        return lambda rows: np.repeat(mask[:, None], rows, axis=1)

    def drawn(rows):
        """The first and the last layer, and others by chance, for each row: of the routers' size on average."""
        g = rng.permuted(np.tile(np.arange(layers - 2) < size - 2, (rows, 1)), axis=1)
        return np.pad(g, ((0, 0), (1, 1)), constant_values=True).T

    even = np.isin(np.arange(layers), _even(layers, size))
    choices = {"no skipping": constant(np.ones(layers, bool)), "random sets": drawn, "even set": constant(even)}
    rows = [_tuned_row(study, "FiRST", first.kept, first.loss, first.routers, None)]
    for name, choose in choices.items():
        g = choose(len(study.validation["inputs"]))
        before = float(_given_loss(study.config, study.params, study.validation, g))
        rows.append(_tuned_row(study, name, float(g.sum(axis=0).mean()), before, None, choose))
    by_name = {row[0]: row for row in rows}
    before, after = by_name["FiRST"][2:4]
    claim = Claim(
        "adapters trained through the skipped network win back quality that skipping cost",
        expected=f"below the routers alone ({before:.3f}); Base+LoRA without skipping for comparison",
        measured=f"{after:.3f}; no skipping {by_name['no skipping'][3]:.3f}, random sets "
        f"{by_name['random sets'][3]:.3f}, even set of {size} layers {by_name['even set'][3]:.3f}, all with adapters",
        holds=after < before,
        source=f"{PAPER}: BLEU-1 28.8 to 38.0, 41.8 without skipping (second-hand)",
    )
    return claim, Table(["layers chosen by", "layers kept", "loss before adapters", "loss with adapters"], rows)


def _even(layers: int, size: int) -> tuple[int, ...]:
    from jaxskip.skipping import unified_keep_layers

    return unified_keep_layers(layers, layers / size, rule="balanced")


def _tuned_row(study: Study, name, kept, before, routers, choose):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxskip.nn import init_lora

    options = study.options
    batches = _stacked(study, 100, options.lora_steps)
    steps, rows = batches["inputs"].shape[:2]
    # The choice travels as data: fixed and drawn sets share one program, routers have their own.
    given = None if choose is None else np.stack([choose(rows) for _ in range(steps)])
    lora = init_lora(jax.random.key(7), study.params, rank=options.lora_rank)
    train, evaluate = _lora_programs(options, study.config, choose is None)
    lora = train(study.params, lora, routers, batches, given)
    whole = None if choose is None else jnp.asarray(choose(len(study.validation["inputs"])))
    after = float(evaluate(study.params, lora, routers, study.validation, whole))
    print(f"adapters, {name}: {kept:.2f} layers kept, loss {before:.4f} -> {after:.4f}", flush=True)
    return [name, round(kept, 2), before, after]


@functools.lru_cache(maxsize=8)
def _lora_programs(options: Config, config, with_routers: bool):
    import jax
    import optax

    from jaxskip.nn import merge_lora

    study = Study(options, "", config, None, None, {}, (), 0.0)
    tx = optax.adam(optax.cosine_decay_schedule(options.lora_learning_rate, options.lora_steps))

    def loss(lora, params, routers, batch, g):
        merged = merge_lora(params, lora)
        if with_routers:
            return _routed(study, merged, routers, batch, "hard")[0]
        return _loss_given(config, merged, batch, g)

    @jax.jit
    def train(params, lora, routers, batches, given):
        def step(carry, inputs):
            lora, state = carry
            grads = jax.grad(loss)(lora, params, routers, *inputs)
            updates, state = tx.update(grads, state, lora)
            return (optax.apply_updates(lora, updates), state), None

        return jax.lax.scan(step, (lora, tx.init(lora)), (batches, given))[0][0]

    return train, jax.jit(lambda params, lora, routers, batch, g: loss(lora, params, routers, batch, g))


def _penalty_claims(study: Study, routed, sets) -> list[Claim]:
    import numpy as np

    options = study.options
    runs = [trained for trained in routed if trained.name == "straight-through"]
    by_seed = {seed: [trained for trained in runs if trained.seed == seed] for seed in options.seeds}
    kept = np.array([[trained.kept for trained in row] for row in by_seed.values()])
    losses = np.array([[trained.loss for trained in row] for row in by_seed.values()])
    first = min(float(trained.g[0].mean()) for trained in runs)
    below = [trained.loss < sets[int(trained.kept)][-1][0] for trained in runs]
    median = [trained.loss < _median(sets[int(trained.kept)]) for trained in runs]
    even = [_even_loss(sets, trained.kept) for trained in runs]
    gaps = [trained.loss - sets[round(trained.kept)][0][0] for trained in runs]
    claims = [
        Claim(
            "a larger penalty keeps fewer layers at a higher loss",
            expected="at every step on average over seeds, and from the smallest to the largest on every seed",
            measured=f"kept {', '.join(f'{x:.2f}' for x in kept.mean(axis=0))}; "
            f"loss {', '.join(f'{x:.3f}' for x in losses.mean(axis=0))} (whole network {study.full:.3f})",
            holds=bool(
                (np.diff(kept.mean(axis=0)) < 0).all()
                and (np.diff(losses.mean(axis=0)) > 0).all()
                and (kept[:, -1] < kept[:, 0]).all()
                and (losses[:, -1] > losses[:, 0]).all()
            ),
            source=f"{PAPER}: the share skipped follows from the penalty",
        ),
        Claim(
            "so it is for each seed alone",
            expected="fewer layers and a higher loss with every larger penalty",
            measured=f"{(np.diff(kept) < 0).sum()} and {(np.diff(losses) > 0).sum()} of {np.diff(kept).size} steps",
            holds=bool((np.diff(kept) < 0).all() and (np.diff(losses) > 0).all()),
            source=f"{PAPER}: lambda sets how many layers stay",
        ),
        Claim(
            "routers never take the first layer for dispensable",
            expected="kept for > 95 % of the rows in every run",
            measured=f"{first:.1%} at least",
            holds=first > 0.95,
            source="ours",
        ),
        Claim(
            "routed losses lie below the worst fixed set of as many layers, rounded down",
            expected="in every run",
            measured=f"below the worst in {sum(below)}, below the median in {sum(median)} of {len(runs)} runs; above "
            f"the best of their size, rounded, by {min(gaps):+.3f} to {max(gaps):+.3f} nats",
            holds=all(below),
            source="ours; a win over the best set is not claimed",
        ),
    ]
    if None not in even:
        over = [trained.loss - loss for trained, loss in zip(runs, even, strict=True)]
        claims.append(
            Claim(
                "routing loses less than evenly spaced skipping of as many layers (between whole sizes, on the line)",
                expected="lower loss in every run",
                measured=f"{min(over):+.3f} to {max(over):+.3f} nats",
                holds=max(over) < 0,
                source=f"{PAPER}: BLEU-1 28.8 against 23.2 of Unified Skipping (second-hand)",
            )
        )
    return claims


def _median(members) -> float:
    return members[len(members) // 2][0]


def _even_loss(sets, kept: float) -> float | None:
    """Loss of `kept` evenly spaced layers, on the line between whole sizes; None where such a set was not measured."""
    layers = max(sets)
    low = min(max(2, int(kept)), layers - 1)
    ends = []
    for size in (low, low + 1):
        members = {members: loss for loss, members in sets.get(size, [])}
        ends.append(members.get(_even(layers, size)))
    return None if None in ends else ends[0] + (kept - low) * (ends[1] - ends[0])


def _gradient_claim(study: Study) -> Claim:
    import jax
    import jax.numpy as jnp

    from jaxskip.nn import init_routers

    routers = init_routers(jax.random.key(0), study.config.num_layers, study.config.embed_dim)
    batch = next(iter(study.batches(1)))
    most = {}
    for gate in ("published", "straight_through"):
        grads = jax.jit(jax.grad(lambda r, gate=gate: _routed(study, study.params, r, batch, gate)[0]))(routers)
        most[gate] = float(jnp.abs(grads["kernel"]).max())
    return Claim(
        "in the equation of the paper's first version, as reviews quote it, the router cancels: no gradient from the "
        "loss",
        expected="<= 1e-7 there, > 1e-4 with straight-through gates",
        measured=f"{most['published']:.1e}, {most['straight_through']:.1e}",
        holds=most["published"] <= 1e-7 and most["straight_through"] > 1e-4,
        source="ours",
    )


def _aim_claim(target: float, trained: Trained) -> Claim:
    return Claim(
        f"dual ascent on the penalty keeps the number of layers that is asked for, {target:g}",
        expected="within half a layer",
        measured=f"{trained.kept:.2f}",
        holds=abs(trained.kept - target) <= 0.5,
        source="ours; reviewers of the paper asked for it",
    )


def _router_table(routed, sets) -> Table:
    header = ["gates", "lambda", "seed", "layers kept", "loss", "best set", "median set", "worst set"]
    rows = []
    for trained in routed:
        members = sets[int(trained.kept)]
        spread = [members[0][0], _median(members), members[-1][0]]
        rows.append([trained.name, trained.penalty, trained.seed, round(trained.kept, 2), trained.loss, *spread])
    return Table(header, rows)


def _kinds_table(study: Study, routed) -> Table:
    import numpy as np

    rows = []
    for trained in routed:
        if trained.seed == study.options.seeds[0]:
            parts = np.split(trained.g, len(study.kinds), axis=1)
            for kind, g in zip(study.kinds, parts, strict=True):
                rows.append([trained.name, trained.penalty, kind, *(round(float(x), 2) for x in g.mean(axis=1))])
    return Table(["gates", "lambda", "text", *(f"layer {i}" for i in range(study.config.num_layers))], rows)


def _batch_table(study: Study, routed) -> Table:
    """Rows of a batch rarely agree: what a batch executes is the union of its rows' layers."""
    import numpy as np

    rows = []
    for trained in routed:
        if trained.seed == study.options.seeds[0]:
            order = np.random.default_rng(0).permutation(trained.g.shape[1])
            union = [
                float(
                    np.stack([part.any(axis=1) for part in np.array_split(trained.g[:, order], n, axis=1)])
                    .sum(1)
                    .mean()
                )
                for n in (len(order), max(1, len(order) // 4), max(1, len(order) // 16))
            ]
            rows.append([trained.name, trained.penalty, *(round(x, 2) for x in union)])
    return Table(["gates", "lambda", "1 row", "4 rows", "16 rows"], rows)


_COLORS = {"straight-through": "#c44e52", "soft": "#4c72b0", "soft, binarisation 0.02": "#55a868"}


def _figure(study: Study, routed, sets):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    points = [(size, loss) for size, members in sets.items() for loss, _ in members]
    left.scatter(*zip(*points, strict=True), s=8, color="#bbbbbb", label="fixed sets")
    for name in dict.fromkeys(trained.name for trained in routed):
        mine = [(trained.kept, trained.loss) for trained in routed if trained.name == name]
        left.scatter(*zip(*mine, strict=True), s=28, color=_COLORS.get(name), label=name, zorder=3)
    left.axhline(study.full, color="black", linewidth=1, linestyle=":", label="whole network")
    shown = [trained for trained in routed if trained.name == "straight-through"]
    least = min(int(trained.kept) for trained in shown) - 1
    tops = [loss for size, members in sets.items() if size >= least for loss, _ in members[: max(1, len(members) // 2)]]
    highest = max([*tops, *(trained.loss for trained in routed)])
    left.set(xlabel="layers kept (mean)", ylabel="validation loss (nats)", xlim=(least - 0.2, max(sets) + 0.2))
    left.set_ylim(study.full - 0.02, highest + 0.05)
    left.legend(frameon=False, fontsize=8)
    last = next(trained for trained in shown if trained.penalty == max(study.options.penalties))
    import numpy as np

    parts = np.split(last.g, len(study.kinds), axis=1)
    for number, (kind, g) in enumerate(zip(study.kinds, parts, strict=True)):
        width = 0.8 / len(parts)
        right.bar(np.arange(len(g)) + (number + 0.5) * width - 0.4, g.mean(axis=1), width, label=kind)
    right.set(xlabel="layer", ylabel=f"share of rows that keep it, lambda {last.penalty:g}", ylim=(0, 1.15))
    right.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
