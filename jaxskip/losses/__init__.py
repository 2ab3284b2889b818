"""Objectives."""

from jaxskip.losses.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy, sampled_linear_cross_entropy
from jaxskip.losses.stablemax import (
    cross_entropy_in_dtype,
    log_stablemax,
    stablemax,
    stablemax_cross_entropy_with_integer_labels,
)

__all__ = [
    "LinearCrossEntropy",
    "cross_entropy_in_dtype",
    "linear_cross_entropy",
    "log_stablemax",
    "sampled_linear_cross_entropy",
    "stablemax",
    "stablemax_cross_entropy_with_integer_labels",
]
