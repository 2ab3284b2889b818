"""The paper's planner: conflict-based search, which gives each microbatch its fastest path and then settles conflicts.

Best-first over sets of rules "microbatch i not on node n" and "i not on node n from second s to e": while a stage or a
node has more microbatches than room, those in excess are sent elsewhere, in a few ways, the fastest first; then, where
two are on a node at a time, one of them waits.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxskip.pipeline.costs import Costs, Topology
from jaxskip.pipeline.simulate import Path

STAGE_BRANCHES, NODE_BRANCHES = 3, 2
ENOUGH = 8  # solutions without conflicts
EARLY = 0.88  # of the first solution's time: good enough


class _Visit(NamedTuple):
    agent: int
    node: int
    start: float
    end: float
    forward: bool


class _Route(NamedTuple):
    seconds: float
    path: Path
    visits: tuple[_Visit, ...]


class _Rule(NamedTuple):
    agent: int
    node: int
    start: float = 0.0
    end: float = float("inf")


def conflict_search(
    topology: Topology,
    costs: Costs,
    agents: Sequence[int],
    sequences: Iterable[tuple[int, ...]],
    room: int,
    collision_aware: bool,
    seconds: Callable[[Sequence[Path]], float],
    rounds: int,
) -> list[Path] | None:
    """A path for each agent, no more than ``room`` on a node; None where ``rounds`` steps of the search found none.

    ``agents`` are origins in order of release, each origin's a forward pass apart; ``sequences`` the allowed orders of
    stages; ``seconds`` judges paths. Without ``collision_aware`` the first paths that fit are the result.
    """
    compute = np.asarray(costs.compute)
    prefixes = {order[:k] for order in sequences for k in range(1, len(order) + 1)}
    length = max(map(len, prefixes))

    def reroute(agent: int, rules: frozenset[_Rule]) -> _Route | None:
        release = agents[:agent].count(agents[agent]) * compute[agents[agent]]
        own = [rule for rule in rules if rule.agent == agent]
        return _fastest(agent, agents[agent], release, own, prefixes, length, topology, costs)

    nothing: frozenset[_Rule] = frozenset()
    fastest = [reroute(agent, nothing) for agent in range(len(agents))]
    heap: list[tuple] = [(0.0, 0, 0, nothing, fastest)]
    number, seen = itertools.count(1), {nothing}
    best, least, first, solved = None, float("inf"), None, 0
    for _ in range(rounds):
        if not heap or solved == ENOUGH:
            break
        *_, rules, routes = heapq.heappop(heap)
        branches = _too_many(routes, rules, room, length, topology)
        if branches is None:
            paths = [route.path for route in routes]
            took = seconds(paths)
            if took < least:
                best, least = paths, took
            first = took if first is None else first
            if not collision_aware or least < EARLY * first:
                break
            branches = _collisions(routes)
            solved += not branches
        for added in branches:
            child = rules | added
            if child in seen:
                continue
            seen.add(child)
            changed = {rule.agent for rule in added}
            again = [reroute(i, child) if i in changed else route for i, route in enumerate(routes)]
            found = [route for route in again if route is not None]
            if len(found) == len(agents):
                slowest = max(route.seconds for route in found)
                heapq.heappush(heap, (slowest, -len(child), next(number), child, found))
    return best


def _fastest(agent, origin, release, rules, prefixes, length, topology, costs) -> _Route | None:
    """Best-first over partial paths, by a bound: the way there, and the way back as if nothing were in it."""
    link, compute, head, backward = costs.link, costs.compute, costs.head_s, costs.backward_s
    banned = {rule.node for rule in rules if rule.end == float("inf")}

    def visit(node, arrival, duration, forward):
        start = arrival
        while blocked := [r.end for r in rules if r.node == node and r.start < start + duration and start < r.end]:
            start = max(blocked)
        return _Visit(agent, node, start, start + duration, forward)

    def finish(path, visits):
        steps = [(origin, head[origin], True), *((node, backward[node], False) for node in reversed(path))]
        for node, duration, forward in steps:
            last = visits[-1]
            visits = (*visits, visit(node, last.end + link[last.node, node], duration, forward))
        return visits

    start = (visit(origin, release, compute[origin], True),)
    heap: list[tuple[float, Path, tuple[_Visit, ...], float]] = [(start[0].end, (origin,), start, backward[origin])]
    while heap:
        bound, path, visits, way_back = heapq.heappop(heap)
        if len(visits) > length:
            return _Route(bound, path, visits)
        if len(path) == length:
            visits = finish(path, visits)
            heapq.heappush(heap, (visits[-1].end, path, visits, 0.0))
            continue
        order = tuple(topology.stage_of[node] for node in path)
        for stage, nodes in enumerate(topology.stages):
            if (*order, stage) not in prefixes:
                continue
            for node in nodes:
                if node not in banned:
                    there = visit(node, visits[-1].end + link[path[-1], node], compute[node], True)
                    back = way_back + backward[node] + link[node, path[-1]]
                    heapq.heappush(heap, (there.end + back, (*path, node), (*visits, there), back))
    return None


def _too_many(routes, rules, room, length, topology) -> list[frozenset[_Rule]] | None:
    """Rules that take the excess off a stage or a node, several choices; None where there is none."""
    banned = {(rule.agent, rule.node) for rule in rules if rule.end == float("inf")}
    fastest = sorted(range(len(routes)), key=lambda i: routes[i].seconds)

    def open_nodes(agent, stage):
        return [node for node in topology.stages[stage] if (agent, node) not in banned]

    for nodes in topology.stages[1:]:
        users = [i for i in fastest if {*nodes} & {*routes[i].path}]
        excess = len(users) - room * len(nodes)
        if excess > 0:
            choice = [i for i in users if sum(bool(open_nodes(i, s)) for s in range(1, len(topology.stages))) >= length]
            some = itertools.islice(itertools.combinations(choice, excess), STAGE_BRANCHES)
            return [frozenset(_Rule(i, node) for i in group for node in nodes) for group in some]
    for stage, nodes in list(enumerate(topology.stages))[1:]:
        for node in nodes:
            users = [i for i in fastest if node in routes[i].path]
            excess = len(users) - room
            if excess > 0:
                choice = [i for i in users if len(open_nodes(i, stage)) > 1]
                some = itertools.islice(itertools.combinations(choice, excess), NODE_BRANCHES)
                return [frozenset(_Rule(i, node) for i in group) for group in some]
    return None


def _collisions(routes) -> list[frozenset[_Rule]]:
    """Rules that settle the first overlap found, slowest microbatches first; two backward passes do not collide."""
    slowest = sorted(range(len(routes)), key=lambda i: -routes[i].seconds)
    for place, i in enumerate(slowest):
        for j in slowest[place + 1 :]:
            for a, b in itertools.product(routes[i].visits, routes[j].visits):
                if a.node != b.node or a.end <= b.start or b.end <= a.start or not (a.forward or b.forward):
                    continue
                early, late = sorted((a, b), key=lambda visit: visit.start)
                if not (a.forward and b.forward):
                    return [_wait(late, early)]
                # The slowest quarter never waits for others.
                return [_wait(b, a), _wait(a, b)] if place > len(routes) / 4 else [_wait(b, a)]
    return []


def _wait(who: _Visit, until: _Visit) -> frozenset[_Rule]:
    return frozenset([_Rule(who.agent, who.node, until.start, until.end)])
