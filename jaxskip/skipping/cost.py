"""Bytes that decoding reads: what bounds its speed at small batches.

Shape letters: L layers.
"""

import jax
import numpy as np

from jaxskip.models import decoder


def block_bytes(params, config: decoder.DecoderConfig) -> tuple[int, int, int]:
    """Bytes of the weights of one layer's attention, of its feed-forward block, and of the output matrix.

    Each with the norm before it. `params` may be arrays or ShapeDtypeStructs, stacked or unrolled.

    >>> import jax.numpy as jnp
    >>> config = decoder.decoder_config("gpt2-tiny")
    >>> model = decoder.Decoder(config)
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> block_bytes(params, config)
    (65792, 131328, 65792)
    """
    layers = params["layers"]
    share = 1 if isinstance(layers, tuple) else config.num_layers
    layer = layers[0] if isinstance(layers, tuple) else layers
    attention, feed_forward = (
        sum(_nbytes(x) for name in names for x in jax.tree.leaves(layer[name])) // share
        for names in (("attention_norm", "attention"), ("mlp_norm", "mlp"))
    )
    head = params["embed"]["embedding"] if config.tie_embeddings else params["head"]
    return attention, feed_forward, _nbytes(head) + sum(_nbytes(x) for x in jax.tree.leaves(params["final_norm"]))


def decode_bytes(sizes, config, ran_Lx2, steps: int, batch: int, layout, slots) -> int:
    """Bytes that `steps` decoding steps read: weights of the blocks that ran, their cache, and the output matrix.

    `sizes` as `block_bytes` gives them, `ran` int [L, 2] in how many steps each block ran, `layout` and `slots` the
    cache's groups and their sizes in tokens: all slots of a layer are read by each of its steps, empty ones too.
    """
    attention, feed_forward, head = sizes
    token = 2 * config.kv_heads * config.head_width * np.dtype(config.dtype).itemsize
    group, _ = layout.place(config.num_layers)
    cached = sum(int(ran_Lx2[i, 0]) * slots[group[i]] for i in range(config.num_layers) if group[i] >= 0)
    ran = ran_Lx2.sum(axis=0)
    return int(ran[0]) * attention + int(ran[1]) * feed_forward + steps * head + batch * token * cached


def _nbytes(x) -> int:
    return int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
