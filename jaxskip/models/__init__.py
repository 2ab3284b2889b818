"""Whole networks."""

from jaxskip.models.decoder import PARTITION_RULES as DECODER_PARTITION_RULES
from jaxskip.models.decoder import Decoder, DecoderConfig, classifier, decay_mask, decoder_config

__all__ = ["DECODER_PARTITION_RULES", "Decoder", "DecoderConfig", "classifier", "decay_mask", "decoder_config"]
