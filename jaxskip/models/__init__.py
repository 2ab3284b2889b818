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

__all__ = [
    "DECODER_PARTITION_RULES",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "classifier",
    "decay_mask",
    "decoder_config",
    "fuse_projections",
]
