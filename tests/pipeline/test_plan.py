import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.skippipe_schedules import COSTS, FULL, TOPOLOGY
from jaxskip.pipeline import (
    GEO12,
    Costs,
    Topology,
    balanced_sizes,
    contention_free,
    full_pipelines,
    geo12,
    link_seconds,
    place,
    plan,
    simulate,
    stage_sequences,
)
from tests.pipeline.cases import pipelines


def test_paths_of_the_published_configuration():
    """22 orders of stages, 10 of them without swaps, and three nodes in each of three stages: 594 paths an origin."""
    sequences = stage_sequences(6, 4)
    assert len(sequences) == 22 and len(stage_sequences(6, 4, swap=False)) == 10
    assert sum(np.prod([len(TOPOLOGY.stages[s]) for s in order[1:]]) for order in sequences) == 594


def test_bounds_of_jumps_and_swaps():
    orders = stage_sequences(8, 6)
    assert len({*orders}) == len(orders)
    swaps = [[max(order[:i]) - s for i, s in enumerate(order) if i and s < max(order[:i])] for order in orders]
    assert max(map(len, swaps)) == 2 and {d for each in swaps for d in each} == {1}
    jumps = [s - max(order[:i]) for order in stage_sequences(8, 3) for i, s in enumerate(order) if i]
    assert max(jumps) == 4 and min(jumps) == -1
    assert (0, 6) not in stage_sequences(8, 2)


def test_greedy_reaches_the_published_schedule():
    """At most 33.4 s, and less than 0.45 of the full pipeline with as many microbatches, whatever the seed."""
    full = simulate(FULL * 10, TOPOLOGY, COSTS).makespan
    for seed in range(2):
        makespan = simulate(plan(TOPOLOGY, COSTS, 4, 30, seed=seed), TOPOLOGY, COSTS).makespan
        assert makespan <= 33.4 and makespan <= 0.45 * full
    assert simulate(plan(TOPOLOGY, COSTS, 4, 30, swap=False), TOPOLOGY, COSTS).makespan > 33.4


def test_one_microbatch_takes_the_fastest_of_all_paths():
    """Against all 594; on the published links the slowest origin's fastest path takes 15.14 s."""
    for costs, slowest in ((COSTS, 15.14), (Costs(np.random.default_rng(0).random((20, 20)), 0.1), None)):
        fastest = {}
        for origin in TOPOLOGY.stages[0]:
            paths = [
                (origin, *nodes)
                for order in stage_sequences(6, 4)
                for nodes in itertools.product(*(TOPOLOGY.stages[s] for s in order[1:]))
            ]
            fastest[origin] = min(contention_free(path, costs) for path in paths)
        roomy = Topology(TOPOLOGY.stages, memory=5)
        for path in plan(roomy, costs, 4, 5, restarts=1):
            assert contention_free(path, costs) == pytest.approx(fastest[path[0]])
        if slowest:
            assert max(fastest.values()) == pytest.approx(slowest, abs=0.005)


@settings(deadline=None, max_examples=25)
@given(pipelines(), st.sampled_from(["random", "greedy"]), st.booleans(), st.booleans())
def test_invariants_of_a_plan(pipeline, method, swap, collision_aware):
    topology, costs, length, microbatches = pipeline
    arguments = {"swap": swap, "collision_aware": collision_aware, "restarts": 8, "seed": 1}
    paths = plan(topology, costs, length, microbatches, method, **arguments)
    assert paths == plan(topology, costs, length, microbatches, method, **arguments)
    assert len(paths) == microbatches
    origins = len(topology.stages[0])
    assert Counter(path[0] for path in paths) == dict.fromkeys(topology.stages[0], microbatches // origins)
    allowed = {*stage_sequences(len(topology.stages), length, swap)}
    assert all(tuple(topology.stage_of[node] for node in path) in allowed for path in paths)
    # Whichever of an origin's microbatches are under way, `memory` in a row.
    for first in range(0, microbatches, origins):
        under_way = paths[first : first + topology.memory * origins]
        assert max(Counter(node for path in under_way for node in path).values()) <= topology.memory
    simulate(paths, topology, costs)


def test_coarse_plans_share_paths():
    paths = plan(TOPOLOGY, COSTS, 4, 30, coarse=3)
    assert len({*paths}) == 5
    assert simulate(paths, TOPOLOGY, COSTS).makespan <= 33.4


def test_memory_that_just_suffices_is_always_filled():
    """45 visits for 45 places: each restart finds paths, so that one is enough."""
    for seed in range(20):
        for method in ("greedy", "random"):
            paths = plan(TOPOLOGY, COSTS, 4, 30, method, restarts=1, seed=seed)
            assert len(paths) == 30 and all(len(path) == 4 for path in paths)


def test_full_pipelines():
    paths = full_pipelines(TOPOLOGY, COSTS)
    assert len(paths) == 3 and len({node for path in paths for node in path}) == 18
    assert all([TOPOLOGY.stage_of[node] for node in path] == [*range(6)] for path in paths)
    assert plan(TOPOLOGY, COSTS, None, 9, "full") == paths * 3
    # Least largest cost first (4 rather than 5), then the least sum.
    link = np.zeros((6, 6))
    link[:3, 3:] = [[1, 5, 9], [3, 4, 9], [9, 9, 2]]
    assert full_pipelines(Topology([[0, 1, 2], [3, 4, 5]]), Costs(link, 1.0)) == [(0, 3), (1, 4), (2, 5)]
    link[:3, 3:] = [[1, 4, 9], [2, 5, 9], [9, 9, 2]]
    assert full_pipelines(Topology([[0, 1, 2], [3, 4, 5]]), Costs(link, 1.0)) == [(0, 4), (1, 3), (2, 5)]


def dtfm_score(stages, link, dp_factor):
    """By its definition, matchings by trying all of them."""
    reduce = max(2 * dp_factor * link[np.ix_(nodes, nodes)].sum(axis=1).max() for nodes in stages)
    hops = 0.0
    for pair in itertools.pairwise(stages):
        few, many = sorted(pair, key=len)
        matchings = itertools.permutations(many, len(few))
        hops += min(max(link[i, j] for i, j in zip(few, chosen, strict=True)) for chosen in matchings)
    return reduce + 2 * hops


@pytest.mark.parametrize("dp_factor", [0.0, 0.1, 4 / 3])
def test_placement_scores_better_than_the_published_one(dp_factor):
    """Symmetric links, so that it does not matter in which direction a matching is read."""
    sizes = [len(nodes) for nodes in TOPOLOGY.stages]
    stages = place(sizes, COSTS, dp_factor, trials=2000)
    assert [len(nodes) for nodes in stages] == sizes and Topology(stages).nodes == 20
    score = dtfm_score(stages, COSTS.link, dp_factor)
    assert score < dtfm_score(TOPOLOGY.stages, COSTS.link, dp_factor)
    rng = np.random.default_rng(0)
    drawn = [np.split(rng.permutation(20), np.cumsum(sizes)[:-1]) for _ in range(20)]
    assert score < min(dtfm_score(nodes, COSTS.link, dp_factor) for nodes in drawn)


def test_64_nodes():
    places = [GEO12[i % 12] for i in range(64)]
    costs = Costs(link_seconds(*geo12(places), 33_554_432, overhead=0.35), compute=0.44)
    bounds = np.cumsum([0, *balanced_sizes(64, 8, 6)])
    topology = Topology([range(a, b) for a, b in itertools.pairwise(bounds)])
    paths = plan(topology, costs, 6, 48, restarts=3)
    assert max(Counter(node for path in paths[:24] for node in path).values()) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, r"method is 'best'; choose one of \('full', 'random', 'greedy', 'cbs'\)"),
        ({"length": 7}, "a path visits 2 to 6 stages"),
        ({"length": 1}, "length=1"),
        ({"method": "full"}, "length=4 with method='full'"),
        ({"microbatches": 31}, "microbatches=31; 5 origins"),
        ({"microbatches": 0}, "microbatches=0"),
        ({"coarse": 2}, "coarse=2; it divides the 3"),
        ({"length": 5}, "do not fit into 3 a node"),
        ({"restarts": 0}, "restarts=0"),
        ({"costs": Costs(np.ones((3, 3)), 1.0)}, "costs are of 3 nodes, the topology has 20"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"topology": TOPOLOGY, "costs": COSTS, "length": 4, "microbatches": 30} | arguments)
    with pytest.raises(ValueError, match="their sum is the 20 nodes"):
        place([5, 5], COSTS, 1.0)
