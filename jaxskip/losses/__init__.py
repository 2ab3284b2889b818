"""Objectives."""

from jaxskip.losses.linear_cross_entropy import linear_cross_entropy, sampled_linear_cross_entropy

__all__ = ["linear_cross_entropy", "sampled_linear_cross_entropy"]
