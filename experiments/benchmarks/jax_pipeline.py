"""The pipeline part of `experiments.benchmarks.jax_multi_device`: a decoder in stages, one stage a device."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmarks.measuring import Program, compiled_together, emit, in_turns, jax_one_at_a_time
from jaxskip import pipeline
from jaxskip.models import Decoder, DecoderConfig
from jaxskip.pipeline import execute, table

# Row -> (stages, stages on a path).
PLANS = {"full": (4, 4), "25 % skipped": (4, 3), "33 % skipped": (3, 2)}
ORDERS = ("gpipe", "1f1b")
HOPS = 20
TIMED, EXACT, COSTS = "pipeline", "pipeline in float32", "pipeline costs"


class Plan(NamedTuple):
    """Where the stages lie and which path each microbatch takes."""

    topology: pipeline.Topology
    paths: list[tuple[int, ...]]


def make_plan(row: str, devices: int, microbatches: int) -> Plan | None:
    """The paths of a row of `PLANS`, or None where a device would have to hold two stages; with two devices, "full" is
    in two stages.
    """
    stages, length = PLANS[row]
    if devices == 2 and row == "full":
        stages = length = 2
    if devices < stages:
        return None
    nodes = iter(range(devices))
    sizes = pipeline.balanced_sizes(devices, stages, length)
    topology = pipeline.Topology([[next(nodes) for _ in range(size)] for size in sizes], memory=2 * length - 1)
    return Plan(topology, _in_turn(topology, length, microbatches))


def _in_turn(topology: pipeline.Topology, length: int, microbatches: int) -> list[tuple[int, ...]]:
    """Paths on which each choice of stages has its turn, and each node of a stage.

    Not by `jaxskip.pipeline.plan`: with links that are all alike, it sees no reason to use every stage.
    """
    origins, *others = topology.stages
    choices = list(itertools.combinations(range(len(others)), length - 1))
    turns = [itertools.cycle(nodes) for nodes in others]
    paths = []
    for i in range(microbatches):
        wave, place = divmod(i, len(origins))
        chosen = choices[(wave + place) % len(choices)]
        paths.append((origins[place], *(next(turns[stage]) for stage in chosen)))
    return paths


@functools.cache
def _decoder_params(config: DecoderConfig) -> Any:
    return jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _params(config: DecoderConfig, stages: int) -> Any:
    return pipeline.split_decoder(_decoder_params(config), config, stages)


def measure(asked: dict, devices: list) -> None:
    """Costs of one operation and of one message; steps of each plan; where those are in 16 bits, small ones in 32."""
    plans = {row: make_plan(row, len(devices), asked["microbatches"]) for row in PLANS}
    for row, plan in plans.items():
        if plan is None:
            why = f"{PLANS[row][0]} stages, one a device, do not fit on {len(devices)} devices"
            emit(shape=TIMED, row=row, kind="", missing=why)
    fitting = {row: plan for row, plan in plans.items() if plan is not None}
    config = _config(asked["pipeline"], asked["training"]["dtype"])
    _costs(asked, devices, config, {len(plan.topology.stages) for plan in fitting.values()})
    in_32_bits = config.dtype == jnp.float32
    _steps(asked, devices, TIMED, config, asked["pipeline_rows"], fitting, check=in_32_bits)
    if not in_32_bits:
        _steps(asked, devices, EXACT, _config(asked["exact"], "float32"), 2, fitting, check=True)


def _config(fields: dict, dtype: str) -> DecoderConfig:
    style = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "tie_embeddings": False}
    return DecoderConfig(**fields, **style, dtype=jnp.dtype(dtype))


def _tokens(config: DecoderConfig, microbatches: int, rows: int) -> tuple[jax.Array, jax.Array]:
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (2, microbatches, rows, config.context_length))
    tokens, targets = jnp.asarray(drawn, jnp.int32)
    return tokens, targets


def _costs(asked: dict, devices: list, config: DecoderConfig, stage_counts: set[int]) -> None:
    """Times of the executor's operations on one device, and of a message when all devices send one."""
    rows = asked["pipeline_rows"]
    tokens, targets = jax.device_put(_tokens(config, 1, rows), devices[0])
    x = jax.random.normal(jax.random.key(1), (rows, config.context_length, config.embed_dim), config.dtype)
    lies = NamedSharding(Mesh(np.array(devices), ("node",)), P("node"))

    @functools.cache
    def operands(stages: int):
        params = _params(config, stages)
        stage = jax.tree.map(lambda leaf: leaf[0], params["stages"])
        return stage, params["embed"], params["head"]

    def sums(stages: int):
        stage, embed, head = operands(stages)
        return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf)), (0.0, embed, stage, head))

    def lower(kind: int | None, stages: int):
        if kind is None:
            return jax.jit(_hops(lies.mesh), out_shardings=lies).lower(messages())

        def operation(stage, embed, head, x, sums):
            functions = pipeline.decoder_functions(config)
            return execute.node_operations(*functions, stage, embed, head, tokens, targets)[kind](x, x, 0, sums)

        return jax.jit(operation, donate_argnums=4).lower(*operands(stages), x, sums(stages))

    @functools.cache
    def messages():
        return jax.device_put(jnp.concatenate([x] * len(devices)), lies)

    def build(kind: int | None, stages: int):
        program = compiled((kind, stages))
        if kind is None:
            return jax_one_at_a_time(lambda: program(messages())), None
        held = [sums(stages)]

        def call():
            out, held[0] = program(*operands(stages), x, held[0])
            return out

        return call, None

    most = max(stage_counts)
    keys = {(None, most): ("message", f"{HOPS} hops"), (table.H, most): ("H", "head")}
    for stages in sorted(stage_counts):
        for row, kind in (("F", table.F), ("B", table.B)):
            keys[kind, stages] = row, f"{config.num_layers // stages} layers"
    compiled = compiled_together({key: functools.partial(lower, *key) for key in keys})
    programs = [Program(*name, functools.partial(build, *key)) for key, name in keys.items()]
    megabytes = x.nbytes / 2**20
    in_turns(asked, COSTS, programs, jax.block_until_ready, lambda program, out: {"message_mb": megabytes})


def _hops(mesh: Mesh) -> Callable:
    """x [N, ...] goes around the devices, each of which sends to the next one."""
    ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("node"), out_specs=P("node"))
    def hops(x):
        return lax.scan(lambda x, _: (lax.ppermute(x, "node", ring), None), x, None, length=HOPS)[0]

    return hops


def _steps(
    asked: dict, devices: list, shape: str, config: DecoderConfig, rows: int, plans: dict[str, Plan], *, check: bool
) -> None:
    """Loss and gradients of an iteration; compared with one device's, where asked."""
    mesh = Mesh(np.array(devices), ("node",), axis_types=(AxisType.Auto,))
    tokens, targets = _tokens(config, asked["microbatches"], rows)

    @functools.cache
    def placed(row: str):
        topology = plans[row].topology
        params = _params(config, len(topology.stages))
        stages = pipeline.stack_stages(params["stages"], topology)
        lies = {"embed": P(), "stages": P("node"), "head": P()}
        shardings = {name: NamedSharding(mesh, spec) for name, spec in lies.items()}
        return {
            name: jax.device_put(tree, shardings[name]) for name, tree in {**params, "stages": stages}.items()
        }, jax.device_put((tokens, targets), shardings["embed"])

    def lower(row: str, order):
        scheduled = pipeline.compile_table(plans[row].paths, plans[row].topology, order)
        step = pipeline.make_train_step(*pipeline.decoder_functions(config), scheduled, mesh)
        params, batch = placed(row)
        with jax.default_matmul_precision("highest" if check else None):  # pyright: ignore[reportArgumentType]
            return jax.jit(step).lower(params, *batch)

    done = [tuple(key) for key in asked["done"]]
    keys = [(row, order) for row in plans for order in ORDERS]
    compiled = compiled_together({k: functools.partial(lower, *k) for k in keys if (shape, *k) not in done})
    references = functools.cache(lambda row: _reference(config, plans[row], tokens, targets))

    def build(row: str, order: str):
        program, (params, batch) = compiled((row, order)), placed(row)
        memory = program.memory_analysis()
        return jax_one_at_a_time(lambda: program(params, *batch)), memory.temp_size_in_bytes / 2**20

    def facts(program: Program, out) -> dict:
        plan = plans[program.row]
        found: dict = {
            "stages": plan.topology.stages,
            "memory": plan.topology.memory,
            "paths": plan.paths,
            "layers": config.num_layers // len(plan.topology.stages),
            "tokens": tokens.size,
        }
        if check:
            found["error"] = _error(out, references(program.row), plan.topology)
        return found

    programs = [Program(*key, functools.partial(build, *key)) for key in keys]
    in_turns(asked, shape, programs, jax.block_until_ready, facts, turns=2 if shape == TIMED else 1)


def _reference(config: DecoderConfig, plan: Plan, tokens: jax.Array, targets: jax.Array):
    """Loss and gradients of the same paths on one device, the latter as the stages hold them."""
    paths = jnp.array([[plan.topology.stage_of[node] for node in path] for path in plan.paths])
    stages = len(plan.topology.stages)

    def loss(params):
        def of_one(microbatch):
            return pipeline.path_loss(params, config, stages, *microbatch)

        return lax.map(of_one, (paths, tokens, targets)).mean()

    with jax.default_matmul_precision("highest"):
        found, grads = jax.jit(jax.value_and_grad(loss))(_decoder_params(config))
        return jax.device_get((found, pipeline.split_decoder(grads, config, stages)))


def _error(out, expected, topology: pipeline.Topology) -> float:
    """The largest difference of an entry of the gradients, or of the loss, over the largest entry there."""
    loss, grads = expected
    # The scales of layers are no parameters: they stand beside these in the stages.
    layers = pipeline.stack_stages(grads["stages"]["layers"], topology)
    got_loss, got = jax.device_get(out)
    got, want = ({**x, "stages": stages} for x, stages in ((got, got["stages"]["layers"]), (grads, layers)))
    differences = jax.tree.map(
        lambda got, want: np.abs(got - want).max() / np.abs(want).max(), (got_loss, got), (loss, want)
    )
    return float(max(jax.tree.leaves(differences)))
