"""An event simulator of an iteration of the pipeline: when each node does what, given the microbatches' paths."""

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxskip.pipeline.costs import Costs, Topology

Path = tuple[int, ...]


class Work(NamedTuple):
    """One piece of work; ``kind`` is "F" or "B", a stage's forward or backward pass, or "H", the head with its loss."""

    node: int
    start: float
    end: float
    microbatch: int
    kind: str


class Simulation(NamedTuple):
    """One simulated iteration on N nodes."""

    timeline: tuple[Work, ...]  # in order of start
    idle: np.ndarray  # float64 [N]: seconds of the iteration in which a node computes nothing

    @property
    def makespan(self) -> float:
        """Seconds of the iteration: when the last piece of work ends."""
        return max(work.end for work in self.timeline)


def check_paths(paths: Sequence[Path], topology: Topology) -> None:
    """Raises ValueError unless each path starts on a node of stage 0 and visits other stages, each at most once."""
    if not paths:
        raise ValueError("no paths")
    for i, path in enumerate(paths):
        if not all(0 <= node < topology.nodes for node in path):
            raise ValueError(f"path {i} is {path}; nodes are 0..{topology.nodes - 1}")
        stages = [topology.stage_of[node] for node in path]
        if len(path) < 2 or stages[0] != 0 or len({*stages}) < len(stages):
            raise ValueError(f"path {i} is {path}, through stages {stages}: wanted 0 first, then others, each once")


def contention_free(path: Path, costs: Costs) -> float:
    """Seconds that a microbatch takes on this path where it never waits.

    >>> contention_free((0, 1), Costs(np.ones((2, 2)), compute=2.0))
    14.5
    """
    nodes = list(path)
    circle = [*nodes, nodes[0]]
    links = sum(costs.link[i, j] + costs.link[j, i] for i, j in itertools.pairwise(circle))
    return float(
        links + np.asarray(costs.compute)[nodes].sum() + costs.backward_s[nodes].sum() + costs.head_s[nodes[0]]
    )


def simulate(
    paths: Sequence[Path], topology: Topology, costs: Costs, release: Sequence[float] | np.ndarray | None = None
) -> Simulation:
    """Runs the microbatches along their paths.

    A microbatch goes forward from its origin along its path, back to the origin for the head, to the last node of the
    path, and backward along it. A node does one piece of work at a time, first come first served; a forward pass waits
    while the node keeps ``topology.memory`` microbatches, a backward pass gives one back. An origin's microbatches
    start in their order, each not before the one ``topology.memory`` places earlier has come back.

    Args:
      paths: of the M microbatches, ``(origin, node, ...)``, see `plan`.
      topology, costs: what they run on, N nodes.
      release: seconds [M] before which a microbatch does not start; None means 0.

    Raises ValueError for paths that are none, for costs or ``release`` of another size, and where nodes wait for each
    other's memory for ever, which paths from `plan` exclude.

    Source: arXiv 2502.19913; the official simulator without its rounding of time.

    >>> run = simulate([(0, 1), (0, 1)], Topology([[0], [1]]), Costs(np.zeros((2, 2)), compute=1.0, head=0.0))
    >>> run.makespan, run.idle.tolist()
    (8.0, [3.0, 3.0])
    """
    check_paths(paths, topology)
    count = len(paths)
    if len(costs.link) != topology.nodes:
        raise ValueError(f"costs are of {len(costs.link)} nodes, the topology has {topology.nodes}")
    released = np.zeros(count) if release is None else np.asarray(release, np.float64)
    if released.shape != (count,) or not np.all(np.isfinite(released)) or np.any(released < 0):
        raise ValueError(f"release={release}; it is {count} finite times, not negative")
    timeline = tuple(_run(paths, topology, costs, released.tolist()))
    idle = np.full(topology.nodes, max(work.end for work in timeline))
    for work in timeline:
        idle[work.node] -= work.end - work.start
    return Simulation(timeline, idle)


def _run(paths, topology, costs, release):
    link = costs.link.tolist()
    seconds = {"F": costs.compute.tolist(), "H": costs.head_s.tolist(), "B": costs.backward_s.tolist()}
    steps = [_steps(path) for path in paths]
    following = _followers(paths, topology.memory)
    at = [0] * len(paths)  # the step that each microbatch waits for or has under way
    free_at = [0.0] * topology.nodes
    slots = [topology.memory] * topology.nodes
    waiting = [[] for _ in range(topology.nodes)]  # in order of arrival
    # (time, microbatch, node): a microbatch arrives, or, with microbatch -1, the node may have become free.
    events = [(release[i], i, paths[i][0]) for i in range(len(paths)) if i not in set(following.values())]
    heapq.heapify(events)
    timeline, to_come = [], sum(map(len, steps))
    while events:
        now, arrived, node = heapq.heappop(events)
        queue = waiting[node]
        if arrived >= 0:
            queue.append(arrived)
        if free_at[node] > now:
            continue
        for place, i in enumerate(queue):
            kind = steps[i][at[i]][0]
            if kind == "F" and not slots[node]:
                continue
            del queue[place]
            slots[node] += (kind == "B") - (kind == "F")
            end = now + seconds[kind][node]
            timeline.append(Work(node, now, end, i, kind))
            free_at[node] = end + costs.pause
            heapq.heappush(events, (free_at[node], -1, node))
            at[i] += 1
            if at[i] < len(steps[i]):
                there = steps[i][at[i]][1]
                heapq.heappush(events, (end + link[node][there], i, there))
            elif i in following:
                heapq.heappush(events, (max(end, release[following[i]]), following[i], node))
            break
    if len(timeline) < to_come:
        stuck = {node: queue for node, queue in enumerate(waiting) if queue}
        raise ValueError(f"microbatches wait for memory for ever, at nodes {stuck}; give them other paths")
    return timeline


def _steps(path: Path) -> list[tuple[str, int]]:
    return [*(("F", node) for node in path), ("H", path[0]), *(("B", node) for node in reversed(path))]


def _followers(paths: Sequence[Path], memory: int) -> dict[int, int]:
    """For each microbatch, the one of its origin that may start when it has come back."""
    own = {}
    for i, path in enumerate(paths):
        own.setdefault(path[0], []).append(i)
    return {earlier: later for mine in own.values() for earlier, later in zip(mine, mine[memory:], strict=False)}


def plot_timeline(run: Simulation, labels: Sequence[str] | None = None, order: Sequence[int] | None = None):
    """A matplotlib Figure of who computes what when; gray is idle.

    A color is a microbatch, a number in a bar its index; forward passes are pale, the head is dark, backward passes are
    full. ``labels`` names the nodes, by default with their numbers; ``order`` lists all nodes from top to bottom, for
    example by stages. Save it with ``figure.savefig``.

    >>> run = simulate([(0, 1)], Topology([[0], [1]]), Costs(np.zeros((2, 2)), compute=1.0))
    >>> plot_timeline(run).axes[0].get_xlabel()
    'seconds'
    """
    import matplotlib
    from matplotlib.figure import Figure

    nodes = len(run.idle)
    rows = range(nodes) if order is None else np.argsort(order)
    figure = Figure(figsize=(11, 1.2 + 0.28 * nodes), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(nodes), run.makespan, height=0.9, color="0.9")
    colors = matplotlib.colormaps["hsv"]
    opacity = {"F": 0.45, "H": 1.0, "B": 0.9}
    for node, start, end, microbatch, kind in run.timeline:
        color = "black" if kind == "H" else colors(microbatch * 0.618 % 1)
        axes.barh(rows[node], end - start, left=start, height=0.8, color=color, alpha=opacity[kind])
        if kind != "H" and (end - start) / run.makespan > 0.012:
            axes.text((start + end) / 2, rows[node], str(microbatch), ha="center", va="center", fontsize=6)
    names = [str(node) for node in range(nodes)] if labels is None else labels
    axes.set_yticks(list(rows), names, fontsize=7)
    axes.set_ylim(nodes - 0.4, -0.6)
    axes.set_xlim(0, run.makespan)
    axes.set_xlabel("seconds")
    axes.set_ylabel("node")
    share = float(run.idle.mean() / run.makespan)
    axes.set_title(
        f"{run.makespan:.2f} s, nodes idle {share:.0%} of it (gray); pale: forward, full: backward, black: head"
    )
    return figure
