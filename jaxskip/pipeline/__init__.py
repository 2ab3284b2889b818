"""SkipPipe: pipelines in which each microbatch takes its own path through the stages (arXiv 2502.19913)."""

from jaxskip.pipeline.costs import GEO12, Costs, Topology, balanced_sizes, geo12, link_seconds
from jaxskip.pipeline.execute import make_train_step, stack_stages, stage_mesh
from jaxskip.pipeline.plan import full_pipelines, place, plan, stage_sequences
from jaxskip.pipeline.simulate import Simulation, Work, contention_free, plot_timeline, simulate
from jaxskip.pipeline.table import Table, compile_table

__all__ = [
    "GEO12",
    "Costs",
    "Simulation",
    "Table",
    "Topology",
    "Work",
    "balanced_sizes",
    "compile_table",
    "contention_free",
    "full_pipelines",
    "geo12",
    "link_seconds",
    "make_train_step",
    "place",
    "plan",
    "plot_timeline",
    "simulate",
    "stack_stages",
    "stage_mesh",
    "stage_sequences",
]
