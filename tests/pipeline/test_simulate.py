import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.skippipe_schedules import COSTS, PLACES, SECONDS, TOPOLOGY, schedules
from jaxskip.pipeline import Costs, Topology, contention_free, plan, plot_timeline, simulate
from tests.pipeline.cases import pipelines


def free(nodes, **kwargs):
    return Costs(np.zeros((nodes, nodes)), compute=1.0, **kwargs)


def test_the_published_makespans():
    """Within 2 %: the official simulator rounds time and makes an origin's first pause 0.09 s instead of 0.13 s."""
    seconds = {
        name: simulate(paths, TOPOLOGY, COSTS, release).makespan for name, (paths, release) in schedules().items()
    }
    for name, published in SECONDS.items():
        assert seconds[name] == pytest.approx(published, rel=0.02), name
    assert sorted(seconds, key=seconds.get) == sorted(SECONDS, key=SECONDS.get)


def test_a_microbatch_by_hand():
    """Forward 1 and 2, link 10, head 0.25, backward 1.5 and 3, each followed by a pause that delays only the node."""
    costs = Costs([[0, 10], [20, 0]], compute=[1.0, 2.0], pause=0.5)
    run = simulate([(0, 1)], Topology([[0], [1]]), costs, release=[5.0])
    assert [(w.node, w.kind, w.start, w.end) for w in run.timeline] == [
        (0, "F", 5.0, 6.0),
        (1, "F", 16.0, 18.0),
        (0, "H", 38.0, 38.25),
        (1, "B", 48.25, 51.25),
        (0, "B", 71.25, 72.75),
    ]
    assert run.makespan == 72.75 and run.idle.tolist() == [72.75 - 2.75, 72.75 - 5.0]
    assert contention_free((0, 1), costs) == run.makespan - 5


@pytest.mark.parametrize(("stages", "microbatches"), [(3, 1), (3, 8), (4, 5), (5, 3)])
def test_gpipe_in_closed_form(stages, microbatches):
    run = simulate(
        [tuple(range(stages))] * microbatches,
        Topology([[s] for s in range(stages)], memory=microbatches),
        free(stages, head=0.0),
    )
    assert run.makespan == (microbatches + stages - 1) * 2.5


def test_an_origin_starts_the_next_when_one_came_back():
    topology = Topology([[0], [1]], memory=2)
    run = simulate([(0, 1)] * 4, topology, free(2))
    starts = {w.microbatch: w.start for w in run.timeline if w.kind == "F" and w.node == 0}
    ends = {w.microbatch: w.end for w in run.timeline if w.kind == "B" and w.node == 0}
    assert starts[1] < ends[0] <= starts[2] and ends[1] <= starts[3]


def test_paths_that_wait_for_each_other():
    """Two nodes with room for one microbatch each, crossed in both directions."""
    topology = Topology([[0, 1], [2], [3]], memory=1)
    with pytest.raises(ValueError, match="wait for memory for ever"):
        simulate([(0, 2, 3), (1, 3, 2)], topology, free(4))


@settings(deadline=None, max_examples=25)
@given(pipelines(), st.integers(0, 9))
def test_invariants_of_a_run(pipeline, seed):
    topology, costs, length, microbatches = pipeline
    paths = plan(topology, costs, length, microbatches, "random", seed=seed)
    run = simulate(paths, topology, costs)
    for node in range(topology.nodes):
        work = [w for w in run.timeline if w.node == node]
        assert all(a.end + costs.pause <= b.start + 1e-9 for a, b in itertools.pairwise(work))
        kept = np.cumsum([{"F": 1, "H": 0, "B": -1}[w.kind] for w in work])
        assert not work or (kept.max() <= topology.memory and kept[-1] == 0)
        assert run.idle[node] == pytest.approx(run.makespan - sum(w.end - w.start for w in work))
        assert run.makespan >= sum(w.end - w.start for w in work) - 1e-9
    for i, path in enumerate(paths):
        work = [w for w in run.timeline if w.microbatch == i]
        assert [w.node for w in work] == [*path, path[0], *reversed(path)]
        assert "".join(w.kind for w in work) == "F" * length + "H" + "B" * length
        assert all(a.end + costs.link[a.node, b.node] <= b.start + 1e-9 for a, b in itertools.pairwise(work))
        assert work[-1].end - work[0].start >= contention_free(path, costs) - 1e-9


def test_the_plot_shows_every_node_and_all_work():
    paths, release = schedules()["collision-aware"]
    run = simulate(paths, TOPOLOGY, COSTS, release)
    axes = plot_timeline(run, PLACES).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == PLACES
    assert len(axes.patches) == 20 + len(run.timeline) == 20 + 30 * 9
    order = [*range(19, -1, -1)]
    mirrored = plot_timeline(run, order=order).axes[0]
    ticks = zip(mirrored.get_yticks(), mirrored.get_yticklabels(), strict=True)
    assert all(place == 19 - int(label.get_text()) for place, label in ticks)
    heights = [[round(p.get_y() + p.get_height() / 2) for p in a.patches[20:]] for a in (axes, mirrored)]
    assert heights[1] == [19 - y for y in heights[0]]
    assert sum(p.get_width() for p in axes.patches[:20]) - run.idle.sum() == pytest.approx(
        sum(p.get_width() for p in axes.patches[20:])
    )


@pytest.mark.parametrize(
    ("paths", "release", "message"),
    [
        ([], None, "no paths"),
        ([(0, 5)], None, r"path 0 is \(0, 5\); nodes are 0..2"),
        ([(0, 1), (1, 0)], None, r"path 1 is \(1, 0\), through stages \[1, 0\]"),
        ([(0, 1, 2)], None, r"through stages \[0, 1, 1\]"),
        ([(0,)], None, "wanted 0 first, then others"),
        ([(0, 1)], [1.0, 2.0], "1 finite times"),
        ([(0, 1)], [-1.0], "not negative"),
    ],
)
def test_bad_arguments(paths, release, message):
    with pytest.raises(ValueError, match=message):
        simulate(paths, Topology([[0], [1, 2]]), free(3), release)
    with pytest.raises(ValueError, match="costs are of 2 nodes, the topology has 3"):
        simulate([(0, 1)], Topology([[0], [1, 2]]), free(2))
