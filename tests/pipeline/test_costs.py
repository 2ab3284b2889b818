import numpy as np
import pytest

from jaxskip.pipeline import GEO12, Costs, Topology, balanced_sizes, geo12, link_seconds


def test_links_of_the_published_configuration():
    """The two check values of the official cost matrix, to the digits that were noted."""
    latency, bandwidth = geo12([*GEO12, "Belgium"])
    seconds = link_seconds(latency, bandwidth, 33_554_432, overhead=0.35)
    assert seconds[0, 1] == pytest.approx(1.96156, abs=1e-5) and seconds[0, 12] == pytest.approx(0.36663, abs=1e-5)
    assert seconds[6, 10] == pytest.approx(132.3, abs=0.5)  # the published slip, kept
    np.testing.assert_array_equal(seconds, seconds.T)
    assert np.all(bandwidth[~np.eye(13, dtype=bool)] < 2.1 * 2**30) and np.all(latency < 0.14)


@pytest.mark.parametrize(
    ("nodes", "stages", "length", "sizes"),
    [
        (20, 6, 4, [5, 3, 3, 3, 3, 3]),
        (18, 4, 3, [6, 4, 4, 4]),
        (42, 8, 6, [7, 5, 5, 5, 5, 5, 5, 5]),
        (64, 8, 6, [8] * 8),
        (12, 4, 4, [3, 3, 3, 3]),
    ],
)
def test_balanced_sizes(nodes, stages, length, sizes):
    assert balanced_sizes(nodes, stages, length) == sizes
    assert sizes[0] * (length - 1) <= sum(sizes[1:])  # all visits fit


def test_costs_keep_heterogeneous_nodes():
    costs = Costs(np.ones((2, 2)), compute=np.array([1.0, 2.0]), head=0.5, backward=2.0)
    assert costs.head_s.tolist() == [0.5, 1.0] and costs.backward_s.tolist() == [2.0, 4.0]
    assert costs.link.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Topology([[0], [0]]), "each node 0..N-1 once"),
        (lambda: Topology([[0], [2]]), "each node 0..N-1 once"),
        (lambda: Topology([[0, 1], []]), "two stages or more"),
        (lambda: Topology([[0, 1]]), "two stages or more"),
        (lambda: Topology([[0], [1]], memory=0), "memory=0"),
        (lambda: Costs(np.ones((2, 3)), 1.0), r"shape \[2, 3\]"),
        (lambda: Costs(np.ones((2, 2)), np.ones(3)), r"shape \[3\]; it is a number or \[2\]"),
        (lambda: Costs(-np.ones((2, 2)), 1.0), "link: "),
        (lambda: Costs(np.ones((2, 2)), np.nan), "compute: nan"),
        (lambda: Costs(np.ones((2, 2)), 1.0, pause=-1.0), "pause"),
        (lambda: link_seconds(np.ones((2, 2)), np.zeros((2, 2)), 1), "bandwidth goes down to 0.0"),
        (lambda: link_seconds(np.ones((2, 2)), np.ones((3, 3)), 1), "differ in shape"),
        (lambda: geo12(["Paris"]), r"no links for \['Paris'\]"),
        (lambda: balanced_sizes(20, 6, 7), "length=7"),
        (lambda: balanced_sizes(4, 6, 4), "too few"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
