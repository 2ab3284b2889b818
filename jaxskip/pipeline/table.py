"""Compiles paths into a table: what each node does in each tick, and which messages travel at its end.

The table is all that the executor needs: its program has the same shape for every node, and nothing is decided while it
runs.
"""

import heapq
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxskip.pipeline.costs import Topology
from jaxskip.pipeline.simulate import Path, check_paths

IDLE, F, B, F0, H, B0 = range(6)
TRASH = 0
_PRIORITIES = {"1f1b": {B: 0, B0: 0, H: 1, F: 2, F0: 3}, "gpipe": {F: 0, F0: 1, H: 2, B: 3, B0: 3}}


class Table(NamedTuple):
    """A static schedule of T ticks on N nodes; integers are int32.

    In a tick a node does one operation, on a message that came in earlier, and sends what comes out:

    ====== ============================== ================================ =====================
    op     reads                          does                             sends
    ====== ============================== ================================ =====================
    F0     nothing                        embedding and stage 0, forward   activation, next node
    F      x                              its stage, forward               activation, next node or origin
    H      x                              head and loss, both directions   gradient, last node
    B      x again, gradient              its stage, backward              gradient, node before
    B0     gradient                       stage 0 and embedding, backward  nothing
    ====== ============================== ================================ =====================

    What is read comes from slots: a node keeps the x of F until B has used it.
    """

    op: np.ndarray  # [T, N]: IDLE, F, B, F0, H or B0
    microbatch: np.ndarray  # [T, N]; 0 where idle
    x_slot: np.ndarray  # [T, N]: slot of the input; TRASH where there is none
    g_slot: np.ndarray  # [T, N]: slot of the incoming gradient; TRASH where there is none
    store_slot: np.ndarray  # [T, N]: slot into which the tick's incoming message goes; TRASH where there is none
    permutation: np.ndarray  # [T]: index into permutations
    permutations: tuple[tuple[tuple[int, int], ...], ...]  # (source, destination) pairs of messages that travel at once
    slots: int  # of each node, TRASH included
    paths: tuple[Path, ...]
    topology: Topology

    @property
    def ticks(self) -> int:
        """T."""
        return len(self.op)


class _Step(NamedTuple):
    op: int
    node: int
    destination: int | None


def compile_table(paths: Sequence[Path], topology: Topology, order: Literal["1f1b", "gpipe"] = "1f1b") -> Table:
    """Schedules the microbatches in ticks, an operation of a node being one, by list scheduling.

    A message takes the end of a tick; a node sends and receives at most one at a time, so that what would make a second
    one arrive is done later.

    Args:
      paths: of the M microbatches, see `plan`; each origin starts its own in this order.
      topology: of N nodes.
      order:
        "1f1b": backward before forward, and no more than ``topology.memory`` microbatches of an origin under way.
        "gpipe": all forward passes come before the first head; every node keeps the inputs of all its microbatches, and
          a tick is all forward, all heads or all backward, so that none waits for a longer operation.

    Raises ValueError for paths that are none and for another order.

    >>> table = compile_table([(0, 1), (0, 1)], Topology([[0], [1]], memory=2), order="gpipe")
    >>> table.op.tolist() == [[F0, 0], [F0, F], [0, F], [H, 0], [0, B], [H, 0], [B0, B], [B0, 0]]
    True
    >>> table.permutations[table.permutation[1]]
    ((0, 1), (1, 0))
    """
    check_paths(paths, topology)
    if order not in _PRIORITIES:
        raise ValueError(f"order is {order!r}; choose '1f1b' or 'gpipe'")
    steps = [_steps(path) for path in paths]
    done = _schedule(steps, [path[0] for path in paths], topology, order)
    ticks, nodes = max(tick for times in done for tick in times) + 1, topology.nodes
    op, microbatch, x_slot, g_slot, store_slot = np.zeros((5, ticks, nodes), np.int32)
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(ticks)]
    # For each node: messages (tick at whose end it comes, tick of last use, places [tick] in a table that read it).
    kept: list[list] = [[] for _ in range(nodes)]
    for i, (mine, times) in enumerate(zip(steps, done, strict=True)):
        length = len(mine) // 2
        for k, (step, tick) in enumerate(zip(mine, times, strict=True)):
            op[tick, step.node], microbatch[tick, step.node] = step.op, i
            if step.destination is None:
                continue
            pairs[tick].append((step.node, step.destination))
            used = times[k + 1]
            reads = [(x_slot if k < length else g_slot, used)]
            if k + 1 < length:
                backward = times[len(mine) - 1 - (k + 1)]
                reads.append((x_slot, backward))
                used = backward
            kept[step.destination].append((tick, used, reads))
    slots = 1
    for node, messages in enumerate(kept):
        slots = max(slots, 1 + _color(node, messages, store_slot))
    distinct = sorted({tuple(sorted(each)) for each in pairs})
    permutation = np.array([distinct.index(tuple(sorted(each))) for each in pairs], np.int32)
    return Table(
        op, microbatch, x_slot, g_slot, store_slot, permutation, tuple(distinct), slots,
        tuple(map(tuple, paths)), topology,
    )  # fmt: skip


def _steps(path: Path) -> list[_Step]:
    """What happens to a microbatch: L forward passes, the head, L backward passes."""
    nodes = [*path, path[0], *reversed(path)]
    length = len(path)
    ops = [F0, *[F] * (length - 1), H, *[B] * (length - 1), B0]
    return [_Step(op, node, there) for op, node, there in zip(ops, nodes, [*nodes[1:], None], strict=True)]


def _schedule(steps, origins, topology, order) -> list[list[int]]:
    """The tick of each step of each microbatch."""
    priority = _PRIORITIES[order]
    under_way = dict.fromkeys(topology.stages[0], 0)
    done: list[list[int]] = [[] for _ in steps]
    forward_left = sum(len(mine) // 2 for mine in steps)
    left, tick, heads = sum(map(len, steps)), 0, False
    while left:
        busy, receiving = set(), set()
        ready = [i for i, mine in enumerate(steps) if len(done[i]) < len(mine)]
        ready.sort(key=lambda i: (priority[steps[i][len(done[i])].op], i))
        forward_before = forward_left
        # Gpipe's ticks of heads and of backward passes take turns, where there are both.
        waiting = {steps[i][len(done[i])].op for i in ready}
        heads = H in waiting and not (heads and waiting & {B, B0})
        for i in ready:
            step = steps[i][len(done[i])]
            waits = step.node in busy or step.destination in receiving
            if order == "gpipe":
                waits |= step.op in (H, B, B0) and (forward_before > 0 or heads != (step.op == H))
            elif step.op == F0:
                waits |= under_way[origins[i]] == topology.memory
            if waits:
                continue
            busy.add(step.node)
            if step.destination is not None:
                receiving.add(step.destination)
            under_way[origins[i]] += (step.op == F0) - (step.op == B0)
            forward_left -= step.op in (F, F0)
            done[i].append(tick)
            left -= 1
        tick += 1
    return done


def _color(node: int, messages: list, store_slot: np.ndarray) -> int:
    """Gives each message of a node a slot that is free from its arrival to its last use; how many slots that takes."""
    count, free, taken = 0, [], []
    for tick, used, reads in sorted(messages, key=lambda message: message[0]):
        while taken and taken[0][0] <= tick:  # read at the start of a tick, written at its end
            heapq.heappush(free, heapq.heappop(taken)[1])
        if not free:
            count += 1
            free.append(TRASH + count)
        slot = heapq.heappop(free)
        heapq.heappush(taken, (used, slot))
        store_slot[tick, node] = slot
        for table, at in reads:
            table[at, node] = slot
    return count
