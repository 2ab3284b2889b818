"""Runs a table on devices: one program for all nodes, a scan over ticks, messages by `jax.lax.ppermute` only."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxskip.pipeline.costs import Topology
from jaxskip.pipeline.table import Table

Params = Mapping[str, Any]


def stack_stages(stages: Any, topology: Topology) -> Any:
    """Stage parameters [S, ...] as the executor takes them, [N, ...]: each node's own stage, replicas are copies.

    >>> stack_stages(jnp.array([1.0, 2.0]), Topology([[0, 2], [1]])).tolist()
    [1.0, 2.0, 1.0]
    """
    return jax.tree.map(lambda leaf: leaf[np.array(topology.stage_of)], stages)


def make_train_step(
    stage_fn: Callable[[Any, jax.Array], jax.Array],
    embed_fn: Callable[[Any, jax.Array], jax.Array],
    head_loss_fn: Callable[[Any, jax.Array, jax.Array], jax.Array],
    table: Table,
    mesh: Mesh,
    axis: str = "node",
    grad_norm: Literal["total", "visits"] = "total",
) -> Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Params]]:
    """``step(params, tokens, targets) -> (loss, gradients)``, pure; wrap it in `jax.jit`, feed the gradients to Optax.

    ``params`` is ``{"embed": ..., "stages": ..., "head": ...}``; stages have leaves [N, ...], see `stack_stages`, to be
    sharded over ``axis``; the others are on all nodes. ``tokens`` and ``targets`` are [M, ...], for M microbatches. The
    loss is the mean of the microbatches', each through the stages of its path; gradients have the parameters' form and
    dtypes, are summed in float32 and are equal on a stage's replicas to the last bit.

    Args:
      stage_fn: (stage, x) -> x, of the same shape and dtype; runs again in the backward pass, only x is kept.
      embed_fn: (embed, tokens of a microbatch) -> x.
      head_loss_fn: (head, x, targets of a microbatch) -> scalar.
      table: see `compile_table`.
      mesh: its ``axis`` has N devices.
      grad_norm: "total" divides all gradients by M, the gradient of the mean loss; "visits" divides a stage's by the
        number of microbatches that visit it, as the official distributed trainer does.

    Raises ValueError for a mesh of another size, another ``grad_norm``, and, when traced, for inputs that are not of M
    microbatches, for parameters that are not of N nodes and for a ``stage_fn`` that changes shape or dtype.

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
    nodes = table.topology.nodes
    if mesh.shape.get(axis) != nodes:
        raise ValueError(f"mesh {dict(mesh.shape)}; axis {axis!r} takes {nodes} devices, one a node")
    if grad_norm not in ("total", "visits"):
        raise ValueError(f"grad_norm is {grad_norm!r}; choose 'total' or 'visits'")
    count = len(table.paths)
    visits = Counter(table.topology.stage_of[node] for path in table.paths for node in path)
    divisors = [visits[stage] if grad_norm == "visits" else count for stage in table.topology.stage_of]
    rows = {
        name: getattr(table, name) for name in ("op", "microbatch", "x_slot", "g_slot", "store_slot", "permutation")
    }

    def local(params, tokens, targets):
        me = lax.axis_index(axis)
        # What every node holds must count as its own, or each backward pass would sum over nodes.
        embed, head, tokens, targets = _varying((params["embed"], params["head"], tokens, targets), axis)
        stage = jax.tree.map(lambda leaf: leaf[0], params["stages"])
        operations = _operations(stage_fn, embed_fn, head_loss_fn, stage, embed, head, tokens, targets)
        x = _check_shapes(stage_fn, embed_fn, stage, embed, tokens)
        messages = [functools.partial(_send, axis=axis, pairs=pairs) for pairs in table.permutations]

        def tick(carry, row):
            buffer, sums = carry
            x, g = buffer[row["x_slot"][me]], buffer[row["g_slot"][me]]
            out, sums = lax.switch(row["op"][me], operations, x, g, row["microbatch"][me], sums)
            message = lax.switch(row["permutation"], messages, out)
            return (buffer.at[row["store_slot"][me]].set(message), sums), None

        sums = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf)), (0.0, embed, stage, head))
        start = _varying((jnp.zeros((table.slots, *x.shape), x.dtype), sums), axis)
        (_, (loss, d_embed, d_stage, d_head)), _ = lax.scan(tick, start, jax.tree.map(jnp.asarray, rows))
        loss, d_embed, d_head = jax.tree.map(lambda leaf: lax.psum(leaf, axis) / count, (loss, d_embed, d_head))
        d_stage = _sum_replicas(d_stage, table.topology, me, axis)
        divisor = jnp.maximum(jnp.asarray(divisors, jnp.float32)[me], 1.0)
        grads = {"embed": d_embed, "stages": jax.tree.map(lambda leaf: leaf[None] / divisor, d_stage), "head": d_head}
        return loss, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, dict(params))

    specs = {"embed": P(), "stages": P(axis), "head": P()}
    program = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), P()), out_specs=(P(), specs))

    def step(params: Params, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, Params]:
        if len(tokens) != count or len(targets) != count:
            raise ValueError(f"tokens {tokens.shape} and targets {targets.shape}; the table is of {count} microbatches")
        for leaf in jax.tree.leaves(params["stages"]):
            if leaf.shape[:1] != (nodes,):
                raise ValueError(f"a stage parameter has shape {leaf.shape}; it begins with {nodes}, see stack_stages")
        return program({name: params[name] for name in specs}, tokens, targets)

    return step


def _operations(stage_fn, embed_fn, head_loss_fn, stage, embed, head, tokens, targets) -> list[Callable]:
    """What IDLE, F, B, F0, H and B0 do: (x, g, microbatch, sums) -> (message, sums)."""

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
        return jnp.zeros_like(x), add(sums, d_embed=d_embed, d_stage=d_stage)

    return [idle, forward, backward, first_forward, top, first_backward]


def _check_shapes(stage_fn, embed_fn, stage, embed, tokens) -> jax.ShapeDtypeStruct:
    x = jax.eval_shape(lambda: embed_fn(embed, tokens[0]))
    y = jax.eval_shape(lambda x: stage_fn(stage, x), x)
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        raise ValueError(f"stage_fn maps {x.dtype}{list(x.shape)} to {y.dtype}{list(y.shape)}; it must keep both")
    return x


def _send(message, axis, pairs):
    return lax.ppermute(message, axis, pairs) if pairs else jnp.zeros_like(message)


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


def _varying(tree, axis):
    """The same values, typed as each node's own."""
    if hasattr(lax, "pcast"):
        return jax.tree.map(lambda leaf: lax.pcast(leaf, axis, to="varying"), tree)
    return jax.tree.map(lambda leaf: lax.pvary(leaf, axis), tree)
