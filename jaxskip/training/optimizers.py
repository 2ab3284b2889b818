"""Optimizers by name, each with the chain that language-model pre-training uses around it."""

from collections.abc import Callable
from typing import Any

import optax

from jaxskip.optim import sophia

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sophia_g": sophia,
    "sophia_h": sophia,
}


def warmup_cosine(peak: float, *, steps: int, warmup: int, final: float) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then a half cosine to `final` at `steps`.

    Raises ValueError when the warm-up is not shorter than the run.

    >>> schedule = warmup_cosine(1.0, steps=10, warmup=2, final=0.1)
    >>> [round(float(schedule(n)), 2) for n in (0, 1, 2, 10)]
    [0.0, 0.5, 1.0, 0.1]
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warm-up of {warmup} steps in a run of {steps}; it must be shorter than the run")
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    grad_clip: float | None = 1.0,
    weight_decay_mask: Any = None,
    **hyperparameters: Any,
) -> optax.GradientTransformationExtraArgs:
    """`clip_by_global_norm(grad_clip)` followed by the named optimizer.

    Args:
      name: "adamw", "lion", "sophia_g" or "sophia_h" (the two differ in their estimate of the Hessian, which is
        passed in, and in `gamma`).
      learning_rate: number or schedule of the step count.
      grad_clip: global norm, or None for no clipping.
      weight_decay_mask: tree of booleans like the parameters, or a function making one.
      **hyperparameters: of the Optax function of that name, or of `jaxskip.optim.sophia`.

    Raises ValueError for an unknown name.

    >>> tx = make_optimizer("adamw", 1e-3, b2=0.95, weight_decay=0.1)
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; it must be one of {sorted(OPTIMIZERS)}")
    mask = "weight_decay_mask" if OPTIMIZERS[name] is sophia else "mask"
    rule = OPTIMIZERS[name](learning_rate, **{mask: weight_decay_mask}, **hyperparameters)
    clip = optax.identity() if grad_clip is None else optax.clip_by_global_norm(grad_clip)
    return optax.chain(clip, rule)
