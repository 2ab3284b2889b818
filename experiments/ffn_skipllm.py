"""FFN-SkipLLM on a pretrained model of 30 layers (arXiv 2404.03865): feed-forward blocks skipped token by token.

    python -m experiments.ffn_skipllm                                            # SmolLM2-135M, minutes on a laptop
    python -m experiments.ffn_skipllm --preset paper --model LLAMA_DIR --text FILE

The paper's setting is LLaMA-2 of 7 and 13 billion parameters in chat form, where a quarter of the blocks goes with
hardly a change of answers; its thresholds and tables could not be found. The `paper` preset takes a folder from
Hugging Face and a text, calibrates the threshold for each ratio from 0.05 to 0.35, and reports perplexity beside
leaving out whole layers. On a network of 135 million parameters a quarter is not marginal, which is printed as it is.

Perplexities are teacher-forced: the policy is in force at every position, and every token counts as generated.
"""

import dataclasses
import functools
import math
import pathlib
import time
from typing import Any, Literal

from experiments import cli, smollm2
from experiments.claims import Claim, Report, Table

PAPER = "arXiv 2404.03865"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what skipping feed-forward blocks costs, and what it saves."""

    model: str = "smollm2-135m"
    """smollm2-135m, a .gguf file or a folder from Hugging Face."""
    text: pathlib.Path | None = None
    """Plain text to measure on; None: the passage of these experiments."""
    tokens: int = 607
    """How many tokens of the text."""
    settings: int = 9
    """How many of the settings with a known perplexity (SmolLM2 and the passage alone)."""
    ratios: tuple[float, ...] = (0.05, 0.15, 0.25)
    """Ratios of skipped blocks to calibrate the threshold for."""
    calibration_tokens: int = 256
    """Tokens of each of two sequences, of Python's language reference."""
    static: tuple[int, ...] = (3, 6, 8)
    """Sizes of fixed sets of blocks, and of layers."""
    batch: int = 4
    """Rows that decode together; 1 leaves this out."""
    steps: int = 32
    """Decoding steps that are timed, and counted in the batch; 0 leaves both out."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.steps and self.batch * (self.steps + 33) > self.tokens:
            raise ValueError(f"{self.batch} rows of {self.steps + 33} tokens are more than {self.tokens} tokens")


PRESETS = {
    "smoke": Config(tokens=80, settings=1, ratios=(), static=(), batch=1, steps=0),
    "default": Config(),
    "paper": Config(
        model="llama-2-7b-chat",
        tokens=2048,
        settings=0,
        ratios=(0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35),
        calibration_tokens=512,
        steps=64,
        dtype="bfloat16",
    ),
}

# (tau, cold start, cold end, warm-up, window) -> share of blocks skipped and perplexity of SmolLM2 on the whole
# passage, from an implementation of its own that shares no code with this one.
KNOWN = {
    (0.98, 12, 10, 16, 3): (0.086, 39.1),
    (0.98, 3, 3, 16, 3): (0.213, 74.7),
    (0.98, 3, 3, 0, 3): (0.225, 110.6),
    (0.99, 3, 3, 16, 3): (0.047, 36.5),
    (0.975, 3, 3, 16, 3): (0.281, 98.1),
    (0.97, 3, 3, 16, 3): (0.320, 128.0),
    (0.95, 3, 3, 16, 3): (0.396, 357.0),
    (0.98, 12, 10, 16, 8): (0.160, 62.0),
    (0.98, 0, 0, 0, 3): (0.268, 404.0),
}


def main(config: Config, run: cli.Run) -> Report:
    """Perplexity of adaptive, calibrated and fixed sets; what a batch executes; seconds of decoding."""
    study = prepare(config)
    parts = [part(study) for part in (similarity, settings, calibrated, fixed_sets, batches, timing)]
    claims, tables, points = [], {}, []
    for part in parts:
        claims += part.claims
        tables |= part.tables
        points += part.points
    return Report(
        claims=claims,
        tables=tables,
        figures={"skipping": _figure(study, parts[0].similarity, points)},
        notes=[
            f"{config.model}: {study.config.num_layers} layers; {study.tokens.size} tokens, "
            f"perplexity of the whole network {study.full:.3f}",
            "asked for: tokens that pass a block by; executed less: blocks that no row of the batch ran",
        ],
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """The network, the text, and what both give without skipping."""

    options: Config
    config: Any  # jaxskip.models.DecoderConfig
    params: Any
    tokenizer: Any
    tokens: Any  # int32 [T]
    full: float
    is_known: bool  # SmolLM2 in float32 on the whole passage


@dataclasses.dataclass(frozen=True)
class Part:
    """What one question adds to the report; a point is (kind, share of blocks skipped, perplexity)."""

    claims: list[Claim] = dataclasses.field(default_factory=list)
    tables: dict[str, Table] = dataclasses.field(default_factory=dict)
    points: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)
    similarity: dict[str, Any] = dataclasses.field(default_factory=dict)  # float [L] each


def prepare(options: Config) -> Study:
    import jax.numpy as jnp
    import numpy as np

    from jaxskip.models import weights
    from jaxskip.skipping import Policy

    try:
        if options.model == "smollm2-135m" and options.dtype == "float32":
            config, params, tokenizer = smollm2.load()
        else:
            config, params, tokenizer = weights.load(options.model, dtype=jnp.dtype(options.dtype))
        text = (options.text or smollm2.TEXT).read_text(encoding="utf-8")
    except (OSError, ImportError, ValueError) as error:
        raise cli.UserError(str(error)) from error
    if tokenizer is None:
        raise cli.UserError(f"{options.model} has no tokenizer")
    tokens = np.asarray(tokenizer.encode(text), np.int32)[: options.tokens]
    if len(tokens) < options.tokens:
        raise cli.UserError(f"the text has {len(tokens)} tokens; --tokens asks for {options.tokens}")
    is_known = (options.model, options.text, options.tokens, options.dtype) == ("smollm2-135m", None, 607, "float32")
    study = Study(options, config, params, tokenizer, tokens, math.nan, is_known)
    return dataclasses.replace(study, full=perplexity(study, Policy(), "whole network")[1])


def perplexity(study: Study, policy, name: str) -> tuple[float, float]:
    """(share of feed-forward blocks that tokens pass by, perplexity) with `policy` in force at every position."""
    skipped, nats = _nats()(study.config, policy, study.params, study.tokens)
    result = max(0.0, float(skipped)), math.exp(float(nats))
    print(f"{name}: {result[0]:.1%} skipped, perplexity {result[1]:.4g}", flush=True)
    return result


@functools.cache
def _nats():
    import jax
    import jax.numpy as jnp
    import optax

    from jaxskip.skipping import FFNSkip, ffn_skip_forward, forward

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def nats(config, policy, params, tokens):
        if isinstance(policy, FFNSkip):
            logits, ran = ffn_skip_forward(config, params, tokens[None], policy)
        else:
            logits, _, ran = forward(config, params, tokens[None], policy=policy)
            ran = ran[:, 1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[0, :-1], tokens[1:])
        return 1 - jnp.mean(ran), losses.mean()

    return nats


def similarity(study: Study) -> Part:
    """Similarity of the stream around each block, and of the blocks' own output."""
    import numpy as np

    from jaxskip.skipping import ffn_similarity

    trace = ffn_similarity(study.config, study.params, study.tokens[None])
    cos, block = (np.asarray(x)[:, 0, 1:].mean(axis=1) for x in trace)
    inner = slice(3, study.config.num_layers - 1)
    claim = Claim(
        "the stream before and after a feed-forward block is nearly parallel in all but the first and last layers; the "
        "block's output alone is no signal",
        expected="over layers 3 to the last but one: mean > 0.95 with the residual, and within 0.3 of zero without it",
        measured=f"{cos[inner].mean():.3f} (least {cos[inner].min():.3f}); {block[inner].mean():+.3f} "
        f"(from {block[inner].min():+.2f} to {block[inner].max():+.2f})",
        holds=cos[inner].mean() > 0.95 and np.abs(block[inner]).max() < 0.3,
        source=f"{PAPER}: saturation of the middle layers",
    )
    return Part([claim], similarity={"around the block": cos, "with the block's output alone": block})


def settings(study: Study) -> Part:
    """Settings whose perplexity is known."""
    from jaxskip.skipping import FFNSkip

    chosen = dict(list(KNOWN.items())[: study.options.settings])
    if not chosen:
        return Part()
    found = {key: perplexity(study, FFNSkip(None, None, *key), f"adaptive {key}") for key in chosen}
    header = ["tau", "cold start", "cold end", "warm-up", "window", "skipped", "perplexity", "known skipped", "known"]
    rows = [
        [*key, round(found[key][0], 3), round(found[key][1], 2), *(KNOWN[key] if study.is_known else (None, None))]
        for key in chosen
    ]
    points = [("adaptive", *found[key]) for key in chosen if key[3] == 16]
    claims = _settings_claims(study, found) if study.is_known and len(found) == len(KNOWN) else []
    return Part(claims, {"adaptive skipping": Table(header, rows)}, points)


def _settings_claims(study: Study, found) -> list[Claim]:
    mild, warm, cold = (found[key] for key in list(KNOWN)[:3])
    off = max(abs(found[key][1] / KNOWN[key][1] - 1) for key in KNOWN)
    return [
        Claim(
            "with wide cold regions more than 7 % of the blocks go at a perplexity below 1.45 of the whole network",
            expected="> 7 % skipped, < 1.45 x",
            measured=f"{mild[0]:.1%}, {mild[1] / study.full:.2f} x",
            holds=mild[0] > 0.07 and mild[1] < 1.45 * study.full,
            source="ours",
        ),
        Claim(
            "the first tokens must be written whole: a warm-up of 16 tokens against none, at about equal ratio",
            expected="perplexity > 1.2 x without it",
            measured=f"{cold[1] / warm[1]:.2f} x ({cold[0]:.1%} against {warm[0]:.1%} skipped)",
            holds=cold[1] > 1.2 * warm[1],
            source=f"{PAPER}: attention sinks",
        ),
        Claim(
            "nine settings give the perplexities that a separate implementation measured",
            expected="within 2 %",
            measured=f"{off:.1%} at most",
            holds=off < 0.02,
            source="ours",
        ),
    ]


def calibrated(study: Study) -> Part:
    """Thresholds chosen for a ratio on another text."""
    if not study.options.ratios:
        return Part()
    from jaxskip.skipping import FFNSkip, calibrate_ffn_skip, ffn_similarity

    cos = ffn_similarity(study.config, study.params, _calibration(study)).cos
    table, points = [], []
    for ratio in study.options.ratios:
        policy = calibrate_ffn_skip(cos, target_ratio=ratio, policy=FFNSkip(granularity="token"))
        skipped, value = perplexity(study, policy, f"calibrated for {ratio:g}")
        table.append([ratio, round(policy.tau, 4), policy.cold_start, policy.cold_end, round(skipped, 3), value])
        points.append(("calibrated", skipped, value))
    _, last_ratio, last = min(points, key=lambda point: abs(point[1] - 0.25))
    claim = Claim(
        "a quarter of the feed-forward blocks goes with a marginal change (7 to 13 billion parameters in the paper; "
        "not expected of 135 million)",
        expected="perplexity < 1.1 x at about 25 % skipped",
        measured=f"{last / study.full:.2f} x at {last_ratio:.1%}",
        holds=last < 1.1 * study.full,
        source=f"{PAPER}, abstract",
    )
    header = ["asked for", "tau", "cold start", "cold end", "skipped", "perplexity"]
    return Part([claim], {"calibrated thresholds": Table(header, table)}, points)


def _calibration(study: Study):
    """Two sequences of another text, int32 [2, T]."""
    from pydoc_data.topics import topics

    import numpy as np

    length, tokens, names = study.options.calibration_tokens, [], iter(sorted(topics))
    while len(tokens) < 2 * length:
        tokens += study.tokenizer.encode(topics[next(names)]).tolist()
    return np.asarray(tokens[: 2 * length], np.int32).reshape(2, length)


def fixed_sets(study: Study) -> Part:
    """The same blocks left out for every token, beside the same layers left out whole."""
    if not study.options.static:
        return Part()
    from jaxskip.skipping import Policy, even_comb, ffn_ablation, ffn_similarity, static_ffn_skip, without_middle

    layers = study.config.num_layers
    sample = _calibration(study)
    rankings = {
        "most similar": ffn_similarity(study.config, study.params, sample).cos[:, :, 1:].mean(axis=(1, 2)),
        "least missed alone": -ffn_ablation(study.config, study.params, sample[:1, :128]),
    }
    table, points, costs = [], [], {}
    for count in study.options.static:
        for name, sets in (("evenly spaced", even_comb), ("contiguous middle", without_middle)):
            kept = sets(layers, layers - count).keep_layers
            block, whole = (
                perplexity(study, Policy(**{f"keep_{kind}": kept}), f"{count} {kind} out, {name}")[1]
                for kind in ("feed_forwards", "layers")
            )
            costs[name, count] = block, whole
            table.append([name, count, block, whole])
            points += [(f"blocks, {name}", count / layers, block), (f"layers, {name}", count / layers, whole)]
        for name, scores in rankings.items():
            value = perplexity(study, static_ffn_skip(scores, count), f"{count} feed_forwards out, {name}")[1]
            table.append([name, count, value, None])
            points.append((f"blocks, {name}", count / layers, value))
    most = max(study.options.static)
    claims = []
    for name in ("evenly spaced", "contiguous middle"):
        block, whole = costs[name, most]
        claims.append(
            Claim(
                f"leaving out the feed-forward blocks of {most} layers ({name}) costs less than leaving out the layers",
                expected="lower perplexity",
                measured=f"{block:.4g} against {whole:.4g}",
                holds=block < whole,
                source=f"{PAPER}, abstract: whole layers break earlier",
            )
        )
    header = ["fixed set", "size", "perplexity without blocks", "perplexity without layers"]
    return Part(claims, {"fixed sets": Table(header, table)}, points)


def batches(study: Study) -> Part:
    """What rows that decode together still do not execute."""
    options = study.options
    if not options.steps or options.batch == 1:
        return Part()
    import numpy as np

    from jaxskip.skipping import FFNSkip, score

    length = options.tokens // options.batch
    rows = study.tokens[: options.batch * length].reshape(options.batch, length)[:, : options.steps + 33]
    edge = max(3, round(study.config.num_layers / 10))
    policy = FFNSkip(tau=0.98, cold_start=edge, cold_end=edge, warm_up=4)
    table, shares = [], {}
    for granularity, count in (("token", 1), ("token", options.batch), ("batch", options.batch)):
        nats, ran = score(
            study.config,
            study.params,
            rows[:count],
            prompt_length=32,
            policy=dataclasses.replace(policy, granularity=granularity),
        )
        shares[granularity, count] = 1 - float(np.asarray(ran)[:, 1].mean()) / options.steps
        table.append([granularity, count, shares[granularity, count], math.exp(float(nats.mean()))])
    alone, rows_apart, together = shares.values()
    claim = Claim(
        f"rows that decide each for itself save little together: a block is read where any of {options.batch} wants it",
        expected="a smaller share not executed than of one row, and than with one decision a batch",
        measured=f"{rows_apart:.1%} of {options.batch} rows apart; {alone:.1%} of one row, {together:.1%} with one "
        "decision",
        holds=rows_apart < min(alone, together),
        source="ours: p^B for independent rows",
    )
    header = ["decision by", "rows", "blocks not executed", "perplexity of these rows"]
    return Part([claim], {"batches": Table(header, table)})


def timing(study: Study) -> Part:
    """Seconds a token of decoding with all blocks, and with all but one a token skipped; best of three."""
    options = study.options
    if not options.steps:
        return Part()
    from jaxskip.skipping import FFNSkip, generate

    def seconds(policy) -> tuple[float, Any]:
        moments = []
        out = generate(
            study.config,
            study.params,
            [study.tokens[:32].tolist()],
            max_new_tokens=options.steps + 1,
            policy=policy,
            on_tokens=lambda _: moments.append(time.perf_counter()),
        )
        return (moments[-1] - moments[0]) / options.steps, out

    every = FFNSkip(tau=2.0, cold_start=0, cold_end=0, warm_up=0)
    one = FFNSkip(tau=-1.0, cold_start=0, cold_end=0, warm_up=0, window=study.config.num_layers)
    runs = {policy: [seconds(policy) for _ in range(4)] for policy in (every, one)}
    best = {policy: min(timed for timed, _ in results[1:]) for policy, results in runs.items()}  # the first compiles
    skipped = runs[one][0][1]
    ratio = best[one] / best[every]
    claim = Claim(
        "blocks that are skipped cost no time: a step with every block but one skipped, batch 1",
        expected="< 0.7 of the time of a step that skips none",
        measured=f"{ratio:.2f} ({1e3 * best[one]:.1f} against {1e3 * best[every]:.1f} ms)",
        holds=ratio < 0.7,
        source=f"ours; where reading bounds it, {1 / skipped.ceiling:.2f}",
    )
    header = ["blocks", "ms a token", "blocks not executed", "ceiling on the speed-up"]
    table = [
        [name, 1e3 * best[policy], float(runs[policy][0][1].share_skipped[1]), runs[policy][0][1].ceiling]
        for name, policy in (("all", every), ("one", one))
    ]
    return Part([claim], {"decoding": Table(header, table)})


_STYLES = {
    "adaptive": ("#c44e52", "o", "-"),
    "calibrated": ("#dd8452", "s", "-"),
    "blocks, evenly spaced": ("#4c72b0", "o", "-"),
    "blocks, contiguous middle": ("#4c72b0", "s", "--"),
    "blocks, most similar": ("#55a868", "^", "-"),
    "blocks, least missed alone": ("#55a868", "D", "--"),
    "layers, evenly spaced": ("#8c8c8c", "o", "-"),
    "layers, contiguous middle": ("#8c8c8c", "s", "--"),
}


def _figure(study: Study, similarity, points):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (name, values) in zip(("#c44e52", "#8c8c8c"), similarity.items(), strict=True):
        left.plot(values, color=color, marker=".", label=name)
    left.set(xlabel="layer", ylabel="cosine similarity with the stream before the block", ylim=(-0.4, 1.05))
    left.legend(frameon=False, loc="center right")
    for kind, (color, marker, line) in _STYLES.items():
        mine = sorted((share, value) for name, share, value in points if name == kind)
        if mine:
            right.plot(*zip(*mine, strict=True), line, color=color, marker=marker, label=kind)
    right.axhline(study.full, color="black", linewidth=1, linestyle=":", label="whole network")
    right.set(xlabel="share of feed-forward blocks (or layers) skipped", ylabel="perplexity", yscale="log")
    right.set_ylim(0.8 * study.full, 40 * study.full)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(f"{study.options.model}, {study.tokens.size} tokens; worse than 40 x is not shown")
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
