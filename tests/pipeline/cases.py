"""Random pipelines."""

import itertools

import numpy as np
from hypothesis import strategies as st

from jaxskip.pipeline import Costs, Topology


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
