"""Language-model inference that skips work: policies, and one `generate` for all of them."""

from jaxskip.skipping.cache import CacheLayout, KVCache
from jaxskip.skipping.cost import block_bytes, decode_bytes
from jaxskip.skipping.generate import Generation, forward, generate, score
from jaxskip.skipping.policy import Policy, early_exit, even_comb, random_layers, without_middle
from jaxskip.skipping.sampling import Sampling, sample
from jaxskip.skipping.scan import Network, take_layers, unstack_layers, when

__all__ = [
    "CacheLayout",
    "Generation",
    "KVCache",
    "Network",
    "Policy",
    "Sampling",
    "block_bytes",
    "decode_bytes",
    "early_exit",
    "even_comb",
    "forward",
    "generate",
    "random_layers",
    "sample",
    "score",
    "take_layers",
    "unstack_layers",
    "when",
    "without_middle",
]
