"""Language-model inference that skips work: policies, and one `generate` for all of them."""

from jaxskip.skipping.cache import CacheLayout, KVCache
from jaxskip.skipping.cost import block_bytes, decode_bytes
from jaxskip.skipping.ffn_skipllm import (
    FFNSkip,
    FFNTrace,
    calibrate_ffn_skip,
    ffn_ablation,
    ffn_similarity,
    ffn_skip_forward,
    simulate_ffn_skip,
    static_ffn_skip,
)
from jaxskip.skipping.first_router import FirstRouter, binarize, dual_ascent, non_skip_penalty, routed_forward
from jaxskip.skipping.generate import Generation, forward, generate, score
from jaxskip.skipping.lora_drop import (
    LoRADrop,
    init_lora_drop,
    lora_drop_forward,
    lora_drop_layers,
    lora_drop_loss,
)
from jaxskip.skipping.policy import Policy, early_exit, even_comb, random_layers, without_middle
from jaxskip.skipping.sampling import Sampling, sample
from jaxskip.skipping.scan import Network, take_layers, unstack_layers, when
from jaxskip.skipping.unified_layer_skipping import (
    decode_ceiling,
    unified_keep_layers,
    unified_layer_skipping,
    unified_skip_loss,
)
from jaxskip.skipping.void_lac import LAC, LACHalt, LACTrace, lac_decision, lac_trace, void_keep_layers

__all__ = [
    "LAC",
    "CacheLayout",
    "FFNSkip",
    "FFNTrace",
    "FirstRouter",
    "Generation",
    "KVCache",
    "LACHalt",
    "LACTrace",
    "LoRADrop",
    "Network",
    "Policy",
    "Sampling",
    "binarize",
    "block_bytes",
    "calibrate_ffn_skip",
    "decode_bytes",
    "decode_ceiling",
    "dual_ascent",
    "early_exit",
    "even_comb",
    "ffn_ablation",
    "ffn_similarity",
    "ffn_skip_forward",
    "forward",
    "generate",
    "init_lora_drop",
    "lac_decision",
    "lac_trace",
    "lora_drop_forward",
    "lora_drop_layers",
    "lora_drop_loss",
    "non_skip_penalty",
    "random_layers",
    "routed_forward",
    "sample",
    "score",
    "simulate_ffn_skip",
    "static_ffn_skip",
    "take_layers",
    "unified_keep_layers",
    "unified_layer_skipping",
    "unified_skip_loss",
    "unstack_layers",
    "void_keep_layers",
    "when",
    "without_middle",
]
