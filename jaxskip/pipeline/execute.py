"""Runs a table on devices: one program for all nodes, a scan over ticks, messages by `jax.lax.ppermute` only.

All stages have parameters of the same shapes here; where they differ, see `jaxskip.pipeline.dataflow`.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxskip.pipeline.costs import Topology
from jaxskip.pipeline.simulate import Path
from jaxskip.pipeline.table import Table

Params = Mapping[str, Any]
StageFn = Callable[[Any, jax.Array], jax.Array]
EmbedFn = Callable[[Any, jax.Array], jax.Array]
HeadLossFn = Callable[[Any, jax.Array, jax.Array], jax.Array]


def stack_stages(stages: Any, topology: Topology) -> Any:
    """Stage parameters [S, ...] as the executor takes them, [N, ...]: each node's own stage, replicas are copies.

    >>> stack_stages(jnp.array([1.0, 2.0]), Topology([[0, 2], [1]])).tolist()
    [1.0, 2.0, 1.0]
    """
    return jax.tree.map(lambda leaf: leaf[np.array(topology.stage_of)], stages)


def stage_mesh(topology: Topology, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for ``axis=("stage", "replica")`` of `make_train_step`; the first N of ``devices``, one a node.

    Its axes "data" and "fsdp", of size one, are those over which the training loop spreads a batch.

    Raises ValueError for stages of unequal numbers of nodes and for too few devices.

    >>> stage_mesh(Topology([[0], [1]])).shape["stage"]
    2
    """
    replicas = {len(nodes) for nodes in topology.stages}
    devices = jax.devices() if devices is None else list(devices)
    if len(replicas) > 1 or len(devices) < topology.nodes:
        raise ValueError(
            f"stages {topology.stages} on {len(devices)} devices; stages with one number of nodes are needed, and a "
            "device a node"
        )
    grid = np.array(devices[: topology.nodes]).reshape(1, 1, len(topology.stages), -1)
    return Mesh(grid, ("data", "fsdp", "stage", "replica"), axis_types=(AxisType.Auto,) * 4)


def make_train_step(
    stage_fn: StageFn,
    embed_fn: EmbedFn,
    head_loss_fn: HeadLossFn,
    table: Table,
    mesh: Mesh,
    axis: str | tuple[str, str] = "node",
    grad_norm: Literal["total", "visits"] = "total",
) -> Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Params]]:
    """``step(params, tokens, targets) -> (loss, gradients)``, pure; wrap it in `jax.jit`, feed the gradients to Optax.

    ``params`` is ``{"embed": ..., "stages": ..., "head": ...}``; stages are sharded over ``axis``, the others are on
    all nodes, which costs memory where the vocabulary is large. ``tokens`` and ``targets`` are [M, ...], for M
    microbatches. The loss is the mean of the microbatches', each through the stages of its path; gradients have the
    parameters' form and dtypes and are summed in float32.

    Args:
      stage_fn: (stage, x) -> x, of the same shape and dtype; runs again in the backward pass, only x is kept.
      embed_fn: (embed, tokens of a microbatch) -> x.
      head_loss_fn: (head, x, targets of a microbatch) -> scalar.
      table: see `compile_table`.
      mesh: its devices along ``axis`` are the N nodes.
      axis:
        one axis of N devices: leaves of stages are [N, ...], see `stack_stages`. Replicas are copies, equal to the last
          bit, also in their gradients; an optimizer that looks at more than one entry, such as a clip by global norm,
          counts a stage as often as it has nodes.
        two, of S and R devices, where each stage has R nodes: leaves are [S, ...], there are no copies to count, and
          device (s, r) is node ``topology.stages[s][r]``. See `stage_mesh`.
      grad_norm: "total" divides all gradients by M, the gradient of the mean loss; "visits" divides a stage's by the
        number of microbatches that visit it, as the official distributed trainer does.

    Raises ValueError for a mesh of another size, another ``grad_norm``, and, when traced, for inputs that are not of M
    microbatches, for parameters that are not of N nodes (S stages) and for a ``stage_fn`` that changes shape or dtype.

    Source: arXiv 2502.19913.

    >>> topology = Topology([[0], [1]])
    >>> from jaxskip.pipeline import compile_table
    >>> mesh = Mesh(np.array(jax.devices()[:2]), ("node",))
    >>> step = make_train_step(lambda w, x: w * x, lambda e, t: e * t, lambda h, x, y: jnp.sum(h * x - y),
    ...                        compile_table([(0, 1)], topology), mesh)
    >>> params = {"embed": jnp.ones(()), "stages": jnp.array([2.0, 3.0]), "head": jnp.ones(())}
    >>> loss, grads = jax.jit(step)(params, jnp.ones((1, 1)), jnp.zeros((1, 1)))
    >>> float(loss), grads["stages"].tolist()
    (6.0, [3.0, 2.0])
    """
    axes: tuple[str, ...] = (axis,) if isinstance(axis, str) else tuple(axis)
    table = _as_on_mesh(table, mesh, axes)
    topology, count = table.topology, len(table.paths)
    # Of each slice of the stacked parameters: of a node, or, where replicas have an axis of their own, of a stage.
    stage_of = topology.stage_of if len(axes) == 1 else tuple(range(len(topology.stages)))
    divisors = [gradient_divisors(table.paths, topology, grad_norm)[stage] for stage in stage_of]
    rows = {
        name: getattr(table, name) for name in ("op", "microbatch", "x_slot", "g_slot", "store_slot", "permutation")
    }

    def local(params, tokens, targets):
        me = lax.axis_index(axes)
        # What several nodes hold must count as each one's own, or each backward pass would sum over them.
        embed, head, tokens, targets = _varying((params["embed"], params["head"], tokens, targets), axes)
        stage = _varying(jax.tree.map(lambda leaf: leaf[0], params["stages"]), axes[1:])
        operations = node_operations(stage_fn, embed_fn, head_loss_fn, stage, embed, head, tokens, targets)
        x = _check_shapes(stage_fn, embed_fn, stage, embed, tokens)
        messages = [functools.partial(_send, axes=axes, pairs=pairs) for pairs in table.permutations]

        def tick(carry, row):
            buffer, sums = carry
            x, g = buffer[row["x_slot"][me]], buffer[row["g_slot"][me]]
            out, sums = lax.switch(row["op"][me], operations, x, g, row["microbatch"][me], sums)
            message = lax.switch(row["permutation"], messages, out)
            return (buffer.at[row["store_slot"][me]].set(message), sums), None

        sums = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), (0.0, embed, stage, head))
        start = _varying((jnp.zeros((table.slots, *x.shape), x.dtype), sums), axes)
        (_, (loss, d_embed, d_stage, d_head)), _ = lax.scan(tick, start, jax.tree.map(jnp.asarray, rows))
        loss, d_embed, d_head = jax.tree.map(lambda leaf: lax.psum(leaf, axes) / count, (loss, d_embed, d_head))
        d_stage = lax.psum(d_stage, axes[1:]) if axes[1:] else _sum_replicas(d_stage, topology, me, axis)
        divisor = jnp.asarray(divisors, jnp.float32)[lax.axis_index(axes[:1])]
        grads = {"embed": d_embed, "stages": jax.tree.map(lambda leaf: leaf[None] / divisor, d_stage), "head": d_head}
        return loss, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, dict(params))

    specs = {"embed": P(), "stages": P(axes[0]), "head": P()}
    program = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), P()), out_specs=(P(), specs))

    def step(params: Params, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, Params]:
        check_microbatches(tokens, targets, count)
        for leaf in jax.tree.leaves(params["stages"]):
            if leaf.shape[:1] != (len(stage_of),):
                raise ValueError(
                    f"a stage parameter has shape {leaf.shape}; it begins with {len(stage_of)}, see stack_stages"
                )
        return program({name: params[name] for name in specs}, tokens, targets)

    return step


def _as_on_mesh(table: Table, mesh: Mesh, axes: tuple[str, ...]) -> Table:
    """The table with nodes numbered as the devices along ``axes``, which must be as many."""
    topology = table.topology
    sizes = tuple(mesh.shape.get(axis) for axis in axes)
    if len(axes) == 1:
        if sizes != (topology.nodes,):
            raise ValueError(f"mesh {dict(mesh.shape)}; axis {axes[0]!r} takes {topology.nodes} devices, one a node")
        return table
    groups = {len(nodes) for nodes in topology.stages}
    if len(groups) > 1 or sizes != (len(topology.stages), *groups):
        raise ValueError(
            f"mesh {dict(mesh.shape)}; axes {axes} take {len(topology.stages)} stages of one number of nodes, these "
            f"have {[len(nodes) for nodes in topology.stages]}; use one axis, or as many nodes for each stage"
        )
    order = [node for nodes in topology.stages for node in nodes]
    device = {node: i for i, node in enumerate(order)}
    names = ("op", "microbatch", "x_slot", "g_slot", "store_slot")
    return table._replace(
        **{name: getattr(table, name)[:, order] for name in names},
        permutations=tuple(tuple((device[a], device[b]) for a, b in pairs) for pairs in table.permutations),
        paths=tuple(tuple(device[node] for node in path) for path in table.paths),
        topology=Topology([[device[node] for node in nodes] for nodes in topology.stages], topology.memory),
    )


def gradient_divisors(paths: Sequence[Path], topology: Topology, grad_norm: str) -> list[int]:
    """By what the summed gradient of each stage is divided; see `make_train_step`."""
    if grad_norm not in ("total", "visits"):
        raise ValueError(f"grad_norm is {grad_norm!r}; choose 'total' or 'visits'")
    visits = Counter(topology.stage_of[node] for path in paths for node in path)
    return [max(visits[s], 1) if grad_norm == "visits" else len(paths) for s in range(len(topology.stages))]


def check_microbatches(tokens: jax.Array, targets: jax.Array, count: int) -> None:
    """Raises ValueError unless both are of ``count`` microbatches."""
    if len(tokens) != count or len(targets) != count:
        raise ValueError(f"tokens {tokens.shape} and targets {targets.shape}; the paths are of {count} microbatches")


def node_operations(stage_fn, embed_fn, head_loss_fn, stage, embed, head, tokens, targets) -> list[Callable]:
    """What IDLE, F, B, F0, H and B0 do on a node: (x, g, microbatch, sums) -> (message, sums).

    ``sums`` are of the loss and of the gradients of embed, stage and head, in float32.
    """

    def begin(embed, stage, i):
        return stage_fn(stage, embed_fn(embed, tokens[i]))

    def add(sums, loss=0.0, d_embed=None, d_stage=None, d_head=None):
        added = [
            total if d is None else jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, d)
            for total, d in zip(sums[1:], (d_embed, d_stage, d_head), strict=True)
        ]
        return (sums[0] + loss, *added)

    def idle(x, g, i, sums):
        return jnp.zeros_like(x), sums

    def forward(x, g, i, sums):
        return stage_fn(stage, x), sums

    def backward(x, g, i, sums):
        d_stage, d_x = jax.vjp(stage_fn, stage, x)[1](g)
        return d_x, add(sums, d_stage=d_stage)

    def first_forward(x, g, i, sums):
        return begin(embed, stage, i), sums

    def top(x, g, i, sums):
        loss, (d_head, d_x) = jax.value_and_grad(head_loss_fn, argnums=(0, 1))(head, x, targets[i])
        return d_x, add(sums, loss.astype(jnp.float32), d_head=d_head)

    def first_backward(x, g, i, sums):
        d_embed, d_stage = jax.vjp(lambda embed, stage: begin(embed, stage, i), embed, stage)[1](g)
        return jnp.zeros_like(g), add(sums, d_embed=d_embed, d_stage=d_stage)

    return [idle, forward, backward, first_forward, top, first_backward]


def _check_shapes(stage_fn, embed_fn, stage, embed, tokens) -> jax.ShapeDtypeStruct:
    x = jax.eval_shape(lambda: embed_fn(embed, tokens[0]))
    y = jax.eval_shape(lambda x: stage_fn(stage, x), x)
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        raise ValueError(f"stage_fn maps {x.dtype}{list(x.shape)} to {y.dtype}{list(y.shape)}; it must keep both")
    return x


def _send(message, axes, pairs):
    return lax.ppermute(message, axes, pairs) if pairs else jnp.zeros_like(message)


def _sum_replicas(tree, topology: Topology, me, axis):
    """Sums over the nodes of each stage: along a chain of them and back, so that all get the same bits."""
    for k in range(1, max(map(len, topology.stages))):
        pairs = [(group[k - 1], group[k]) for group in topology.stages if len(group) > k]
        tree = jax.tree.map(lambda leaf, pairs=pairs: leaf + lax.ppermute(leaf, axis, pairs), tree)
    for k in reversed(range(1, max(map(len, topology.stages)))):
        pairs = [(group[k], group[k - 1]) for group in topology.stages if len(group) > k]
        receives = jnp.isin(me, jnp.array([there for _, there in pairs]))

        def back(leaf, pairs=pairs, receives=receives):
            return jnp.where(receives, lax.ppermute(leaf, axis, pairs), leaf)

        tree = jax.tree.map(back, tree)
    return tree


def _varying(tree, axes):
    """The same values, typed as each node's own along these axes."""
    if hasattr(lax, "pcast"):
        return jax.tree.map(lambda leaf: lax.pcast(leaf, axes, to="varying"), tree)
    return jax.tree.map(lambda leaf: lax.pvary(leaf, axes), tree)
