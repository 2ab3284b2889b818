import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments.skippipe_schedules import COSTS, SECONDS, TOPOLOGY
from jaxskip.pipeline import Costs, Topology, contention_free, plan, simulate, stage_sequences
from jaxskip.pipeline.cbs import _collisions, _fastest, _Route, _Rule, _Visit
from tests.pipeline.cases import pipelines


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        ({"coarse": 3}, "collision-aware"),
        ({}, "collision-aware"),
        ({"collision_aware": False}, "not collision-aware"),
    ],
)
def test_the_published_configuration(arguments, published):
    """As good as the published schedule of the same kind, within the 2 % of the simulators."""
    paths = plan(TOPOLOGY, COSTS, 4, 30, "cbs", **arguments)
    assert simulate(paths, TOPOLOGY, COSTS).makespan <= 1.02 * SECONDS[published]
    assert max(Counter(node for path in paths[:15] for node in path).values()) <= 3


@settings(deadline=None, max_examples=15)
@given(pipelines(), st.booleans())
def test_paths_fit_and_are_allowed(pipeline, collision_aware):
    topology, costs, length, microbatches = pipeline
    try:
        paths = plan(topology, costs, length, microbatches, "cbs", collision_aware=collision_aware, restarts=60)
    except ValueError as error:
        assert "no paths fitted" in str(error)
        assume(False)
    under_way = paths[: topology.memory * len(topology.stages[0])]
    assert max(Counter(node for path in under_way for node in path).values()) <= topology.memory
    allowed = {*stage_sequences(len(topology.stages), length)}
    assert all(tuple(topology.stage_of[node] for node in path) in allowed for path in paths)


def fastest(topology, costs, length, rules=(), release=0.0):
    orders = stage_sequences(len(topology.stages), length)
    prefixes = {order[:k] for order in orders for k in range(1, length + 1)}
    return _fastest(0, topology.stages[0][0], release, list(rules), prefixes, length, topology, costs)


def test_the_fastest_path_of_one_microbatch():
    """Without rules, against all paths; without a node, against all paths that leave it out."""
    costs = Costs(np.random.default_rng(0).random((20, 20)), compute=0.3)
    paths = [
        (0, *nodes)
        for order in stage_sequences(6, 4)
        for nodes in itertools.product(*(TOPOLOGY.stages[s] for s in order[1:]))
    ]
    route = fastest(TOPOLOGY, costs, 4, release=2.0)
    assert route.seconds == pytest.approx(2 + min(contention_free(path, costs) for path in paths))
    banned = route.path[2]
    left = [path for path in paths if banned not in path]
    route = fastest(TOPOLOGY, costs, 4, [_Rule(0, banned)])
    assert banned not in route.path
    assert route.seconds == pytest.approx(min(contention_free(path, costs) for path in left))


def test_waiting_for_a_node():
    """Work 1 at the origin, link 1, then 1 from second 2 on: moved behind both windows, which leave a gap of 0.5."""
    topology, costs = Topology([[0], [1]]), Costs(np.ones((2, 2)), compute=1.0)
    route = fastest(topology, costs, 2, [_Rule(0, 1, 2.5, 4.0), _Rule(0, 1, 4.5, 6.0)])
    assert route.visits[1] == _Visit(0, 1, 6.0, 7.0, True)
    assert route.seconds == contention_free((0, 1), costs) + 4
    assert fastest(topology, costs, 2, [_Rule(0, 1, 3.0, 4.0)]).seconds == contention_free((0, 1), costs)


def test_collisions():
    """Both forward: either waits, the slowest never; one backward: the later one; both backward: neither."""

    def routes(*visits):
        return [_Route(10.0 - v.agent, (), (v,)) for v in visits]

    a, b = _Visit(0, 7, 1.0, 2.0, True), _Visit(1, 7, 1.5, 2.5, True)
    assert _collisions(routes(a, b)) == [{_Rule(1, 7, 1.0, 2.0)}]
    others = [_Visit(i, 90 + i, 0.0, 1.0, True) for i in range(2)]
    c, d = a._replace(agent=2), b._replace(agent=3)
    assert _collisions(routes(*others, c, d)) == [{_Rule(3, 7, 1.0, 2.0)}, {_Rule(2, 7, 1.5, 2.5)}]
    assert _collisions(routes(a, b._replace(forward=False))) == [{_Rule(1, 7, 1.0, 2.0)}]
    assert _collisions(routes(a._replace(forward=False), b._replace(forward=False))) == []
    assert _collisions(routes(a, b._replace(start=2.0))) == []
    assert _collisions(routes(a, b._replace(node=8))) == []
