"""What a pipeline runs on: which nodes hold which stage, how long their work takes, how long messages take."""

import csv
import dataclasses
import functools
import importlib.resources
import math
from collections.abc import Iterable, Sequence

import numpy as np

GEO12 = (
    "Belgium", "Canada", "Germany", "Iowa", "Japan", "LA", "NL", "Oregon", "Singapore", "Taiwan", "London", "Australia",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Which nodes hold which stage of the network.

    Args:
      stages: for each of S stages, the nodes 0..N-1 that hold it; each node holds one stage. Stage 0 is the embedding,
        the first layers and the head: a microbatch starts and ends on one of its nodes, its origin.
      memory: microbatches whose activations a node keeps at a time, and whose forward and backward passes an origin
        has under way at a time.

    Raises ValueError for an empty stage, nodes that are not 0..N-1 once each, fewer than two stages or memory < 1.

    >>> Topology([[0, 3], [1], [2]]).stage_of
    (0, 1, 2, 0)
    """

    stages: Sequence[Sequence[int]]
    memory: int = 3

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(tuple(map(int, nodes)) for nodes in self.stages))
        listed = sorted(node for nodes in self.stages for node in nodes)
        if len(self.stages) < 2 or not all(self.stages) or listed != list(range(len(listed))):
            raise ValueError(f"stages={self.stages}; list two stages or more, and in them each node 0..N-1 once")
        if self.memory < 1:
            raise ValueError(f"memory={self.memory}; a node keeps at least one microbatch")

    @property
    def nodes(self) -> int:
        """N."""
        return sum(map(len, self.stages))

    @functools.cached_property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of each node."""
        stage = {node: s for s, nodes in enumerate(self.stages) for node in nodes}
        return tuple(stage[node] for node in range(self.nodes))


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """Seconds that work and messages of one microbatch take.

    Args:
      link: [N, N], from node i to node j; an activation and its gradient are the same size. The diagonal is not read.
      compute: a stage's forward pass, one number or [N].
      head, backward: the head (forward, loss and backward together) and a stage's backward pass, in forward passes.
      pause: for which a node does nothing after each piece of work.

    Raises ValueError for a ``link`` that is no square matrix, and for times that are negative or not finite.

    >>> Costs(np.full((4, 4), 0.5), compute=2.0).backward_s.tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    link: np.ndarray
    compute: np.ndarray | float
    head: float = 0.25
    backward: float = 1.5
    pause: float = 0.0

    def __post_init__(self):
        link = np.array(self.link, np.float64)
        if link.ndim != 2 or link.shape[0] != link.shape[1]:
            raise ValueError(f"link has shape {list(link.shape)}; it is seconds [N, N]")
        np.fill_diagonal(link, 0.0)
        compute = np.asarray(self.compute, np.float64)
        if compute.shape not in ((), (len(link),)):
            raise ValueError(f"compute has shape {list(compute.shape)}; it is a number or [{len(link)}]")
        for name, seconds in (("link", link), ("compute", compute), ("head, backward, pause", self._scalars)):
            if not np.all(np.isfinite(seconds)) or np.any(np.asarray(seconds) < 0):
                raise ValueError(f"{name}: {seconds}; times are finite and not negative")
        object.__setattr__(self, "link", link)
        object.__setattr__(self, "compute", np.broadcast_to(compute, len(link)))

    @property
    def _scalars(self) -> tuple[float, float, float]:
        return self.head, self.backward, self.pause

    @property
    def head_s(self) -> np.ndarray:
        """Seconds [N] of the head with its loss and their backward pass."""
        return self.head * np.asarray(self.compute)

    @property
    def backward_s(self) -> np.ndarray:
        """Seconds [N] of a stage's backward pass."""
        return self.backward * np.asarray(self.compute)


def link_seconds(latency: np.ndarray, bandwidth: np.ndarray, nbytes: int, overhead: float = 0.0) -> np.ndarray:
    """Seconds [N, N] that a message of ``nbytes`` takes: ``latency + nbytes / bandwidth + overhead``.

    latency: seconds [N, N]; bandwidth: bytes per second [N, N]; overhead: seconds, for example to and from the host.

    Raises ValueError for different shapes and for a bandwidth that is not positive.

    >>> link_seconds(np.zeros((2, 2)), np.full((2, 2), 1e6), nbytes=500_000, overhead=0.1).tolist()
    [[0.6, 0.6], [0.6, 0.6]]
    """
    latency, bandwidth = np.asarray(latency, np.float64), np.asarray(bandwidth, np.float64)
    if latency.shape != bandwidth.shape:
        raise ValueError(f"latency {list(latency.shape)} and bandwidth {list(bandwidth.shape)} differ in shape")
    if not np.all(bandwidth > 0):
        raise ValueError(f"bandwidth goes down to {bandwidth.min()}; it is positive bytes per second")
    return latency + nbytes / bandwidth + overhead


def geo12(locations: Iterable[str] = GEO12) -> tuple[np.ndarray, np.ndarray]:
    """Measured links between data centres: latency [N, N] in seconds and bandwidth [N, N] in bytes per second.

    ``locations`` names the place of each node, out of the 12 in ``GEO12``; nodes of one place are 1 ms and 2 GiB/s
    apart. The link NL - London is kept as published, with 1.94 Mbit/s, although 1.94 Gbit/s must have been meant.

    Raises ValueError for another place. Source: arXiv 2502.19913, official code.

    >>> latency, bandwidth = geo12(["Belgium", "Canada", "Belgium"])
    >>> latency[0].tolist(), (bandwidth[0] * 8192 / 2**30).round().tolist()
    ([0.001, 0.041, 0.001], [16384.0, 163.0, 16384.0])
    """
    locations = list(locations)
    if unknown := sorted({*locations} - {*GEO12}):
        raise ValueError(f"no links for {unknown}; the places are {GEO12}")
    measured = np.full((len(GEO12), len(GEO12), 2), (1e-3, 2 * 2.0**30))
    with (importlib.resources.files("jaxskip.pipeline") / "geo12.csv").open() as file:
        for row in csv.DictReader(file):
            i, j = GEO12.index(row["from"]), GEO12.index(row["to"])
            # The source writes Mbit/s, and means 1 / 8192 GiB/s by it.
            link = float(row["latency_ms"]) / 1e3, float(row["mbit_per_s"]) / 8192 * 2**30
            measured[i, j] = measured[j, i] = link
    places = [GEO12.index(location) for location in locations]
    return measured[np.ix_(places, places)][..., 0], measured[np.ix_(places, places)][..., 1]


def balanced_sizes(nodes: int, stages: int, length: int) -> list[int]:
    """How many nodes each stage takes, so that paths through ``length`` of the stages load all nodes alike.

    Stage 0, through which every path goes, gets ``(stages - 1) / (length - 1)`` times as many as each other stage;
    where that does not divide, the others are rounded up, so that their memory is enough.

    Raises ValueError where ``length`` is not in 2..stages or there are too few nodes.

    >>> balanced_sizes(20, stages=6, length=4)
    [5, 3, 3, 3, 3, 3]
    """
    if not 2 <= length <= stages:
        raise ValueError(f"length={length}; a path visits 2 to {stages} stages")
    other = math.ceil(nodes * (length - 1) / ((stages - 1) * length))
    first = nodes - other * (stages - 1)
    if first < 1:
        raise ValueError(f"{nodes} nodes are too few for {stages} stages with {other} in each but the first")
    return [first, *[other] * (stages - 1)]
