"""Which layers LAC calls voids, and what it means to skip them (arXiv 2505.14467).

    python -m experiments.void_lac                   # SmolLM2-135M on a page of prose: 2 minutes on two CPU cores
    python -m experiments.void_lac --alphas 0.1 0.9 --new-tokens 128
    python -m experiments.void_lac --preset paper --model Qwen2.5-7B-Instruct/   # a folder from Hugging Face: a GPU

A layer is void for a token where it hardly changes the length of the residual stream. The paper reads the final state
off the last active layer and reports how few layers are active. Three things are told apart here: the share of active
layers, the share of tokens whose logits are left exactly as they were, and what happens when voids are skipped indeed.
The paper's benchmarks (MMLU, GPQA, BoolQ) need files that are not here; perplexity of a fixed text stands for them.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

from experiments import cli, smollm2
from experiments.claims import Claim, Report, Table

# SmolLM2 on the whole passage, by alpha: share of active layers and perplexity, read out and really skipped.
REFERENCE = {
    0.1: (0.813, 30.86, 0.745, 99.6),
    0.2: (0.685, 31.7, 0.582, 185.0),
    0.3: (0.566, 34.2, 0.455, 419.0),
    0.5: (0.390, 44.1, 0.314, 2.3e3),
    0.8: (0.243, 90.8, 0.234, 1.0e4),
    1.0: (0.191, 185.0, 0.195, 7.9e4),
}
SHRINKING_LAYER = 11  # shortens SmolLM2's stream on average; without it the passage's perplexity is 101.9


@dataclasses.dataclass(frozen=True)
class Config:
    """Trace a language model's layers over a passage and over its own continuations, and skip what is void."""

    model: str = smollm2.MODEL
    """Or a .gguf file, or a folder from Hugging Face."""
    tokens: int | None = None
    """Of the passage; all of them by default, which the reference figures are for."""
    alphas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
    true_skip_alphas: tuple[float, ...] = (0.1, 0.3, 0.8)
    min_frequencies: tuple[float, ...] = (0.2, 0.6)
    """Layers active for fewer tokens are left out for good; at the smallest of `alphas`."""
    halt_alphas: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Of the parent method, which leaves the remaining layers out once lengths stand still."""
    halt_norm: Literal["B", "E", "T"] = "T"
    prompt_tokens: int = 128
    new_tokens: int = 64
    seeds: int = 3
    """Sampled continuations of the prompt, at temperature 0.6 and top-p 0.9 as the authors'."""
    seed: int = 0

    def __post_init__(self):
        if not self.alphas or min(self.prompt_tokens, self.new_tokens, self.seeds) < 1:
            raise ValueError("alphas must not be empty, and prompt_tokens, new_tokens and seeds be at least 1")


PRESETS = {
    "smoke": Config(
        tokens=48,
        alphas=(0.1, 0.8),
        true_skip_alphas=(0.1,),
        min_frequencies=(0.6,),
        halt_alphas=(0.8,),
        prompt_tokens=24,
        new_tokens=8,
    ),
    "default": Config(),
    "paper": Config(
        alphas=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        true_skip_alphas=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        min_frequencies=(0.05, 0.2, 0.4, 0.6, 0.8),
        halt_alphas=(0.01, 0.02, 0.05, 0.1, 0.2, 0.8),
        prompt_tokens=256,
        new_tokens=256,
        seeds=8,
    ),
}


def main(config: Config, run: cli.Run) -> Report:
    """Trace, read out, skip, leave out, halt; then judge."""
    del run  # nothing here is worth keeping for a second start
    found = measure(config)
    claims = [*_claims(config, found), *(_reference_claims(found) if _has_reference(config) else [])]
    return Report(
        claims=claims,
        tables={
            "by alpha": _alpha_table(config, found),
            "layers left out for good": _static_table(found),
            "halting (parent method)": _halt_table(config, found),
        },
        figures={"layers": _figure(config, found)},
        notes=[
            f"{config.model}, {found['length']} tokens of the passage; the first position, an attention sink, is left "
            "out of all shares",
            "Share of active layers: of a mask. Every layer has run wherever it stands, except in the last two tables.",
            "logits unchanged: share of tokens whose logits are bit for bit the whole network's",
        ],
    )


# Measuring


def measure(config: Config) -> dict[str, Any]:
    """Everything that the report is made of."""
    import jax.numpy as jnp
    import numpy as np

    from jaxskip import skipping

    model, params, _ = smollm2.load(config.model)
    tokens = smollm2.passage(config.tokens, config.model)
    if len(tokens) < config.prompt_tokens + 2:
        raise cli.UserError(f"prompt_tokens is {config.prompt_tokens}, and the text has {len(tokens)} tokens")
    text = jnp.asarray(tokens)[None]
    later = np.arange(len(tokens))[None] > 0
    found: dict[str, Any] = {"length": len(tokens), "layers": model.num_layers}

    whole = _logits(model, skipping.Policy(), params, text)
    found["full"] = _perplexity(whole, tokens)
    trace = skipping.lac_trace(model, params, text)
    found["delta"] = np.asarray(trace.delta)[:, later].mean(axis=1)
    found["readout"], found["frequency"] = {}, {}
    for alpha in config.alphas:
        active = trace._replace(active=skipping.lac_decision(trace.delta, alpha))
        found["frequency"][alpha] = active.frequency(later)
        logits = _logits(model, skipping.LAC(alpha=alpha), params, text)
        same = np.asarray(jnp.all(logits == whole, axis=-1))
        found["readout"][alpha] = {
            "usage": active.usage(later),
            "last": float(np.asarray(active.active)[-1][later].mean()),
            "unchanged": float(same[later[0]].mean()),
            "perplexity": _perplexity(logits, tokens),
        }
    found["true_skip"] = {}
    for alpha in config.true_skip_alphas:
        policy = skipping.LAC(alpha=alpha, mode="true_skip")
        usage = skipping.lac_trace(model, params, text, policy=policy).usage(later)
        found["true_skip"][alpha] = {
            "usage": usage,
            "perplexity": _perplexity(_logits(model, policy, params, text), tokens),
        }

    found["static"] = []
    active = trace._replace(active=skipping.lac_decision(trace.delta, min(config.alphas)))
    for frequency in config.min_frequencies:
        keep = skipping.void_keep_layers(active, min_frequency=frequency, where_BxT=later)
        sets = {"void": keep, "middle": skipping.without_middle(model.num_layers, len(keep)).keep_layers}
        costs = {
            name: _perplexity(_logits(model, skipping.Policy(k), params, text), tokens) for name, k in sets.items()
        }
        found["static"].append({"frequency": frequency, "keep": keep, **costs})
    if _has_reference(config):
        keep = tuple(i for i in range(model.num_layers) if i != SHRINKING_LAYER)
        found["without_shrinking"] = _perplexity(_logits(model, skipping.Policy(keep), params, text), tokens)
    return found | _phases(config, model, params, tokens, trace) | {"halt": _halting(config, model, params, tokens)}


def _phases(config: Config, model, params, tokens, trace) -> dict[str, Any]:
    """How often each layer is active for a prompt, for sampled answers to it, and for the text that really follows."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxskip import skipping

    length, alpha = config.prompt_tokens, _shown_alpha(config)
    out = skipping.generate(
        model,
        params,
        [tokens[:length]] * config.seeds,
        max_new_tokens=config.new_tokens,
        policy=skipping.LAC(alpha=max(config.alphas)),
        sampling=skipping.Sampling(0.6, top_p=0.9),
        key=jax.random.key(config.seed),
    )
    answered = jnp.asarray([np.concatenate([tokens[:length], answer]) for answer in out.tokens])
    answers = skipping.lac_trace(model, params, answered)
    answers, text = (x._replace(active=skipping.lac_decision(x.delta, alpha)) for x in (answers, trace))
    row, place = np.arange(config.seeds)[:, None], np.arange(answered.shape[1])[None]
    beyond = np.arange(len(tokens))[None]
    return {
        "decoding": {"bytes": out.bytes_read / out.bytes_full},
        "prompt": answers.frequency((row == 0) & (place > 0) & (place < length)),
        "answers": np.array([answers.frequency((row == i) & (place >= length)) for i in range(config.seeds)]),
        "following": text.frequency((beyond >= length) & (beyond < answered.shape[1])),
    }


def _halting(config: Config, model, params, tokens) -> list[dict[str, Any]]:
    """Text after the prompt, scored by decoding steps that may leave early."""
    import numpy as np

    from jaxskip import skipping

    given = tokens[None, : config.prompt_tokens + config.new_tokens]
    found = []
    for alpha in (0.0, *config.halt_alphas):
        policy = skipping.LACHalt(alpha=alpha, norm=config.halt_norm)
        nats, ran = skipping.score(model, params, given, prompt_length=config.prompt_tokens, policy=policy)
        ran = np.asarray(ran)[:, 0]
        found.append({"alpha": alpha, "share": ran.mean() / ran[0], "nats": float(np.mean(nats)), "ran": ran})
    return found


@functools.cache
def _forward():
    import jax

    from jaxskip.skipping import forward

    return jax.jit(
        lambda config, policy, params, text: forward(config, params, text, policy=policy)[0][0], static_argnums=(0, 1)
    )


def _logits(config, policy, params, text):
    return _forward()(config, policy, params, text)


def _perplexity(logits, tokens) -> float:
    import optax

    return math.exp(float(optax.softmax_cross_entropy_with_integer_labels(logits[:-1], tokens[1:]).mean()))


def _has_reference(config: Config) -> bool:
    return config.model == smollm2.MODEL and config.tokens is None


def _shown_alpha(config: Config) -> float:
    return 0.8 if 0.8 in config.alphas else max(config.alphas)


# The report


def _claims(config: Config, found: dict) -> list[Claim]:
    alpha = _shown_alpha(config)
    shown = found["readout"][alpha]
    low = min(set(config.alphas) & set(config.true_skip_alphas), default=None)
    differences = abs(found["answers"] - found["prompt"]).max(axis=1).tolist()
    control = float(abs(found["following"] - found["prompt"]).max())
    claims = [
        Claim(
            f"The readout at alpha {alpha:g} leaves most tokens' logits exactly as they were, far more than its share "
            "of active layers says",
            expected="unchanged tokens in 0.80 .. 0.88, active layers below 0.5",
            measured=[shown["unchanged"], shown["usage"]],
            holds=0.80 <= shown["unchanged"] <= 0.88 and shown["usage"] < 0.5,
            source="ours",
        ),
        Claim(
            f"Decoding with the readout at alpha {max(config.alphas):g} reads as many bytes as decoding without it",
            expected=1,
            measured=found["decoding"]["bytes"],
            holds=found["decoding"]["bytes"] == 1,
            source="ours; the paper claims no speed-up",
        ),
        Claim(
            f"Other layers are active for each sampled answer than for its prompt (alpha {alpha:g}), by more than for "
            "the passage's own next tokens",
            expected=f"largest difference of a layer's share of tokens > {control:.3f}",
            measured=[round(d, 3) for d in differences],
            holds=min(differences) > control,
            source="paper, abstract",
        ),
    ]
    if low is not None:
        pair = found["true_skip"][low]["perplexity"], found["readout"][low]["perplexity"]
        claims.append(
            Claim(
                f"Voids cannot really be skipped: at alpha {low:g} that costs over 3 times the readout's perplexity",
                expected="> 3 x readout",
                measured=pair[0] / pair[1],
                holds=pair[0] > 3 * pair[1],
                source="ours",
            )
        )
    return claims


def _reference_claims(found: dict) -> list[Claim]:
    claims = [
        Claim(
            "The whole network's perplexity of the passage",
            expected=f"{smollm2.FULL_PERPLEXITY} +- 0.05",
            measured=found["full"],
            holds=abs(found["full"] - smollm2.FULL_PERPLEXITY) <= 0.05,
            source="reference figures",
        )
    ]
    for alpha, (usage, perplexity, _, _) in REFERENCE.items():
        if alpha in (0.1, 0.5, 0.8) and alpha in found["readout"]:
            row = found["readout"][alpha]
            claims.append(
                Claim(
                    f"Share of active layers and perplexity of the readout at alpha {alpha:g}",
                    expected=f"{usage} +- 0.01, {perplexity:g} +- 2 %",
                    measured=[row["usage"], row["perplexity"]],
                    holds=abs(row["usage"] - usage) <= 0.01 and abs(row["perplexity"] / perplexity - 1) <= 0.02,
                    source="reference figures",
                )
            )
    delta, cost = float(found["delta"][SHRINKING_LAYER]), found["without_shrinking"]
    claims.append(
        Claim(
            f"The test cannot see a rotation: layer {SHRINKING_LAYER} shortens the stream on average, a void at any "
            "alpha, and the network needs it",
            expected="mean change < 0, perplexity without it > 3 x the network's",
            measured=[delta, cost / found["full"]],
            holds=delta < 0 and cost > 3 * found["full"],
            source="reference figures",
        )
    )
    return claims


def _alpha_table(config: Config, found: dict) -> Table:
    header = ["alpha", "active layers", "last layer active", "logits unchanged", "perplexity, readout",
              "active layers, true skip", "perplexity, true skip", "reference (the same four)"]  # fmt: skip
    rows = [["whole network", 1.0, 1.0, 1.0, found["full"], None, None, None]]
    for alpha in sorted({*config.alphas, *config.true_skip_alphas}):
        row, skipped = found["readout"].get(alpha, {}), found["true_skip"].get(alpha, {})
        reference = REFERENCE.get(alpha) if _has_reference(config) else None
        rows.append(
            [alpha, *(row.get(key) for key in ("usage", "last", "unchanged", "perplexity")), skipped.get("usage"),
             skipped.get("perplexity"), reference]
        )  # fmt: skip
    return Table(header, rows)


def _static_table(found: dict) -> Table:
    header = ["least share of tokens", "kept layers", "of them", "perplexity", "without as many middle layers"]
    rows = [
        [row["frequency"], ", ".join(map(str, row["keep"])), len(row["keep"]), row["void"], row["middle"]]
        for row in found["static"]
    ]
    return Table(header, rows)


def _halt_table(config: Config, found: dict) -> Table:
    header = ["alpha", "share of layers run", "nats a token", "steps that ran the last layer"]
    rows = [[row["alpha"], row["share"], row["nats"], f"{row['ran'][-1]} of {row['ran'][0]}"] for row in found["halt"]]
    return Table(header, rows)


def _figure(config: Config, found: dict):
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    alphas = sorted(found["frequency"])
    grid = np.array([found["frequency"][alpha] for alpha in alphas])
    image = left.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    left.set(xlabel="layer", ylabel="alpha", title="share of the passage's tokens for which a layer is active")
    left.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    figure.colorbar(image, ax=left)
    layers = np.arange(found["layers"])
    right.bar(layers - 0.2, found["prompt"], 0.4, label="prompt")
    spread = found["answers"]
    right.bar(layers + 0.2, spread.mean(axis=0), 0.4, label=f"answers (mean, least, most of {len(spread)})")
    right.vlines(layers + 0.2, spread.min(axis=0), spread.max(axis=0), color="black", lw=1)
    right.set(xlabel="layer", ylabel="share of tokens", title=f"active layers, alpha {_shown_alpha(config):g}")
    right.legend(loc="center", bbox_to_anchor=(0.4, 0.6))
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
