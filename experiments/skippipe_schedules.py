"""The schedules that SkipPipe's authors published: 20 nodes in 12 places, 6 stages, paths through 4 (arXiv 2502.19913).

Paths, release times and the seconds that the official simulator gives for them, from the official code.
"""

import numpy as np

from jaxskip.pipeline import GEO12, Costs, Topology, geo12, link_seconds

PLACES = [GEO12[i % 12] for i in range(20)]
TOPOLOGY = Topology([[0, 3, 4, 10, 11], [15, 8, 14], [1, 9, 6], [16, 12, 13], [5, 18, 7], [17, 2, 19]], memory=3)
NBYTES = 4 * 1024 * 1024 * 8  # float32 activations of width 1024, 1024 positions, 8 sequences
COMPUTE, OVERHEAD, PAUSE = 0.44, 0.35, 0.13  # seconds: a layer of 8 sequences, a message to and from hosts, after work


def costs(places) -> Costs:
    """Of nodes in these places, with the authors' profile."""
    return Costs(link_seconds(*geo12(places), NBYTES, OVERHEAD), COMPUTE, pause=PAUSE)


COSTS = costs(PLACES)
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
    """For each published schedule: paths and release times; "full" has 27 microbatches, the others 30."""
    in_turn = [(i % 3) * 0.44 for i in range(15)]
    return {
        "full": (FULL * 9, np.repeat([0.0, 0.1, 0.2], 9)),
        "random": (RANDOM * 2, np.array([*in_turn, *(t + 2.5 for t in in_turn)])),
        "not collision-aware": (NOT_COLLISION_AWARE * 2, np.array([*in_turn, *(t + 2.5 for t in in_turn)])),
        "collision-aware": (COLLISION_AWARE * 6, np.repeat([0.0, 1.0, 2.0, 2.5, 3.5, 4.5], 5)),
    }
