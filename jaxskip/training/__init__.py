"""The training loop, its compiled steps, the mesh, checkpoints and logging."""

from jaxskip.training.adaptive_batch import (
    AdaptiveBatch,
    AdaptiveBatchState,
    BatchTest,
    BucketPrograms,
    CoordinateTest,
    GradStats,
    InnerProductTest,
    LeafTest,
    NormTest,
    epoch_rows,
    gradient_stats,
    rebatch,
    total_variance,
)
from jaxskip.training.checkpoints import CheckpointError, Checkpoints
from jaxskip.training.language_model import (
    evaluate_next_token,
    gauss_newton_curvature,
    hutchinson_curvature,
    next_token_loss,
)
from jaxskip.training.loop import fit
from jaxskip.training.metrics import LossMonitor, MetricsLog, Progress, read_metrics
from jaxskip.training.optimizers import OPTIMIZERS, make_optimizer, warmup_cosine
from jaxskip.training.sharding import (
    check_batch_size,
    make_mesh,
    optimizer_state_shardings,
    param_shardings,
    replicated,
    shard_batch,
)
from jaxskip.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_hessian_refresh,
    make_train_step,
    with_hessian_refresh,
)

__all__ = [
    "OPTIMIZERS",
    "AdaptiveBatch",
    "AdaptiveBatchState",
    "BatchTest",
    "BucketPrograms",
    "CheckpointError",
    "Checkpoints",
    "CoordinateTest",
    "GradStats",
    "InnerProductTest",
    "LeafTest",
    "LossMonitor",
    "MetricsLog",
    "NormTest",
    "Progress",
    "TrainState",
    "abstract_state",
    "check_batch_size",
    "epoch_rows",
    "evaluate_next_token",
    "fit",
    "gauss_newton_curvature",
    "gradient_stats",
    "hutchinson_curvature",
    "init_state",
    "make_hessian_refresh",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "next_token_loss",
    "optimizer_state_shardings",
    "param_shardings",
    "read_metrics",
    "rebatch",
    "replicated",
    "shard_batch",
    "total_variance",
    "warmup_cosine",
    "with_hessian_refresh",
]
