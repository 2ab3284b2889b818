"""Planning: which path each microbatch takes, and which node holds which stage."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxskip.pipeline.cbs import conflict_search
from jaxskip.pipeline.costs import Costs, Topology
from jaxskip.pipeline.simulate import Path, contention_free, simulate

METHODS = ("full", "random", "greedy", "cbs")


def plan(
    topology: Topology,
    costs: Costs,
    length: int | None,
    microbatches: int,
    method: str = "greedy",
    *,
    swap: bool = True,
    collision_aware: bool = True,
    coarse: int = 1,
    restarts: int = 400,
    seed: int = 0,
) -> list[Path]:
    """Paths ``(origin, node, ...)`` for all microbatches of an iteration, in the order in which origins start them.

    The microbatches of an origin that are under way at a time, ``topology.memory`` of them or fewer, get paths
    together; later ones take the same paths again in turn. No node is on more than ``topology.memory`` of these paths,
    so that none waits for memory. Where they do not fill it, the slowest nodes are on none of them, and where nodes are
    alike even a whole stage may be, which then is not trained: with stages by `balanced_sizes` and a multiple of
    ``topology.memory`` microbatches an origin, all are visited equally often.

    Args:
      topology, costs: N nodes and their times.
      length: stages on a path, stage 0 included; None is all of them. Which orders are allowed: `stage_sequences`.
      microbatches: M, spread evenly over the origins, the nodes of stage 0.
      method:
        "full": as many pipelines through all stages as the smallest stage has nodes, neighbours matched so that their
          slowest link is fastest; the baseline without skipping.
        "random": any paths; the baseline with skipping.
        "greedy": microbatches in random order take the fastest path that is left; the best of ``restarts`` such rounds.
        "cbs": the paper's conflict-based search, simplified, see `jaxskip.pipeline.cbs`; slower.
      swap: whether paths may visit two neighbouring stages in the other order.
      collision_aware: judge by `simulate`, so by waiting for busy nodes too; otherwise by the slowest path on its own.
      coarse: microbatches of an origin that share a path; divides those under way.
      restarts: rounds of "greedy", steps of the search of "cbs"; the time grows with it.
      seed: of "random" and "greedy".

    Raises ValueError for arguments out of range, and where the nodes have too little memory for these paths.

    Source: arXiv 2502.19913; "greedy" is this library's own.

    >>> topology = Topology([[0, 1], [2], [3]], memory=1)
    >>> seconds = np.array([[0, 9, 1, 5], [9, 0, 5, 1], [1, 5, 0, 9], [5, 1, 9, 0]])
    >>> plan(topology, Costs(seconds, compute=1.0), length=2, microbatches=4)
    [(0, 2), (1, 3), (0, 2), (1, 3)]
    """
    length = len(topology.stages) if length is None else length
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {METHODS}")
    if not 2 <= length <= len(topology.stages) or (method == "full" and length < len(topology.stages)):
        raise ValueError(
            f"length={length} with method={method!r}; a path visits 2 to {len(topology.stages)} stages, a full one all"
        )
    if len(costs.link) != topology.nodes:
        raise ValueError(f"costs are of {len(costs.link)} nodes, the topology has {topology.nodes}")
    if restarts < 1:
        raise ValueError(f"restarts={restarts}; at least one round is needed")
    pipelines = full_pipelines(topology, costs) if method == "full" else []
    origins = [path[0] for path in pipelines] or list(topology.stages[0])
    each, rest = divmod(microbatches, len(origins))
    if each < 1 or rest:
        raise ValueError(f"microbatches={microbatches}; {len(origins)} origins take a multiple of that")
    at_a_time = min(topology.memory, each)
    if coarse < 1 or at_a_time % coarse:
        raise ValueError(f"coarse={coarse}; it divides the {at_a_time} microbatches that an origin has under way")

    def spread(paths: Sequence[Path]) -> list[Path]:
        """All microbatches, from the paths of those under way, `coarse` of them on each; origins take turns."""
        own = {origin: [path for path in paths if path[0] == origin for _ in range(coarse)] for origin in origins}
        return [own[origin][turn % at_a_time] for turn in range(each) for origin in origins]

    if method == "full":
        return [path for _ in range(each) for path in pipelines]
    agents = origins * (at_a_time // coarse)
    if len(agents) * (length - 1) > topology.memory // coarse * (topology.nodes - len(topology.stages[0])):
        raise ValueError(
            f"{len(agents) * coarse} microbatches under way on paths of {length} stages do not fit into "
            f"{topology.memory} a node; take fewer nodes for stage 0, see balanced_sizes, or fewer microbatches"
        )
    rng = np.random.default_rng(seed)
    if method == "random":
        return spread(_random(topology, length, agents, coarse, swap, rng))

    def seconds(paths: Sequence[Path]) -> float:
        if collision_aware:
            return simulate(spread(paths), topology, costs).makespan
        return max(contention_free(path, costs) for path in paths)

    if method == "greedy":
        return spread(_greedy(topology, costs, length, agents, coarse, swap, restarts, rng, seconds))
    sequences = stage_sequences(len(topology.stages), length, swap)
    room = topology.memory // coarse
    paths = conflict_search(topology, costs, agents, sequences, room, collision_aware, seconds, restarts)
    if paths is None:
        raise ValueError(f"in {restarts} steps, no paths fitted into memory; take more restarts, or 'greedy'")
    return spread(paths)


def stage_sequences(stages: int, length: int, swap: bool = True) -> list[tuple[int, ...]]:
    """All orders in which a path may visit ``length`` of the stages.

    Stage 0 comes first, no stage twice. The frontier is the furthest stage so far: a visit lies at most 4 beyond it,
    or, a swap, 1 before it; at most two swaps a path. Source: arXiv 2502.19913, official code.

    >>> stage_sequences(4, 3)
    [(0, 1, 2), (0, 1, 3), (0, 2, 1), (0, 2, 3), (0, 3, 2)]
    >>> len(stage_sequences(6, 4)), len(stage_sequences(6, 4, swap=False))
    (22, 10)
    """

    def extend(path, swaps):
        if len(path) == length:
            yield path
            return
        frontier = max(path)
        for stage in range(1, stages):
            back = stage < frontier
            if stage in path or stage > frontier + 4 or (back and (stage < frontier - 1 or swaps == 2 or not swap)):
                continue
            yield from extend((*path, stage), swaps + back)

    return list(extend((0,), 0))


def full_pipelines(topology: Topology, costs: Costs) -> list[Path]:
    """Disjoint paths through all stages, as many as the smallest stage has nodes.

    Each stage's nodes are matched with the next one's so that the slowest link there and back is as fast as can be, and
    then the sum. Of larger stages, nodes are left out.

    >>> seconds = np.array([[0, 9, 5, 1], [9, 0, 1, 5], [5, 1, 0, 9], [1, 5, 9, 0]])
    >>> full_pipelines(Topology([[0, 1], [2, 3]]), Costs(seconds, compute=1.0))
    [(0, 3), (1, 2)]
    """
    there_and_back = costs.link + costs.link.T
    width = min(map(len, topology.stages))
    heads = list(topology.stages[0])
    if len(heads) > width:
        # Stage 0 keeps the nodes that the first narrow stage is best matched with.
        narrow = next(nodes for nodes in topology.stages if len(nodes) == width)
        heads = sorted(heads[i] for i, _ in _matching(there_and_back[np.ix_(heads, narrow)]))
    paths = [(head,) for head in heads]
    for nodes in topology.stages[1:]:
        pairs = _matching(there_and_back[np.ix_([path[-1] for path in paths], nodes)])
        paths = [(*paths[i], nodes[j]) for i, j in pairs]
    return paths


def place(sizes: Sequence[int], costs: Costs, dp_factor: float, trials: int = 8000, seed: int = 0) -> list[list[int]]:
    """Which nodes hold which stage, for a `Topology`: a partition of the N nodes into stages of these sizes.

    Simulated annealing over swaps of two nodes, with DT-FM's score: the slowest all-reduce of a stage's gradients,
    plus twice the sum over neighbouring stages of the slowest link in their best matching.

    Args:
      sizes: nodes of each stage, sum N; see `balanced_sizes`.
      costs: only the links count.
      dp_factor: bytes of a stage's parameters over bytes of all activations that cross a link in an iteration.
      trials: swaps that are tried.
      seed: of the search.

    Raises ValueError for sizes below 1 or another sum.

    Source: arXiv 2206.01288 (the score); the search there is a genetic one.

    >>> near = np.kron(np.eye(2), np.ones((2, 2))) < 1
    >>> place([2, 2], Costs(np.where(near, 5.0, 1.0), compute=1.0), dp_factor=1.0, trials=50)
    [[0, 1], [2, 3]]
    """
    nodes = len(costs.link)
    if min(sizes) < 1 or sum(sizes) != nodes:
        raise ValueError(f"sizes={list(sizes)}; they are positive and their sum is the {nodes} nodes of the costs")
    rng = np.random.default_rng(seed)
    bounds = [0, *itertools.accumulate(sizes)]
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    order = np.arange(nodes)

    def reduce_cost(stage):
        group = order[bounds[stage] : bounds[stage + 1]]
        return 2 * dp_factor * costs.link[np.ix_(group, group)].sum(axis=1).max()

    def link_cost(stage):
        a, b = order[bounds[stage] : bounds[stage + 1]], order[bounds[stage + 1] : bounds[stage + 2]]
        cost = costs.link[np.ix_(a, b)]
        return max(cost[pair] for pair in _matching(cost))

    reduces = np.array([reduce_cost(s) for s in range(len(sizes))])
    links = np.array([link_cost(s) for s in range(len(sizes) - 1)])

    current = reduces.max() + 2 * links.sum()
    best, best_order = current, order.copy()
    # From swaps that cost a tenth of the score down to none.
    for temperature in np.geomspace(0.1 * current, 1e-4 * current, trials):
        i, j = rng.choice(nodes, 2, replace=False).tolist()
        changed = {stage_of[i], stage_of[j]}
        if len(changed) == 1:
            continue
        order[[i, j]] = order[[j, i]]
        kept = reduces.copy(), links.copy()
        for s in changed:
            reduces[s] = reduce_cost(s)
        for s in {s + d for s in changed for d in (-1, 0)} & {*range(len(links))}:
            links[s] = link_cost(s)
        score = reduces.max() + 2 * links.sum()
        if score <= current or rng.random() < np.exp((current - score) / temperature):
            current = score
            if score < best:
                best, best_order = score, order.copy()
        else:
            order[[i, j]] = order[[j, i]]
            reduces, links = kept
    return [sorted(best_order[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


def _matching(cost: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (row, column) with the least largest cost, among these with the least sum."""
    steps = np.unique(cost)
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        too_much = (cost > steps[middle]).astype(float)
        if too_much[linear_sum_assignment(too_much)].sum():
            low = middle + 1
        else:
            high = middle
    rows, columns = linear_sum_assignment(np.where(cost > steps[low], cost.sum() + 1.0, cost))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


class _Router:
    """The fastest path of one microbatch over nodes that still have room: a shortest path in each stage sequence."""

    def __init__(self, topology: Topology, length: int, swap: bool):
        sequences = stage_sequences(len(topology.stages), length, swap)
        widest = max(map(len, topology.stages[1:]))
        self.visits = np.array([[stage in sequence for stage in range(len(topology.stages))] for sequence in sequences])
        # [Q, length - 1, K]: the nodes that each sequence may use; N stands for none.
        padded = [[*nodes, *[topology.nodes] * (widest - len(nodes))] for nodes in topology.stages]
        self.nodes = np.array([[padded[stage] for stage in sequence[1:]] for sequence in sequences])

    def price(self, link: np.ndarray, work: np.ndarray) -> None:
        """Sets the seconds of links there and back, [N, N], and of nodes, [N]."""
        onto = np.pad(link + work[None, :], ((0, 1), (0, 1)), constant_values=np.inf)
        self.first = onto[:, self.nodes[:, 0]]  # [N + 1, Q, K], from each origin
        self.hops = onto[self.nodes[:, :-1, :, None], self.nodes[:, 1:, None, :]]  # [Q, length - 2, K, K]
        self.last = np.pad(link, ((0, 1), (0, 1)), constant_values=np.inf)[:, self.nodes[:, -1]]

    def route(self, origin: int, open_nodes: np.ndarray, open_sequences: np.ndarray) -> Path | None:
        """The fastest path over nodes bool [N + 1] in sequences bool [Q] that are open."""
        closed = np.where(open_nodes[self.nodes] & open_sequences[:, None, None], 0.0, np.inf)
        seconds, came = self.first[origin] + closed[:, 0], []
        for hop in range(self.hops.shape[1]):
            ways = seconds[:, :, None] + self.hops[:, hop]
            came.append(ways.argmin(axis=1))
            seconds = ways.min(axis=1) + closed[:, hop + 1]
        total = seconds + self.last[origin]
        sequence, k = divmod(int(total.argmin()), total.shape[1])
        if total[sequence, k] == np.inf:
            return None
        path = [k]
        for back in reversed(came):
            path.append(int(back[sequence, path[-1]]))
        return (origin, *self.nodes[sequence, range(len(path)), path[::-1]].tolist())


def _fill(router: _Router, topology: Topology, agents: Sequence[int], coarse: int, draw: Callable[[], None]):
    """A path for each agent, an origin, in this order; None where memory does not suffice for the last ones."""
    room = np.full(topology.nodes + 1, topology.memory // coarse)
    room[topology.nodes] = 0
    left = np.array([topology.memory // coarse * len(nodes) for nodes in topology.stages])
    paths = []
    for after, origin in zip(reversed(range(len(agents))), agents, strict=True):
        draw()
        # Those that come after still find different stages if and only if no stage keeps back more than they can use.
        usable = np.minimum(left - router.visits, after)[:, 1:].sum(axis=1)
        path = router.route(origin, room > 0, usable >= after * (router.nodes.shape[1]))
        if path is None:
            return None
        room[list(path[1:])] -= 1
        left[[topology.stage_of[node] for node in path[1:]]] -= 1
        paths.append(path)
    return paths


def _random(topology, length, agents, coarse, swap, rng) -> list[Path]:
    router = _Router(topology, length, swap)
    nodes = topology.nodes

    def draw():
        router.price(rng.random((nodes, nodes)), np.zeros(nodes))

    for _ in range(1000):
        paths = _fill(router, topology, rng.permutation(agents).tolist(), coarse, draw)
        if paths is not None:
            return paths
    raise ValueError(
        "in 1000 tries, no random paths fitted into the nodes' memory; take a larger memory or shorter paths"
    )


def _moved(order: np.ndarray, rng) -> np.ndarray:
    """One agent, drawn at random, takes its turn earlier or later."""
    source, target = rng.integers(len(order), size=2)
    return np.insert(np.delete(order, source), target, order[source])


def _greedy(topology, costs, length, agents, coarse, swap, restarts, rng, seconds) -> list[Path]:
    router = _Router(topology, length, swap)
    router.price(costs.link + costs.link.T, costs.compute + costs.backward_s)
    best, least = None, np.inf
    order = rng.permutation(agents)
    for turn in range(restarts):
        tried = rng.permutation(agents) if turn < restarts // 4 else _moved(order, rng)
        paths = _fill(router, topology, tried.tolist(), coarse, lambda: None)
        if paths is not None and (took := seconds(paths)) <= least:
            best, least, order = paths, took, tried
    if best is None:
        raise ValueError(
            f"in {restarts} tries, no paths fitted into the nodes' memory; take a larger memory or shorter paths"
        )
    return best
