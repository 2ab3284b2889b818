"""The second way to run paths: one controller that hands each node its work, for nodes that are not alike.

Python issues the work in the order of a simulated timeline; each node is a device with its own executables, messages
are `jax.device_put` to the next device, and a node starts when its input is there. No tick makes it wait for others,
stages may have parameters of any shapes, and embedding and head lie on the origins alone. The price is a dispatch for
each piece of work, and one process: its devices are those that `jax.device_put` reaches.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxskip.pipeline.costs import Topology
from jaxskip.pipeline.execute import (
    EmbedFn,
    HeadLossFn,
    Params,
    StageFn,
    check_microbatches,
    gradient_divisors,
    node_operations,
)
from jaxskip.pipeline.simulate import Path, Work, check_paths
from jaxskip.pipeline.table import B0, F0, B, F, H


def make_dataflow_step(
    stage_fn: StageFn,
    embed_fn: EmbedFn,
    head_loss_fn: HeadLossFn,
    timeline: Sequence[Work],
    topology: Topology,
    devices: Sequence[Any],
    grad_norm: Literal["total", "visits"] = "total",
) -> Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Params]]:
    """``step(params, tokens, targets) -> (loss, gradients)`` as `make_train_step` gives it, but not for `jax.jit`.

    ``params["stages"]`` is a sequence of S trees, one a stage. Parameters lie where you put them: each step copies what
    a node needs and is not there yet, and gradients come back to where the parameters are.

    Args:
      stage_fn, embed_fn, head_loss_fn, grad_norm: see `make_train_step`; ``stage_fn`` gets the tree of any stage.
      timeline: of `simulate`, with the costs of these nodes: the order in which work is issued.
      topology: of N nodes.
      devices: N, of one process; a device may serve several nodes.

    Raises ValueError for a timeline that is not that of whole microbatches, for another number of devices or another
    ``grad_norm``; when called, for inputs that are not of M microbatches or parameters that are not of S stages.

    Source: arXiv 2502.19913 (paths and their gradients); this runtime is the library's own.

    >>> import numpy as np
    >>> from jaxskip.pipeline import Costs, simulate
    >>> topology = Topology([[0], [1]])
    >>> timeline = simulate([(0, 1)], topology, Costs(np.ones((2, 2)), compute=1.0)).timeline
    >>> step = make_dataflow_step(lambda w, x: jnp.sum(w) * x, lambda e, t: e * t, lambda h, x, y: jnp.sum(h * x - y),
    ...                           timeline, topology, [jax.devices()[0]] * 2)
    >>> params = {"embed": jnp.ones(()), "stages": (jnp.array([2.0]), jnp.array([1.0, 2.0])), "head": jnp.ones(())}
    >>> loss, grads = step(params, jnp.ones((1, 1)), jnp.zeros((1, 1)))
    >>> float(loss), [grad.tolist() for grad in grads["stages"]]
    (6.0, [[3.0], [2.0, 2.0]])
    """
    paths = _paths(timeline, topology)
    if len(devices) != topology.nodes:
        raise ValueError(f"{len(devices)} devices; the topology has {topology.nodes} nodes")
    divisors = gradient_divisors(paths, topology, grad_norm)
    origins = [node for node in topology.stages[0] if any(path[0] == node for path in paths)]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
    def operate(op, held, x, g, i, sums):
        return node_operations(stage_fn, embed_fn, head_loss_fn, *held)[op](x, g, i, sums)

    def step(params: Params, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, Params]:
        check_microbatches(tokens, targets, len(paths))
        if len(params["stages"]) != len(topology.stages):
            raise ValueError(f"parameters of {len(params['stages'])} stages; there are {len(topology.stages)}")
        params = jax.tree.map(jnp.asarray, dict(params))
        held, sums = {}, {}
        for node, device in enumerate(devices):
            ends = (params["embed"], params["head"], tokens, targets) if node in origins else (None,) * 4
            held[node] = jax.device_put((params["stages"][topology.stage_of[node]], *ends), device)
            stage, embed, head, *_ = held[node]
            sums[node] = jax.tree.map(
                lambda leaf, device=device: jnp.zeros(jnp.shape(leaf), jnp.float32, device=device),
                (0.0, embed, stage, head),
            )
        inputs, messages = {}, {}
        for op, node, i, there in _tasks(timeline, paths):
            x, g = (None, messages.pop(i)) if op in (B, B0) else (messages.pop(i, None), None)
            if op == F:
                inputs[i, node] = x
            elif op == B:
                x = inputs.pop((i, node))
            out, sums[node] = operate(op, held[node], x, g, i, sums[node])
            if there is not None:
                messages[i] = jax.device_put(out, devices[there])
        return _reduced(params, sums, topology, origins, len(paths), divisors)

    return step


def _paths(timeline: Sequence[Work], topology: Topology) -> list[Path]:
    """The microbatches' paths, from a timeline that holds all their work."""
    mine: dict[int, list[Work]] = {}
    for work in timeline:
        mine.setdefault(work.microbatch, []).append(work)
    if sorted(mine) != list(range(len(mine))):
        raise ValueError(f"the timeline is of microbatches {sorted(mine)}; it holds 0..M-1")
    paths = [tuple(work.node for work in mine[i] if work.kind == "F") for i in range(len(mine))]
    check_paths(paths, topology)
    for i, path in enumerate(paths):
        there = [*(("F", node) for node in path), ("H", path[0]), *(("B", node) for node in reversed(path))]
        if [(work.kind, work.node) for work in mine[i]] != there:
            raise ValueError(f"microbatch {i} does not go along {path} and back in this timeline; take simulate's")
    return paths


def _tasks(timeline, paths):
    """(operation, node, microbatch, node that what comes out goes to) in order."""
    for node, _, _, i, kind in timeline:
        path = paths[i]
        place = path.index(node)
        if kind == "F":
            yield F if place else F0, node, i, (*path, path[0])[place + 1]
        elif kind == "H":
            yield H, node, i, path[-1]
        else:
            yield B if place else B0, node, i, path[place - 1] if place else None


def _reduced(params, sums, topology, origins, count, divisors):
    """The loss, and gradients over all nodes with the parameters' dtypes, on the parameters' devices."""

    def mean(tree, place, nodes, divisor):
        def of_leaf(leaf, *parts):
            parts = [jax.device_put(part, leaf.sharding) for part in parts]
            return (functools.reduce(jnp.add, parts) / divisor).astype(leaf.dtype)

        return jax.tree.map(of_leaf, tree, *(sums[node][place] for node in nodes))

    stages = zip(params["stages"], topology.stages, divisors, strict=True)
    grads = {
        "embed": mean(params["embed"], 1, origins, count),
        "stages": tuple(mean(tree, 2, nodes, divisor) for tree, nodes, divisor in stages),
        "head": mean(params["head"], 3, origins, count),
    }
    losses = [jax.device_put(sums[node][0], jax.tree.leaves(params)[0].sharding) for node in origins]
    return functools.reduce(jnp.add, losses) / count, grads
