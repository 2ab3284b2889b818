"""Compiles paths into a table: what each node does in each tick, and which messages travel at its end.

The table is all that the executor needs: its program has the same shape for every node, and nothing is decided while it
runs.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxskip.pipeline.costs import Topology
from jaxskip.pipeline.simulate import Path, check_paths

IDLE, F, B, F0, H, B0 = range(6)
TRASH = 0
# Kinds of tick: the operations that it is for, and those that join on nodes which have none of these.
_KINDS = (((F, F0), (H,)), ((H,), (F, F0)), ((B, B0), (H,)))
_ORDERS = ("1f1b", "gpipe")


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


def table_seconds(table: Table, seconds: Mapping[int, float], message: float) -> float:
    """Seconds until all nodes are through a table: those that exchange messages in a tick end it together.

    Args:
      table: see `compile_table`.
      seconds: of F, F0, H, B and B0.
      message: seconds of a message.

    >>> table = compile_table([(0, 1)], Topology([[0], [1]]))
    >>> table_seconds(table, {F0: 1, F: 1, H: 0.5, B: 2, B0: 2}, message=0.25)
    7.5
    """
    lasts = np.array([seconds.get(op, 0.0) for op in range(6)])[table.op]
    clock = np.zeros(lasts.shape[1])
    for each, permutation in zip(lasts, table.permutation, strict=True):
        clock += each
        together: list[set[int]] = []
        for pair in table.permutations[permutation]:
            joined = [nodes for nodes in together if nodes & {*pair}]
            together = [nodes for nodes in together if nodes not in joined] + [{*pair}.union(*joined)]
        for nodes in map(list, together):
            clock[nodes] = clock[nodes].max() + message
    return float(clock.max())


class _Step(NamedTuple):
    op: int
    node: int
    destination: int | None


def compile_table(paths: Sequence[Path], topology: Topology, order: Literal["1f1b", "gpipe"] = "1f1b") -> Table:
    """Schedules the microbatches in ticks, an operation of a node being one, by list scheduling.

    Ticks are for forward passes, for heads and for backward passes, in turns as far as there is such work. Heads join
    the other ticks, and forward passes those of heads, on nodes that would be idle; no tick has forward and backward
    passes, for nodes that exchange messages end it together. A node sends and receives at most one message a tick, so
    that what would make a second one arrive is done later.

    Args:
      paths: of the M microbatches, see `plan`; each origin starts its own in this order.
      topology: of N nodes.
      order:
        "1f1b": no more than ``topology.memory`` microbatches of an origin under way.
        "gpipe": all forward passes come before the first head; every node keeps the inputs of all its microbatches.

    Raises ValueError for paths that are none and for another order.

    >>> table = compile_table([(0, 1), (0, 1)], Topology([[0], [1]], memory=2), order="gpipe")
    >>> table.op.tolist() == [[F0, 0], [F0, F], [0, F], [H, 0], [H, B], [B0, B], [B0, 0]]
    True
    >>> table.permutations[table.permutation[1]]
    ((0, 1), (1, 0))
    """
    check_paths(paths, topology)
    if order not in _ORDERS:
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
    under_way = dict.fromkeys(topology.stages[0], 0)
    done: list[list[int]] = [[] for _ in steps]
    forward_left = sum(len(mine) // 2 for mine in steps)

    def startable(kind) -> list[int]:
        """Microbatches whose next step can be done in a tick of that kind."""
        following = {i: mine[len(done[i])] for i, mine in enumerate(steps) if len(done[i]) < len(mine)}
        busy, receiving, chosen = set(), set(), []
        for ops in kind:
            if order == "gpipe" and forward_left and F not in ops:
                break
            waiting = [i for i, step in following.items() if step.op in ops]
            for i in sorted(waiting, key=lambda i: following[i].op == F0):  # those under way come before new ones
                step = following[i]
                full = order == "1f1b" and step.op == F0 and under_way[origins[i]] == topology.memory
                if full or step.node in busy or step.destination in receiving:
                    continue
                busy.add(step.node)
                if step.destination is not None:
                    receiving.add(step.destination)
                chosen.append(i)
            if not chosen:
                break
        return chosen

    left, tick, turns = sum(map(len, steps)), 0, deque(_KINDS)
    while left:
        kind, chosen = next((kind, found) for kind in turns if (found := startable(kind)))
        for i in chosen:
            op = steps[i][len(done[i])].op
            under_way[origins[i]] += (op == F0) - (op == B0)
            forward_left -= op in (F, F0)
            done[i].append(tick)
        turns.rotate(-1 - turns.index(kind))
        left -= len(chosen)
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
