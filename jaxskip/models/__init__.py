"""Whole networks."""

from jaxskip.models.decoder import PARTITION_RULES as DECODER_PARTITION_RULES
from jaxskip.models.decoder import (
    Decoder,
    DecoderConfig,
    RopeScaling,
    classifier,
    decay_mask,
    decoder_config,
    fuse_projections,
)
from jaxskip.models.kat import KAT, kat_base, kat_small, kat_tiny

__all__ = [
    "DECODER_PARTITION_RULES",
    "KAT",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "classifier",
    "decay_mask",
    "decoder_config",
    "fuse_projections",
    "kat_base",
    "kat_small",
    "kat_tiny",
]
