"""Unified Layer Skipping: evenly spread layers for every token, with and without fine-tuning (arXiv 2404.06954).

    python -m experiments.unified_layer_skipping                        # 4 minutes on two CPU cores
    python -m experiments.unified_layer_skipping --tune-seeds 1 --skips 1 4
    python -m experiments.unified_layer_skipping --preset paper --text my_texts/ --model Llama-3-8B/      # GPUs

A small language model of eight layers is trained whole; then four of its layers are taken out in several patterns,
and each is fine-tuned. A pretrained model of thirty layers, not fine-tuned, shows what depth does to untrained skipping
and which patterns hurt least. The `paper` preset fine-tunes that model as the authors do, once for each target
speed-up; the paper's translation scores (WMT22, BLOOMZ-7B) need files that are not here, so the passage's perplexity
stands for them.
"""

import dataclasses
import math
import pathlib
from typing import Any

from experiments import cli, smollm2
from experiments.claims import Claim, Report, Table
from experiments.skipping_toy import Toy

# Perplexity of the passage for SmolLM2 without k layers, at every position, untrained.
REFERENCE = {
    "even comb": {1: 34.1, 2: 47.3, 3: 127.7, 4: 60.9, 5: 108.0, 6: 112.0, 8: 200.0, 10: 1.07e4, 15: 6.6e3},
    "without middle": {1: 34.1, 2: 39.1, 3: 44.8, 4: 48.8, 5: 57.1, 6: 54.7, 8: 159.0, 10: 155.0, 15: 708.0},
    "without late": {1: 66.5, 2: 1.5e3, 3: 1.5e4, 4: 3.6e4, 5: 5.6e7, 6: 2.4e8, 8: 3.8e7, 10: 6e8, 15: 2e8},
    "early exit": {1: 163.0, 2: 5.9e2, 3: 2.7e3, 4: 9.0e3, 5: 3.8e4, 6: 1.2e6, 8: 1.8e8, 10: 7e8, 15: 1.5e9},
}
REFERENCE_SPEEDUPS = {2: 8.9e5, 3: 1.5e5, 5: 1.6e6, 10: 5.8e9}
TOLERANCE = 0.05  # figures of two digits are up to 3 % off themselves


@dataclasses.dataclass(frozen=True)
class Config:
    """Take layers out of a small trained network and of a pretrained one, and fine-tune what is left."""

    toy: Toy = dataclasses.field(default_factory=Toy)
    toy_speedup: float = 2.0
    toy_prefix: int = 16
    """Tokens read in full by the arm that fine-tunes with the method's own loss."""
    tune_steps: int = 150
    tune_learning_rate: float = 1e-3
    tune_seeds: int = 3
    """Fine-tunings of each pattern, on other batches."""
    seed: int = 0
    model: str = smollm2.MODEL
    """Or a .gguf file, or a folder from Hugging Face."""
    tokens: int | None = None
    """Of the passage; all of them by default, which the reference figures are for."""
    skips: tuple[int, ...] = (1, 4, 8)
    """How many layers the patterns leave out of `model`."""
    speedups: tuple[int, ...] = (2, 3, 5, 10)
    prompt_tokens: int = 128
    """Read in full where only new tokens skip."""
    new_tokens: int = 64
    finetune_steps: int = 0
    """Of `model`, for each of `speedups`, with the authors' settings; 0 for none."""
    finetune_batch: int = 128
    finetune_context: int = 512
    """Half of it is prefix."""
    finetune_learning_rate: float = 2e-5
    text: str = "pysrc"
    """What `model` is fine-tuned on: a source of `jaxskip.data.load_texts`."""

    def __post_init__(self):
        if not 0 < self.toy_prefix < self.toy.context:
            raise ValueError(f"toy_prefix is {self.toy_prefix}; the context is {self.toy.context}")
        if (
            not (self.skips and self.speedups)
            or min(self.tune_steps, self.tune_seeds, self.prompt_tokens, self.new_tokens) < 1
        ):
            raise ValueError(
                "skips and speedups must not be empty; steps, seeds and numbers of tokens must be at least 1"
            )


PRESETS = {
    "smoke": Config(
        toy=Toy(num_layers=4, width=16, heads=2, context=32, batch_size=4, steps=4, code_bytes=50_000,
                validation_windows=8),
        tune_steps=2,
        tune_seeds=1,
        tokens=40,
        skips=(4,),
        speedups=(5,),
        prompt_tokens=32,
        new_tokens=4,
    ),
    "default": Config(),
    "paper": Config(skips=(1, 2, 3, 4, 5, 6, 8, 10, 15), finetune_steps=2000),
}  # fmt: skip


def main(config: Config, run: cli.Run) -> Report:
    """The toy, the pretrained model untrained, and (paper) fine-tuned."""
    from jaxskip.training import CheckpointError

    try:
        toy = run_toy(config, run.directory)
        large = run_pretrained(config)
        tuned = {r: fine_tune(config, r, run.directory) for r in config.speedups if config.finetune_steps}
    except (CheckpointError, FloatingPointError, OSError) as error:
        raise cli.UserError(str(error)) from error
    claims = [*_toy_claims(toy), *_pretrained_claims(large)]
    if config.model == smollm2.MODEL and config.tokens is None:
        claims += _reference_claims(large)
    if tuned:
        claims.append(_tuned_claim(large, tuned))
    return Report(
        claims=claims,
        tables={
            "small network, half of the layers": _toy_table(toy),
            "pretrained, k layers left out at every position, perplexity": _pattern_table(config, large),
            "pretrained, the authors' layers": _speedup_table(large, tuned),
        },
        figures={"patterns": _figure(config, toy, large)},
        notes=[
            f"small network: one base, {config.tune_seeds} fine-tunings of each pattern, loss over "
            f"{config.toy.validation_windows} held-out windows, skipping at every position unless said otherwise; "
            "shares are of the distance to the base, which as many more steps would better too (first row)",
            f"{config.model}: {large['length']} tokens of the passage, one window; not fine-tuned"
            + (", but for the last column" if tuned else ""),
        ],
    )


# The small network


def toy_patterns(num_layers: int, speedup: float) -> dict[str, tuple[int, ...]]:
    """Layers kept: the balanced rule's, and as many by simpler rules."""
    from jaxskip import skipping

    balanced = skipping.unified_keep_layers(num_layers, speedup, rule="balanced")
    keep = len(balanced)
    return {
        "even comb": balanced,
        "early exit": skipping.early_exit(num_layers, keep).keep_layers,
        "first and last ones": (0, *range(num_layers - keep + 1, num_layers)),
        "without middle": skipping.without_middle(num_layers, keep).keep_layers,
    }


def run_toy(config: Config, directory: pathlib.Path) -> dict[str, Any]:
    """Losses in nats before and after fine-tuning, by pattern."""
    from experiments import skipping_toy
    from jaxskip.skipping import Policy, unified_skip_loss

    toy, seeds = config.toy, range(config.seed, config.seed + config.tune_seeds)
    model, params = skipping_toy.base(toy, directory / "toy", config.seed)
    held_out = skipping_toy.validation(toy)

    def tuned(name, loss_fn, seed):
        return skipping_toy.train(
            loss_fn,
            params,
            toy,
            directory / "toy" / f"{name.replace(' ', '-')}-{seed}",
            steps=config.tune_steps,
            learning_rate=config.tune_learning_rate,
            seed=1000 + seed,
        )

    def arm(policy, name, seeds):
        loss_fn = skipping_toy.skipping_loss(model, policy)
        after = [skipping_toy.validation_loss(model, tuned(name, loss_fn, seed), toy, policy) for seed in seeds]
        keep = policy.kept(toy.num_layers)
        return {"keep": keep, "before": skipping_toy.validation_loss(model, params, toy, policy), "after": after}

    found: dict[str, Any] = {"whole": arm(Policy(), "whole network", seeds[:1])}
    found["patterns"] = {
        name: arm(Policy(keep), name, seeds) for name, keep in toy_patterns(toy.num_layers, config.toy_speedup).items()
    }

    keep = found["patterns"]["even comb"]["keep"]

    def prefix_loss(layers):
        def loss_fn(params, batch, key):
            tokens = batch["inputs"]
            prefix, response = tokens[:, : config.toy_prefix], tokens[:, config.toy_prefix :]
            return unified_skip_loss(model, params, prefix, response, layers)

        return loss_fn

    import jax

    skipping, whole = (jax.jit(prefix_loss(layers)) for layers in (keep, tuple(range(toy.num_layers))))
    after = tuned("prefix in full", prefix_loss(keep), seeds[0])
    found["prefix"] = {
        "whole": float(whole(params, held_out, None)[0]),
        "before": float(skipping(params, held_out, None)[0]),
        "after": float(skipping(after, held_out, None)[0]),
    }
    return found


def recovered(before: float, after: float, whole: float) -> float:
    """Share of what skipping cost that fine-tuning brought back."""
    return (before - after) / (before - whole)


# The pretrained network


def patterns(num_layers: int, skip: int) -> dict[str, Any]:
    """Policies that leave out `skip` layers."""
    from jaxskip import skipping

    keep = num_layers - skip
    return {
        "even comb": skipping.even_comb(num_layers, keep),
        "without middle": skipping.without_middle(num_layers, keep),
        "without late": skipping.Policy((*range(keep - 1), num_layers - 1)),
        "early exit": skipping.early_exit(num_layers, keep),
    }


def run_pretrained(config: Config) -> dict[str, Any]:
    """Perplexities of the passage under patterns and speed-ups, untrained."""
    from jaxskip import skipping

    model, params, _ = smollm2.load(config.model)
    tokens = smollm2.passage(config.tokens, config.model)
    given = tokens[None, : config.prompt_tokens + config.new_tokens]
    if given.shape[1] <= config.prompt_tokens:
        raise cli.UserError(f"prompt_tokens is {config.prompt_tokens}, and the text has {len(tokens)} tokens")

    def after_prompt(policy):
        nats, _ = skipping.score(model, params, given, prompt_length=config.prompt_tokens, policy=policy)
        return math.exp(float(nats.mean()))

    def perplexity(policy):
        return smollm2.perplexity(tokens, policy, model=config.model)

    found: dict[str, Any] = {"length": len(tokens), "full": perplexity(None), "patterns": {}, "speedups": {}}
    for skip in config.skips:
        for name, policy in patterns(model.num_layers, skip).items():
            found["patterns"].setdefault(name, {})[skip] = perplexity(policy)
    found["full after prompt"] = after_prompt(skipping.Policy())
    for speedup in config.speedups:
        policy = skipping.unified_layer_skipping(model.num_layers, speedup)
        found["speedups"][speedup] = {
            "keep": policy.keep_layers,
            "perplexity": perplexity(policy),
            "after prompt": after_prompt(policy),
            "ceiling": skipping.decode_ceiling(params, model, policy.keep_layers),
        }
    first = skipping.unified_layer_skipping(model.num_layers, min(config.speedups))
    out = skipping.generate(model, params, [given[0, : config.prompt_tokens]], max_new_tokens=2, policy=first)
    found["measured"] = out.ceiling
    return found


def fine_tune(config: Config, speedup: float, directory: pathlib.Path) -> float:
    """Perplexity of the passage after its prompt when `config.model` was fine-tuned for this speed-up."""
    from jaxskip import skipping

    model, params, tokenizer = smollm2.load(config.model)
    keep = skipping.unified_keep_layers(model.num_layers, speedup)
    params = tune(config, model, params, tokenizer, keep, directory / f"speedup-{speedup:g}")
    given = smollm2.passage(config.tokens, config.model)[None, : config.prompt_tokens + config.new_tokens]
    nats, _ = skipping.score(
        model, params, given, prompt_length=config.prompt_tokens, policy=skipping.Policy(keep_layers=keep)
    )
    return math.exp(float(nats.mean()))


def tune(config: Config, model, params, tokenizer, keep, directory: pathlib.Path):
    """`params` after the authors' fine-tuning: their loss, schedule and frozen embeddings, on windows of `text`."""
    import jax
    import optax

    from jaxskip import training
    from jaxskip.data import TokenWindows, load_corpus
    from jaxskip.models import DECODER_PARTITION_RULES
    from jaxskip.skipping import unified_skip_loss

    corpus = load_corpus(config.text, tokenizer=tokenizer)
    half = config.finetune_context // 2

    def loss_fn(params, batch, key):
        return unified_skip_loss(model, params, batch["inputs"][:, :half], batch["inputs"][:, half:], keep)

    steps = config.finetune_steps
    schedule = training.warmup_cosine(config.finetune_learning_rate, steps=steps, warmup=round(0.03 * steps), final=0)
    frozen = {name: name in ("embed", "positions") for name in params}
    tx = optax.chain(optax.adam(schedule), optax.masked(optax.set_to_zero(), frozen))
    mesh = training.make_mesh()
    state, _ = training.fit(
        training.init_state(lambda key: params, tx, jax.random.key(config.seed), mesh, DECODER_PARTITION_RULES),
        training.make_train_step(loss_fn, tx),
        TokenWindows(
            corpus.train,
            batch_size=config.finetune_batch,
            context_length=config.finetune_context,
            vocab_size=model.vocab_size,
            seed=config.seed,
        ),
        mesh=mesh,
        steps=steps,
        directory=directory,
        save_every=max(1, steps // 10),
        title=directory.name,
    )
    return state.params


# The report


def _toy_claims(toy: dict) -> list[Claim]:
    whole = toy["whole"]["before"]
    arms = toy["patterns"]
    gaps = {name: arm["before"] - whole for name, arm in arms.items()}
    shares = {name: [recovered(arm["before"], after, whole) for after in arm["after"]] for name, arm in arms.items()}
    means = {name: sum(arm["after"]) / len(arm["after"]) for name, arm in arms.items()}
    behind = means["even comb"] - min(means.values())
    prefix = toy["prefix"]
    share = recovered(prefix["before"], prefix["after"], prefix["whole"])
    return [
        Claim(
            "Without half of the layers, untrained, the small network loses over 0.15 nats, whatever the pattern",
            expected="> 0.15 nats for every pattern",
            measured=[round(gap, 3) for gap in gaps.values()],
            holds=min(gaps.values()) > 0.15,
            source="paper: skipping needs fine-tuning",
        ),
        Claim(
            "Fine-tuning brings back at least 70 % of that, for every pattern and seed",
            expected=">= 0.7",
            measured=min(min(values) for values in shares.values()),
            holds=min(min(values) for values in shares.values()) >= 0.7,
            source="ours",
        ),
        Claim(
            "Evenly spread layers end within 0.05 nats of the best pattern (mean over seeds)",
            expected="<= 0.05 nats behind",
            measured=behind,
            holds=behind <= 0.05,
            source="ours; the paper has them ahead, at 30 layers",
        ),
        Claim(
            "So does fine-tuning as published, with the prefix read in full",
            expected=">= 0.7 of the loss of skipping comes back",
            measured=share,
            holds=share >= 0.7,
            source="paper's training path",
        ),
    ]


def _pretrained_claims(large: dict) -> list[Claim]:
    small = min(large["speedups"])
    row = large["speedups"][small]
    off = abs(large["measured"] / row["ceiling"] - 1)
    return [
        Claim(
            f"Untrained, the authors' layers for {small}x break a deep network at every position",
            expected="perplexity > 10,000",
            measured=row["perplexity"],
            holds=row["perplexity"] > 1e4,
            source="ours",
        ),
        Claim(
            f"Reading bounds the speed-up of {small}x below {small}: the output matrix is read in any case",
            expected=f"< {small} by the weights, and within 2 % of that by what `generate` read",
            measured=[row["ceiling"], large["measured"]],
            holds=row["ceiling"] < small and off < 0.02,
            source="paper, Table 4: 1.76x at batch 1",
        ),
    ]


def _reference_claims(large: dict) -> list[Claim]:
    full = large["full"]
    claims = [
        Claim(
            "The whole network's perplexity of the passage",
            expected=f"{smollm2.FULL_PERPLEXITY} +- 0.05",
            measured=full,
            holds=abs(full - smollm2.FULL_PERPLEXITY) <= 0.05,
            source="reference figures",
        )
    ]
    rows = {name: {k: v for k, v in large["patterns"][name].items() if k in REFERENCE[name]} for name in REFERENCE}
    rows["the authors' layers, by speed-up"] = {
        r: row["perplexity"] for r, row in large["speedups"].items() if r in REFERENCE_SPEEDUPS
    }
    for name, row in rows.items():
        known = REFERENCE.get(name, REFERENCE_SPEEDUPS)
        off = max((abs(value / known[k] - 1) for k, value in row.items()), default=0.0)
        claims.append(
            Claim(
                f"Perplexities with layers left out: {name} ({', '.join(map(str, row))})",
                expected=f"{', '.join(f'{known[k]:.3g}' for k in row)} +- {TOLERANCE:.0%}",
                measured=[float(f"{value:.3g}") for value in row.values()],
                holds=off <= TOLERANCE,
                source="reference figures",
            )
        )
    middle, comb = large["patterns"]["without middle"], large["patterns"]["even comb"]
    claims.append(
        Claim(
            "Untrained, leaving out a run in the middle is no worse than an even comb, for every number of layers",
            expected="<= 1.01",
            measured=max(middle[k] / comb[k] for k in comb),
            holds=all(middle[k] <= 1.01 * comb[k] for k in comb),
            source="ours",
        )
    )
    return claims


def _tuned_claim(large: dict, tuned: dict) -> Claim:
    gains = {r: large["speedups"][r]["after prompt"] / value for r, value in tuned.items()}
    return Claim(
        "Fine-tuning under skipping mends the pretrained network, for every speed-up",
        expected="perplexity after the prompt falls to less than a tenth",
        measured=[round(gain, 1) for gain in gains.values()],
        holds=min(gains.values()) > 10,
        source="paper",
    )


def _toy_table(toy: dict) -> Table:
    whole = toy["whole"]["before"]
    rows = [["whole network (trained on as control)", "all", whole, toy["whole"]["after"][0], None]]
    for name, arm in toy["patterns"].items():
        after = sum(arm["after"]) / len(arm["after"])
        rows.append(
            [name, ", ".join(map(str, arm["keep"])), arm["before"], after, recovered(arm["before"], after, whole)]
        )
    prefix = toy["prefix"]
    share = recovered(prefix["before"], prefix["after"], prefix["whole"])
    whole = f"(whole network {prefix['whole']:.4g})"
    rows.append(["even comb, prefix in full", whole, prefix["before"], prefix["after"], share])
    return Table(["pattern", "kept", "nats before", "nats after fine-tuning", "share recovered"], rows)


def _pattern_table(config: Config, large: dict) -> Table:
    names = list(large["patterns"])
    rows = [[0, *[large["full"]] * len(names)]]
    rows += [[skip, *(large["patterns"][name][skip] for name in names)] for skip in config.skips]
    return Table(["k", *names], rows)


def _speedup_table(large: dict, tuned: dict) -> Table:
    header = ["target", "kept", "ceiling", "perplexity, every position", "perplexity after a full-depth prompt",
              "the same, fine-tuned"]  # fmt: skip
    rows = [[1, "all", 1.0, large["full"], large["full after prompt"], None]]
    for speedup, row in large["speedups"].items():
        keys = ("ceiling", "perplexity", "after prompt")
        rows.append([speedup, ", ".join(map(str, row["keep"])), *(row[key] for key in keys), tuned.get(speedup)])
    return Table(header, rows)


def _figure(config: Config, toy: dict, large: dict):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for place, (_, arm) in enumerate(toy["patterns"].items()):
        left.plot([arm["before"]], [place], "o", color="C1", label="untrained" if place == 0 else None)
        left.plot(arm["after"], [place] * len(arm["after"]), "|", ms=14, color="C0",
                  label="fine-tuned, each seed" if place == 0 else None)  # fmt: skip
    left.axvline(toy["whole"]["before"], color="black", lw=1, label="whole network")
    left.axvline(toy["whole"]["after"][0], color="black", lw=1, ls=":", label="whole network, trained on")
    left.set_yticks(range(len(toy["patterns"])), [f"{n}\n{arm['keep']}" for n, arm in toy["patterns"].items()])
    left.set(xlabel="nats a byte, held out", title=f"{config.toy.num_layers} layers, skipping at every position")
    left.legend(fontsize="small")
    for name, row in large["patterns"].items():
        right.plot(list(row), list(row.values()), "o-", label=name)
    right.axhline(large["full"], color="black", lw=1, label="whole network")
    right.set(xlabel="layers left out", ylabel="perplexity", yscale="log", title=f"{config.model}, untrained")
    right.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
