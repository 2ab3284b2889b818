"""The published schedule, 20 nodes in 12 places, 6 stages, paths through 4 (arXiv 2502.19913), and random pipelines."""

import itertools

import numpy as np
from hypothesis import strategies as st

from jaxskip.pipeline import GEO12, Costs, Topology, geo12, link_seconds

PLACES = [GEO12[i % 12] for i in range(20)]
TOPOLOGY = Topology([[0, 3, 4, 10, 11], [15, 8, 14], [1, 9, 6], [16, 12, 13], [5, 18, 7], [17, 2, 19]], memory=3)
NBYTES = 4 * 1024 * 1024 * 8  # float32 activations of width 1024, 1024 positions, 8 sequences
COSTS = Costs(link_seconds(*geo12(PLACES), NBYTES, overhead=0.35), compute=0.44, pause=0.13)

SECONDS = {"full": 79.940, "random": 48.916, "not collision-aware": 35.435, "collision-aware": 33.314}

COLLISION_AWARE = [(0, 14, 6, 12), (3, 15, 17, 5), (4, 7, 13, 19), (10, 1, 18, 2), (11, 8, 16, 9)]
NOT_COLLISION_AWARE = [
    (0, 12, 5, 19), (0, 1, 19, 18), (0, 6, 18, 17), (3, 12, 6, 2), (3, 14, 12, 2), (3, 6, 14, 13),
    (4, 15, 13, 7), (4, 15, 5, 17), (4, 15, 13, 7), (10, 1, 17, 5), (10, 1, 7, 2), (10, 14, 18, 19),
    (11, 8, 16, 9), (11, 8, 16, 9), (11, 8, 16, 9),
]  # fmt: skip
RANDOM = [
    (0, 12, 7, 17), (0, 14, 16, 9), (0, 1, 8, 19), (3, 12, 7, 17), (3, 15, 6, 5), (3, 1, 8, 19),
    (4, 13, 18, 2), (4, 15, 6, 5), (4, 1, 8, 19), (10, 13, 18, 2), (10, 15, 6, 5), (10, 14, 16, 9),
    (11, 13, 18, 2), (11, 12, 7, 17), (11, 14, 16, 9),
]  # fmt: skip
FULL = [tuple(nodes[i] for nodes in TOPOLOGY.stages) for i in range(3)]


def schedules():
    """For each published schedule: paths and release times."""
    in_turn = [(i % 3) * 0.44 for i in range(15)]
    return {
        "full": (FULL * 9, np.repeat([0.0, 0.1, 0.2], 9)),
        "random": (RANDOM * 2, np.array([*in_turn, *(t + 2.5 for t in in_turn)])),
        "not collision-aware": (NOT_COLLISION_AWARE * 2, np.array([*in_turn, *(t + 2.5 for t in in_turn)])),
        "collision-aware": (COLLISION_AWARE * 6, np.repeat([0.0, 1.0, 2.0, 2.5, 3.5, 4.5], 5)),
    }


@st.composite
def pipelines(draw):
    """Topology, costs, length of paths and number of microbatches; memory suffices, now and then barely."""
    stages = draw(st.integers(2, 5))  # with more, no short path jumps far enough to fill the last ones
    length = draw(st.integers(2, stages))
    others = draw(st.integers(1, 3))
    heads = draw(st.integers(1, max(1, others * (stages - 1) // (length - 1))))
    sizes = [heads, *[others] * (stages - 1)]
    nodes = np.random.default_rng(draw(st.integers(0, 99))).permutation(sum(sizes))
    bounds = list(itertools.accumulate(sizes, initial=0))
    topology = Topology([nodes[a:b] for a, b in itertools.pairwise(bounds)], memory=draw(st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    costs = Costs(rng.random((sum(sizes), sum(sizes))), rng.random(sum(sizes)), pause=draw(st.sampled_from([0.0, 0.1])))
    return topology, costs, length, heads * draw(st.integers(1, 5))
