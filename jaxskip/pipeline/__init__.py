"""SkipPipe: pipelines in which each microbatch takes its own path through the stages (arXiv 2502.19913).

`Costs` and `Topology` say what the nodes are, `plan` finds paths, `simulate` and `plot_timeline` show an iteration.
Two backends run it and give the gradients of one device: `compile_table` with `make_train_step` (one program for nodes
that are alike, `pipelined_loss` for a decoder in the training loop), and `make_dataflow_step` (one controller for nodes
that are not). `path_loss` evaluates a decoder with stages missing.
"""

from jaxskip.pipeline.costs import GEO12, Costs, Topology, balanced_sizes, geo12, link_seconds
from jaxskip.pipeline.dataflow import make_dataflow_step
from jaxskip.pipeline.decoder import STAGE_RULES, decoder_functions, path_loss, pipelined_loss, split_decoder
from jaxskip.pipeline.execute import make_train_step, stack_stages, stage_mesh
from jaxskip.pipeline.plan import full_pipelines, place, plan, stage_sequences
from jaxskip.pipeline.simulate import Simulation, Work, contention_free, plot_timeline, simulate
from jaxskip.pipeline.table import Table, compile_table, table_seconds

__all__ = [
    "GEO12",
    "STAGE_RULES",
    "Costs",
    "Simulation",
    "Table",
    "Topology",
    "Work",
    "balanced_sizes",
    "compile_table",
    "contention_free",
    "decoder_functions",
    "full_pipelines",
    "geo12",
    "link_seconds",
    "make_dataflow_step",
    "make_train_step",
    "path_loss",
    "pipelined_loss",
    "place",
    "plan",
    "plot_timeline",
    "simulate",
    "split_decoder",
    "stack_stages",
    "stage_mesh",
    "stage_sequences",
    "table_seconds",
]
