"""Attention that neither computes nor loads what it is told to skip.

``decode_attention`` is the form for one new token a sequence, over a cache of keys and values.
"""

from pallas_kernels.skip_attention.decode import decode_attention

__all__ = ["decode_attention"]
