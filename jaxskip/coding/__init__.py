"""Gradient coding: exact gradients although some workers are late (arXiv 2211.13802)."""

from jaxskip.coding.codes import GradientCode, UndecodableError, cyclic, drop, frc, rounding
from jaxskip.coding.execute import Emulation, Master, coded_value_and_grad, place, train_interleaved
from jaxskip.coding.processes import WorkerProcesses
from jaxskip.coding.schemes import (
    GC,
    MSGC,
    SRSGC,
    Dropping,
    Message,
    Scheme,
    Task,
    arbitrary_lower_bound,
    bursty_lower_bound,
)
from jaxskip.coding.simulate import Simulation, candidates, fit_alpha, simulate, tune
from jaxskip.coding.stragglers import (
    conforms_arbitrary,
    conforms_bursty,
    conforms_per_round,
    gilbert_elliott,
    gilbert_elliott_delays,
    load_trace,
    random_stragglers,
)

__all__ = [
    "GC",
    "MSGC",
    "SRSGC",
    "Dropping",
    "Emulation",
    "GradientCode",
    "Master",
    "Message",
    "Scheme",
    "Simulation",
    "Task",
    "UndecodableError",
    "WorkerProcesses",
    "arbitrary_lower_bound",
    "bursty_lower_bound",
    "candidates",
    "coded_value_and_grad",
    "conforms_arbitrary",
    "conforms_bursty",
    "conforms_per_round",
    "cyclic",
    "drop",
    "fit_alpha",
    "frc",
    "gilbert_elliott",
    "gilbert_elliott_delays",
    "load_trace",
    "place",
    "random_stragglers",
    "rounding",
    "simulate",
    "train_interleaved",
    "tune",
]
