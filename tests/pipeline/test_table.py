import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.skippipe_schedules import COLLISION_AWARE, TOPOLOGY
from jaxskip.pipeline import Topology, compile_table, plan, table_seconds
from jaxskip.pipeline.table import B0, F0, IDLE, TRASH, B, F, H
from tests.pipeline.cases import pipelines


def replay(table):
    """Carries labels instead of tensors through the table; the operations of each microbatch, (op, node) by tick.

    A label says what a message is: (microbatch, step that sent it). An operation that reads anything but its own
    message, or a slot that was overwritten, fails here.
    """
    ops = [[] for _ in table.paths]
    slots = np.full((table.topology.nodes, table.slots), None, object)
    for tick in range(table.ticks):
        sent = {}
        for node in range(table.topology.nodes):
            op, i = table.op[tick, node], int(table.microbatch[tick, node])
            if op == IDLE:
                continue
            x, g = slots[node, table.x_slot[tick, node]], slots[node, table.g_slot[tick, node]]
            path, length = table.paths[i], len(table.paths[i])
            step = len(ops[i])
            place = path.index(node)
            assert op == [F0, *[F] * (length - 1), H, *[B] * (length - 1), B0][step]
            if op in (F, B):
                assert x == (i, place - 1)
            if op == H:
                assert x == (i, length - 1)
            if op in (B, B0):
                assert g == (i, 2 * length - 1 - place)
            ops[i].append((op, node, tick))
            sent[node] = (i, step)
        pairs = table.permutations[table.permutation[tick]]
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        assert {a for a, _ in pairs} == {n for n in sent if table.op[tick, n] != B0}
        for source, destination in pairs:
            assert table.store_slot[tick, destination] != TRASH
            slots[destination, table.store_slot[tick, destination]] = sent[source]
        assert np.sum(table.store_slot[tick] != TRASH) == len(pairs)
    return ops


@settings(deadline=None, max_examples=25)
@given(pipelines(), st.sampled_from(["1f1b", "gpipe"]))
def test_invariants_of_a_table(pipeline, order):
    topology, costs, length, microbatches = pipeline
    paths = plan(topology, costs, length, microbatches, "random")
    table = compile_table(paths, topology, order)
    ops = replay(table)
    for path, mine in zip(paths, ops, strict=True):
        assert [node for _, node, _ in mine] == [*path, path[0], *reversed(path)]
        assert all(a < b for (_, _, a), (_, _, b) in itertools.pairwise(mine))
    assert np.sum(table.op != IDLE) == microbatches * (2 * length + 1)
    assert not any({F, F0} & {*row} and {B, B0} & {*row} for row in table.op.tolist())
    # A head stands beside backward passes only where its node, an origin, has none that waits.
    for tick, node in np.argwhere((table.op == H) & np.isin(table.op, (B, B0)).any(axis=1, keepdims=True)):
        assert not any(mine[-1][1] == node and mine[-2][2] < tick < mine[-1][2] for mine in ops)
    assert table.op[-1].any() and all(a.dtype == np.int32 for a in table[:6])
    if order == "gpipe":
        last_forward = max(tick for mine in ops for op, _, tick in mine if op in (F, F0))
        assert all(tick > last_forward for mine in ops for op, _, tick in mine if op in (H, B, B0))
    else:
        for origin in topology.stages[0]:
            steps = [(tick, op) for mine in ops for op, node, tick in mine if node == origin]
            under_way = np.cumsum([int(op == F0) - int(op == B0) for _, op in sorted(steps)])
            assert under_way.max() <= topology.memory


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 5), (4, 6), (4, 2)])
def test_inputs_that_a_full_pipeline_keeps(stages, microbatches):
    """GPipe all M, 1F1B min(S, M); one more slot for a gradient, one for messages that nobody sent."""
    paths, topology = [tuple(range(stages))] * microbatches, Topology([[s] for s in range(stages)], memory=stages)
    kept = {}
    for order in ("gpipe", "1f1b"):
        table = compile_table(paths, topology, order)
        holding = np.cumsum((table.op == F).astype(int) - (table.op == B), axis=0)
        kept[order] = holding.max()
        assert table.slots <= kept[order] + 3
    assert kept == {"gpipe": microbatches, "1f1b": min(stages, microbatches)}


def test_ticks_of_eight_microbatches():
    """At most the prototype's. With equal stages skipping saves little: no path skips stage 0, the bottleneck.

    The prototype let a tick mix forward and backward passes: 36 seconds for the full pipeline, 31.3 where paths skip.
    """
    topology = Topology([[0, 1], [2, 3], [4, 5], [6, 7]], memory=4)
    full = compile_table([(0, 2, 4, 6), (1, 3, 5, 7)] * 4, topology)
    skipped = compile_table(
        [(0, 2, 4), (1, 5, 7), (0, 4, 2), (1, 3, 7), (0, 4, 6), (1, 7, 5), (0, 2, 6), (1, 3, 5)], topology
    )
    assert full.ticks <= 20 and skipped.ticks <= 16
    seconds = {F0: 1.0, F: 1.0, H: 0.3, B: 3.0, B0: 3.0}
    assert table_seconds(skipped, seconds, 0.0) < table_seconds(full, seconds, 0.0) <= 29.3


def test_the_published_schedule():
    table = compile_table(COLLISION_AWARE * 6, TOPOLOGY)
    replay(table)
    assert table.slots - 1 <= 2 * TOPOLOGY.memory
    # Every node is visited equally often, so that the busiest is an origin: six times forward, head and backward.
    assert 18 <= table.ticks <= 3 * 18
    assert Counter(table.op[table.op != IDLE].tolist()) == {F0: 30, F: 90, H: 30, B: 90, B0: 30}


def test_bad_arguments():
    topology = Topology([[0], [1]])
    with pytest.raises(ValueError, match="order is 'zero-bubble'; choose '1f1b' or 'gpipe'"):
        compile_table([(0, 1)], topology, order="zero-bubble")
    with pytest.raises(ValueError, match=r"path 0 is \(1, 0\)"):
        compile_table([(1, 0)], topology)
