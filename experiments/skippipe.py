"""SkipPipe: paths that leave stages out, planned, simulated, executed, and a network that then does without nodes.

    python -m experiments.skippipe
    python -m experiments.skippipe --steps 1000 --microbatch-size 16    # closer to convergence
    python -m experiments.skippipe --preset paper --data FOLDER         # 500M parameters; for an accelerator

Four parts. The authors' schedules run through the simulator and must take the published time. The planner must find one
as good, quickly, also for many nodes, and its gain over the full pipeline is shown beside what a uniform cluster could
gain at most. A decoder of six stages trains with full, shortened and swapped paths and is evaluated with stages
missing. And the two backends train and must give the gradients of one device.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from typing import Any, Literal

import numpy as np

from experiments import cli, skippipe_schedules
from experiments.claims import Claim, Report, Table


@dataclasses.dataclass(frozen=True)
class Config:
    """Simulate and plan, train with stages left out, run both backends."""

    restarts: int = 400
    """Rounds of the planner."""
    nodes: tuple[int, ...] = (12, 20, 32, 48, 64)
    """Sizes of clusters that are planned, with paths through 4 of 6 stages."""
    cbs_nodes: int = 20
    """The paper's search is timed up to this size."""
    data: str = "pysrc"
    """pysrc (Python's standard library), a text file or folder, a folder with train.bin and val.bin, or tfds:NAME."""
    max_bytes: int | None = 1_500_000
    """Of the text."""
    stages: int = 6
    length: int = 4
    """Stages that a shortened path visits."""
    layers: int = 6
    embed_dim: int = 64
    num_heads: int = 4
    context_length: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""
    steps: int = 400
    microbatches: int = 4
    """Of a step, each on a path of its own."""
    microbatch_size: int = 8
    """Sequences of a microbatch."""
    learning_rate: float = 2e-3
    """Peak of AdamW's, with a cosine to zero."""
    warmup: int = 50
    eval_every: int = 100
    eval_sequences: int = 128
    save_every: int = 100
    pipeline_steps: int = 10
    """Steps of the executor on eight devices; the first two are not timed."""
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.length < self.stages or self.layers % self.stages:
            raise ValueError(
                f"length={self.length}, stages={self.stages}, layers={self.layers}; paths visit 2 to stages - 1 of "
                "them, and the layers are a multiple of the stages"
            )
        if not 0 <= self.warmup < self.steps or self.eval_sequences % 16 or self.pipeline_steps < 3:
            raise ValueError(
                f"warmup={self.warmup}, steps={self.steps}, eval_sequences={self.eval_sequences}, pipeline_steps="
                f"{self.pipeline_steps}; the warm-up is shorter than the run, sequences are a multiple of 16, and the "
                "executor takes three steps or more"
            )
        if not self.nodes or min(self.nodes) < 12:
            raise ValueError(f"nodes={self.nodes}; six stages with paths of four take 12 nodes or more")


PRESETS = {
    "smoke": Config(restarts=20, nodes=(12, 20), cbs_nodes=12, max_bytes=60_000, embed_dim=16, num_heads=2,
                    context_length=16, steps=6, microbatch_size=2, warmup=1, eval_every=3, eval_sequences=16,
                    pipeline_steps=3),
    "default": Config(),
    "paper": Config(max_bytes=None, layers=24, embed_dim=1024, num_heads=16, context_length=1024, dtype="bfloat16",
                    steps=25_000, microbatches=30, learning_rate=3e-4, warmup=500, eval_every=1000, save_every=500),
}  # fmt: skip

PAPER = "arXiv 2502.19913"
FULL, SKIP, SWAP = "full paths", "skipping", "skipping and swapping"
_COLORS = {
    FULL: "#8c8c8c",
    SKIP: "#4c72b0",
    SWAP: "#c44e52",
    "greedy": "#4c72b0",
    "cbs": "#c44e52",
    "random": "#8c8c8c",
}


def main(config: Config, run: cli.Run) -> Report:
    """Plan first, which is quick; training continues from its checkpoints."""
    from jaxskip.training import CheckpointError

    devices = _eight_devices()
    published = run_published()
    planned = run_planner(config)
    scaling = scheduler_cost(config)
    gains = iteration_times(config)
    try:
        trained = train(config, run)
        backends = run_backends(config, run, devices)
    except (CheckpointError, FloatingPointError, ImportError, ValueError, OSError) as error:
        raise cli.UserError(str(error)) from error
    return Report(
        claims=[
            *_schedule_claims(published, planned, scaling),
            *_gain_claims(planned, gains),
            *_training_claims(config, trained),
            *_backend_claims(config, backends),
        ],
        tables={
            "published schedules": Table(["schedule", "seconds simulated here", "published", "difference"],
                [[name, s, p, f"{s / p - 1:+.1%}"] for name, (s, p) in published.items()]),
            "plans for the published cluster": Table(["method", "seconds simulated", "seconds of planning"],
                [[name, *row[:2]] for name, row in planned.items()]),
            "cost of planning": Table(["nodes", "method", "seconds of planning", "seconds simulated"], scaling),
            "iteration time": _gain_table(gains),
            "validation loss": _loss_table(trained),
            "backends": Table(["backend", "devices", "largest relative error of a gradient", "milliseconds a step"],
                [[name, *row] for name, row in backends["table"].items()]),
        },
        figures={
            "makespans": _makespan_figure(published, planned),
            "timeline_full": _timeline(planned["full"]),
            "timeline_skippipe": _timeline(planned["greedy"]),
            "scheduler_cost": _cost_figure(scaling),
            "convergence": _convergence_figure(config, trained),
        },
        notes=[
            "the published full schedule has 27 microbatches, the published others 30; all plans here have 30",
            "one link of the published data, NL to London, has 1.94 Mbit/s, surely a slip; it is kept, and plans "
            "at random that cross it are slow",
            "where the cost of planning has no seconds simulated, the paper's search ended without paths that fit into "
            "memory; it is simplified here, and it is not the default",
            "a microbatch on a shortened path does less work: at equal steps the networks have seen the same tokens, "
            f"but {config.length}/{config.stages} of the stage visits",
            "most of the gain on the published cluster is routing around slow links; on a uniform one the ceiling is "
            "1 / (1 - k) for a share k of stages left out, and only with stages sized so that all nodes are as busy. "
            "Where nodes have too little memory to keep a long pipeline busy, short paths gain more than that: the "
            "rows with memory for 3 microbatches",
            "figures of the paper in the table of iteration times are read off its bar charts (2 %); its 42 places are "
            "not published, here the 12 are repeated",
        ],
    )  # fmt: skip


def _eight_devices() -> list[Any]:
    """Eight devices, virtual ones of the CPU where there are fewer; before JAX has started these can be made."""
    import jax

    with contextlib.suppress(RuntimeError):  # JAX has started: then it has them or not
        jax.config.update("jax_num_cpu_devices", 8)
    for devices in (jax.devices(), jax.devices("cpu")):
        if len(devices) >= 8:
            return devices[:8]
    raise cli.UserError("the executor needs 8 devices, and JAX has started with fewer: run this in a fresh process")


# Plans


def run_published() -> dict[str, tuple[float, float]]:
    """Schedule -> (seconds simulated here, published seconds)."""
    from jaxskip.pipeline import simulate

    pub = skippipe_schedules
    return {
        name: (simulate(paths, pub.TOPOLOGY, pub.COSTS, release).makespan, pub.SECONDS[name])
        for name, (paths, release) in pub.schedules().items()
    }


def run_planner(config: Config) -> dict[str, tuple[float, float, Any]]:
    """Method -> (seconds of the iteration, seconds of planning, simulation) for the published cluster."""
    from jaxskip.pipeline import plan, simulate

    pub = skippipe_schedules
    found = {}
    for method, length in (("full", None), ("random", 4), ("cbs", 4), ("greedy", 4)):
        begin = time.perf_counter()
        paths = plan(pub.TOPOLOGY, pub.COSTS, length, 30, method, restarts=config.restarts, seed=config.seed)
        took = time.perf_counter() - begin
        run = simulate(paths, pub.TOPOLOGY, pub.COSTS)
        found[method] = run.makespan, took, run
    return found


def scheduler_cost(config: Config) -> list[list[Any]]:
    """[nodes, method, seconds of planning, seconds of the iteration or None] for clusters of many sizes."""
    from jaxskip.pipeline import GEO12, Topology, balanced_sizes, plan, simulate

    rows = []
    for nodes in config.nodes:
        sizes = balanced_sizes(nodes, 6, 4)
        topology = Topology(_consecutive(sizes))
        costs = skippipe_schedules.costs([GEO12[i % 12] for i in range(nodes)])
        for method in ("random", "greedy", "cbs")[: 2 + (nodes <= config.cbs_nodes)]:
            begin = time.perf_counter()
            try:
                paths = plan(topology, costs, 4, 6 * sizes[0], method, restarts=config.restarts, seed=config.seed)
            except ValueError:  # the paper's search may end without paths that fit; then that is its result
                paths = None
            took = time.perf_counter() - begin
            rows.append([nodes, method, took, None if paths is None else simulate(paths, topology, costs).makespan])
    return rows


def _consecutive(sizes) -> list[list[int]]:
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [list(range(a, b)) for a, b in bounds]


def iteration_times(config: Config) -> list[dict[str, Any]]:
    """Full pipeline and SkipPipe in the paper's settings, and on uniform clusters with nodes for each."""
    from jaxskip.pipeline import GEO12, Costs, Topology, balanced_sizes, place, plan, simulate

    def seconds(topology, costs, length, microbatches):
        method = "full" if length is None else "greedy"
        paths = plan(topology, costs, length, microbatches, method, restarts=config.restarts, seed=config.seed)
        return simulate(paths, topology, costs).makespan

    rows = []
    for stages, length, nodes, microbatches, paper in (
        (6, 4, 20, 30, "142 / 52.5 = 2.7"),
        (4, 3, 18, 36, None),
        (8, 6, 42, 35, "140 / 108 = 1.3"),
    ):
        if nodes > max(config.nodes):
            continue
        costs = skippipe_schedules.costs([GEO12[i % 12] for i in range(nodes)])
        published = skippipe_schedules.TOPOLOGY if nodes == 20 else None
        topology = published or Topology(place(balanced_sizes(nodes, stages, length), costs, 0.1, seed=config.seed))
        full, skip = (seconds(topology, costs, n, microbatches) for n in (None, length))
        rows.append({"cluster": "12 places", "stages": stages, "length": length, "nodes": nodes, "memory": 3,
                     "full": full, "skip": skip, "paper": paper})  # fmt: skip
    for stages, length, nodes, microbatches in ((6, 4, 60, 180), (4, 3, 36, 108)):
        for memory in (3, stages):
            costs = Costs(np.zeros((nodes, nodes)), skippipe_schedules.COMPUTE)
            sizes = {None: [nodes // stages] * stages, length: balanced_sizes(nodes, stages, length)}
            full, skip = (
                seconds(Topology(_consecutive(each), memory), costs, n, microbatches) for n, each in sizes.items()
            )
            rows.append({"cluster": "uniform", "stages": stages, "length": length, "nodes": nodes, "memory": memory,
                         "full": full, "skip": skip, "paper": None})  # fmt: skip
    return rows


# Training with stages left out


def _decoder(config: Config, layers: int):
    import jax.numpy as jnp

    from jaxskip.models import DecoderConfig

    return DecoderConfig(
        vocab_size=256, context_length=config.context_length, num_layers=layers, num_heads=config.num_heads,
        embed_dim=config.embed_dim, mlp_dim=8 * config.embed_dim // 3, position="rotary", norm="rmsnorm",
        activation="swiglu", tie_embeddings=False, dtype=jnp.dtype(config.dtype),
        remat="full" if layers > config.stages else "none",
    )  # fmt: skip


def train(config: Config, run: cli.Run) -> dict[str, Any]:
    """For each network: rows of its training, and the mean validation loss on each number of stages."""
    import jax
    import jax.numpy as jnp

    from jaxskip import data, training
    from jaxskip.pipeline import path_loss, stage_sequences

    corpus = data.load_corpus(config.data, max_bytes=config.max_bytes, validation_fraction=0.05)
    model, stages, parts = _decoder(config, config.layers), config.stages, config.microbatches
    mesh = training.make_mesh(devices=jax.devices()[:1])
    schedule = training.warmup_cosine(config.learning_rate, steps=config.steps, warmup=config.warmup, final=0.0)
    tx = training.make_optimizer("adamw", schedule, weight_decay=0.01)
    held_out = list(data.evaluation_windows(
        corpus.validation, batch_size=16, context_length=config.context_length, num_batches=config.eval_sequences // 16,
        vocab_size=256))  # fmt: skip

    @jax.jit
    def loss_on(params, paths, batch):
        return jax.lax.map(lambda p: path_loss(params, model, stages, p, batch["inputs"], batch["targets"]), paths)

    def mean_loss(params, count):
        """Over all choices of ``count`` stages; stage 0 has the embedding, so that it is never missing."""
        paths = [(0, *rest) for rest in itertools.combinations(range(1, stages), count - 1)]
        losses = [loss_on(params, jnp.asarray(paths, jnp.int32), batch) for batch in held_out]
        return float(np.mean(jax.device_get(losses)))

    def evaluate(params):
        return {f"on_{k}": mean_loss(params, k) for k in (stages // 2, stages)}

    found, first = {}, training.init_state(_initial(model), tx, jax.random.key(config.seed), mesh)
    for name, length, swap in ((FULL, stages, False), (SKIP, config.length, False), (SWAP, config.length, True)):
        orders = jnp.asarray(stage_sequences(stages, length, swap))

        def loss_fn(params, batch, key, orders=orders):
            paths = orders[jax.random.randint(key, (parts,), 0, len(orders))]
            rows = [batch[field].reshape(parts, -1, config.context_length) for field in ("inputs", "targets")]
            return jax.lax.map(lambda row: path_loss(params, model, stages, *row), (paths, *rows)).mean(), {}

        batches = data.TokenWindows(
            corpus.train, batch_size=parts * config.microbatch_size, context_length=config.context_length,
            vocab_size=256, seed=config.seed)  # fmt: skip
        state = jax.tree.map(jnp.copy, first)  # `fit` donates it
        state, rows = training.fit(
            state, training.make_train_step(loss_fn, tx), batches, mesh=mesh, steps=config.steps, title=name,
            directory=run.directory / name.replace(" ", "_"), evaluate=evaluate, eval_every=config.eval_every,
            save_every=config.save_every)  # fmt: skip
        means = {k: mean_loss(state.params, k) for k in range(1, stages + 1)}
        found[name] = {"rows": rows, "loss": means}
    return found


def _initial(model):
    import jax.numpy as jnp

    from jaxskip.models import Decoder

    return lambda key: Decoder(model).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


# The backends


def run_backends(config: Config, run: cli.Run, devices) -> dict[str, Any]:
    """Gradients of both backends against one device, and the executor's training against one device's."""
    import jax

    with jax.default_device(devices[0]):
        executor, losses = _run_executor(config, run, devices)
        dataflow = _run_dataflow(config, devices)
    return {"table": {"one program, table of ticks": executor, "one controller, dataflow": dataflow}, "losses": losses}


def _small_model(config: Config):
    return dataclasses.replace(_decoder(config, 4), dtype=np.dtype("float32"), remat="none")


def _small_batches(config: Config, microbatches: int):
    """Two sequences a microbatch."""
    from jaxskip import data

    corpus = data.load_corpus("pysrc", max_bytes=60_000)
    return data.TokenWindows(
        corpus.train, batch_size=2 * microbatches, context_length=config.context_length, vocab_size=256)  # fmt: skip


def _one_device_loss(model, sizes, paths, topology):
    """The loss function of `training.make_train_step`, by autodiff on one device."""
    from jaxskip.pipeline import path_loss

    def loss_fn(params, batch, key):
        rows = (batch[field].reshape(len(paths), -1, model.context_length) for field in ("inputs", "targets"))
        losses = [
            path_loss(params, model, sizes, [topology.stage_of[node] for node in path], *row)
            for path, *row in zip(paths, *rows, strict=True)
        ]
        return sum(losses) / len(losses), {}

    return loss_fn


def _run_executor(config: Config, run: cli.Run, devices):
    """[devices, error of the gradient, milliseconds a step], and losses [2, steps] of executor and one device."""
    import jax
    import optax

    from jaxskip import training
    from jaxskip.pipeline import STAGE_RULES, Topology, compile_table, pipelined_loss, stage_mesh

    topology = Topology([[0, 1], [2, 3], [4, 5], [6, 7]])
    # Not planned: between nodes that are all alike, a plan with memory to spare may leave out a stage for good.
    paths = [(0, 2, 4), (1, 5, 7), (0, 4, 2), (1, 3, 7), (0, 4, 6), (1, 7, 5), (0, 2, 6), (1, 3, 5)]
    model = _small_model(config)
    # A trace without decay passes the gradient on and keeps it, so that the step itself shows it.
    tx = optax.chain(optax.trace(0.0), training.make_optimizer("adamw", config.learning_rate))
    mesh, single = stage_mesh(topology, devices), training.make_mesh(devices=devices[:1])
    grads, losses, milliseconds = [], [], []
    for name, where, rules, loss_fn in (
        ("executor", mesh, STAGE_RULES, pipelined_loss(model, compile_table(paths, topology), mesh)),
        ("one_device", single, ((".*", jax.sharding.PartitionSpec()),), _one_device_loss(model, 4, paths, topology)),
    ):
        step = training.make_train_step(loss_fn, tx)
        state = training.init_state(_initial(model), tx, jax.random.key(config.seed), where, rules)
        for steps in (1, config.pipeline_steps):  # the second part continues from the first one's checkpoint
            state, rows = training.fit(
                state, step, _small_batches(config, len(paths)), mesh=where, title=name, steps=steps,
                directory=run.directory / name)  # fmt: skip
            grads += [jax.device_get(state.opt_state[0].trace)] if steps == 1 else []
        losses.append([row["loss"] for row in rows])
        milliseconds.append(1e3 * rows[-1]["seconds"] / max(1, len(rows) - 2))
    return [8, _largest_error(*grads), milliseconds[0]], np.array(losses)


def _run_dataflow(config: Config, devices):
    """[devices, error of the gradient, milliseconds a step], on three nodes of which one has two layers."""
    import jax
    import jax.numpy as jnp

    from jaxskip.pipeline import Costs, Topology, decoder_functions, make_dataflow_step, simulate, split_decoder

    sizes, topology, paths = (1, 1, 2), Topology([[0], [1], [2]]), [(0, 1), (0, 2), (0, 2, 1), (0, 1, 2)]
    model = _small_model(config)
    params, batch = _initial(model)(jax.random.key(config.seed)), next(_small_batches(config, len(paths)))
    rows = [jnp.asarray(batch[field]).reshape(len(paths), -1, config.context_length) for field in ("inputs", "targets")]
    timeline = simulate(paths, topology, Costs(np.zeros((3, 3)), np.array([1.0, 1.0, 2.0]))).timeline
    step = make_dataflow_step(*decoder_functions(model), timeline, topology, devices[:3])
    parts = split_decoder(params, model, sizes)
    grads = jax.device_get(step(parts, *rows)[1])
    begin = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(step(parts, *rows))
    milliseconds = 1e3 * (time.perf_counter() - begin) / 3
    loss_fn = _one_device_loss(model, sizes, paths, topology)
    want = jax.device_get(jax.jit(jax.grad(lambda p: loss_fn(p, batch, None)[0]))(params))
    layers = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(stage["layers"] for stage in grads["stages"]))
    return [3, _largest_error(grads["embed"] | grads["head"] | {"layers": layers}, want), milliseconds]


def _largest_error(got, want) -> float:
    """Of an entry, relative to the largest entry of its array."""
    import jax

    errors = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b))), dict(got), dict(want))
    return max(jax.tree.leaves(errors))


# The report


def _schedule_claims(published, planned, scaling) -> list[Claim]:
    off = {name: seconds / wanted - 1 for name, (seconds, wanted) in published.items()}
    order = sorted(published, key=lambda name: published[name][0])
    seconds, took, _ = planned["greedy"]
    nodes = max(row[0] for row in scaling)
    cost = next(row for row in scaling if row[:2] == [nodes, "greedy"])
    return [
        Claim(
            "the simulator gives the published times of four published schedules",
            expected="each within 2 %",
            measured=", ".join(f"{name} {x:+.1%}" for name, x in off.items()),
            holds=max(map(abs, off.values())) <= 0.02,
            source=f"{PAPER}, official code: 79.940, 48.916, 35.435 and 33.314 s",
        ),
        Claim(
            "and their order",
            expected="collision-aware < not collision-aware < random < full",
            measured=" < ".join(order),
            holds=order == ["collision-aware", "not collision-aware", "random", "full"],
            source=f"{PAPER}, official code",
        ),
        Claim(
            "our planner finds a schedule as good as the published one, quickly, on one core",
            expected="<= 33.4 s simulated, within 5 s",
            measured=f"{seconds:.2f} s, planned in {took:.2f} s",
            holds=seconds <= 33.4 and took <= 5,
            source=f"{PAPER}, official code; the time is ours",
        ),
        Claim(
            f"{nodes} nodes are planned in reasonable time",
            expected="within 60 s",
            measured=f"{cost[2]:.2f} s",
            holds=cost[2] <= 60,
            source="ours: the paper plans up to 20 nodes",
        ),
    ]


def _gain_claims(planned, gains) -> list[Claim]:
    share = planned["greedy"][0] / planned["full"][0]
    uniform = [g for g in gains if g["cluster"] == "uniform" and g["memory"] == g["stages"]]
    return [
        Claim(
            "on the published cluster an iteration takes up to 55 % less time than the full pipeline's",
            expected="<= 0.45 x the full pipeline's time, with as many microbatches",
            measured=f"{share:.3f} x",
            holds=share <= 0.45,
            source=f"{PAPER}, abstract",
        ),
        Claim(
            "on uniform clusters, with memory for a microbatch a stage, an iteration gets shorter too",
            expected="gain > 1",
            measured=", ".join(f"{g['full'] / g['skip']:.2f} (ceiling {_ceiling(g):.2f})" for g in uniform),
            holds=all(g["full"] / g["skip"] > 1 for g in uniform),
            source="ours; ceiling: 1 / (1 - k) for a share k of stages left out, of a pipeline that is always full",
        ),
    ]


def _ceiling(gain) -> float:
    return gain["stages"] / gain["length"]


def _training_claims(config: Config, trained) -> list[Claim]:
    loss = {name: found["loss"] for name, found in trained.items()}
    half = config.stages // 2
    ratio = {name: math.exp(means[half] - means[config.stages]) for name, means in loss.items()}
    gap, price = loss[FULL][half] - loss[SKIP][half], loss[SKIP][config.stages] - loss[FULL][config.stages]
    source = f"{PAPER}: partial paths in training make a network tolerate missing stages; the bound is ours"
    return [
        Claim(
            f"trained with stages left out, {half} of {config.stages} stages cost little perplexity",
            expected="<= 1.15 x that of all stages (the paper: 1.07 with half of a larger model)",
            measured=f"{ratio[SKIP]:.3f} x; with swaps too {ratio[SWAP]:.3f} x",
            holds=ratio[SKIP] <= 1.15,
            source=source,
        ),
        Claim(
            f"trained on full paths, {half} of {config.stages} stages cost a lot: the control",
            expected=">= 1.4 x",
            measured=f"{ratio[FULL]:.3f} x",
            holds=ratio[FULL] >= 1.4,
            source=source,
        ),
        Claim(
            f"so that with {half} stages the network trained on shortened paths is the better one",
            expected=">= 0.2 nats better",
            measured=f"{gap:.3f} nats",
            holds=gap >= 0.2,
            source="ours",
        ),
        Claim(
            "with all stages it is worse after as many steps, which is the price, but not by much",
            expected="<= 0.30 nats worse",
            measured=f"{price:.3f} nats",
            holds=price <= 0.30,
            source=f"ours; {PAPER} has a negligible effect at 500M parameters and 25,000 steps",
        ),
    ]


def _backend_claims(config: Config, backends) -> list[Claim]:
    error = max(row[1] for row in backends["table"].values())
    losses = backends["losses"]
    drift = float(np.max(np.abs(losses[0] / losses[1] - 1)))
    return [
        Claim(
            "both backends, paths skipped and swapped, give the gradients of one device",
            expected="<= 1e-5 of an array's largest entry (float32)",
            measured=f"{error:.1e}",
            holds=error <= 1e-5,
            source="ours",
        ),
        Claim(
            f"{config.pipeline_steps} steps of AdamW on eight devices have the losses of one device",
            expected="<= 1e-4 relative, at every step",
            measured=f"{drift:.1e}",
            holds=drift <= 1e-4,
            source="ours",
        ),
    ]


def _gain_table(gains) -> Table:
    header = ["cluster", "stages", "on a path", "nodes", "memory", "full (s)", "SkipPipe (s)", "gain",
              "ceiling if uniform", "the paper's gain"]  # fmt: skip
    fields = ("cluster", "stages", "length", "nodes", "memory", "full", "skip")
    return Table(header, [[*(g[f] for f in fields), g["full"] / g["skip"], _ceiling(g), g["paper"]] for g in gains])


def _loss_table(trained) -> Table:
    counts = sorted(next(iter(trained.values()))["loss"], reverse=True)
    rows = [[name, *(found["loss"][k] for k in counts)] for name, found in trained.items()]
    return Table(["trained with", *(f"{k} stages" for k in counts)], rows)


def _bare(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _makespan_figure(published, planned):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    bars = [(f"published:\n{name}", "#8c8c8c", seconds, wanted) for name, (seconds, wanted) in published.items()]
    bars += [(f"planned:\n{name}", "#4c72b0", seconds, None) for name, (seconds, *_) in planned.items()]
    for i, (_, color, seconds, wanted) in enumerate(bars):
        axes.bar(i, min(seconds, 100), color=color)
        axes.annotate(f"{seconds:.1f}", (i, min(seconds, 100)), (0, 2), textcoords="offset points", ha="center")
        if wanted is not None:
            axes.plot([i - 0.4, i + 0.4], [wanted] * 2, color="black", label=None if i else "as published")
    axes.set_xticks(range(len(bars)), [name.replace(" collision", "\ncollision") for name, *_ in bars], fontsize=8)
    axes.set(ylabel="seconds an iteration, simulated", ylim=(0, 112))
    axes.set_title("20 nodes in 12 places, 6 stages, paths through 4 (bars end at 100 s)")
    axes.legend(frameon=False)
    _bare(axes)
    return figure


def _timeline(planned):
    from jaxskip.pipeline import plot_timeline

    pub = skippipe_schedules
    order = [node for nodes in pub.TOPOLOGY.stages for node in nodes]
    return plot_timeline(planned[2], [f"{pub.PLACES[node]}, stage {pub.TOPOLOGY.stage_of[node]}" for node in range(20)],
                         order)  # fmt: skip


def _cost_figure(scaling):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    cost, result = figure.subplots(1, 2)
    for method in ("random", "greedy", "cbs"):
        rows = [row for row in scaling if row[1] == method]
        cost.plot([r[0] for r in rows], [r[2] for r in rows], "o-", color=_COLORS[method], label=method)
        found = [r for r in rows if r[3] is not None]
        result.plot([r[0] for r in found], [r[3] for r in found], "o-", color=_COLORS[method], label=method)
    cost.set(xlabel="nodes", ylabel="seconds of planning", yscale="log", title="cost")
    result.set(xlabel="nodes", ylabel="seconds an iteration", yscale="log", title="result")
    result.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    result.yaxis.set_major_formatter("{x:g}")
    result.yaxis.set_minor_locator(NullLocator())
    for axes in (cost, result):
        axes.legend(frameon=False)
        _bare(axes)
    return figure


def _convergence_figure(config: Config, trained):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    curves, losses, ratios = figure.subplots(1, 3)
    for name, found in trained.items():
        rows = [row for row in found["rows"] if f"on_{config.stages}" in row]
        for count, style in ((config.stages, "-"), (config.stages // 2, "--")):
            curves.plot([r["step"] for r in rows], [r[f"on_{count}"] for r in rows], style, color=_COLORS[name])
        counts = list(found["loss"])
        losses.plot(counts, list(found["loss"].values()), "o-", color=_COLORS[name], label=f"trained with {name}")
        ratio = [math.exp(loss - found["loss"][config.stages]) for loss in found["loss"].values()]
        ratios.plot(counts, ratio, "o-", color=_COLORS[name])
    ratios.axhline(1.15, color="black", linewidth=0.6, linestyle=":")
    title = f"all {config.stages} stages, dashed: {config.stages // 2} of them"
    curves.set(xlabel="steps", ylabel="validation loss (nats)", title=title)
    losses.set(xlabel="stages that run, mean over all choices", ylabel="validation loss (nats)", title="stages missing")
    ratios.set(xlabel="stages that run", ylabel="perplexity / that on all stages", title="price of missing")
    losses.legend(frameon=False, fontsize=8)
    for axes in (curves, losses, ratios):
        _bare(axes)
    return figure


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
