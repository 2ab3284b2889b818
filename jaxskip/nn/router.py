"""FiRST's routers: for each layer one number, from the prompt, that says whether the sequence needs the layer.

Shape letters: B batch, T tokens, D width, L layers.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

Pool = Literal["mean", "max", "last"]
POOLS = ("mean", "max", "last")


def init_routers(key: jax.Array, num_layers: int, embed_dim: int, *, bias: float = 2.0) -> dict[str, jax.Array]:
    """Linear routers {"kernel": [L, D], "bias": [L]}, float32: at a bias of 2 every layer is on (probability 0.88).

    >>> init_routers(jax.random.key(0), 4, 8)["kernel"].shape
    (4, 8)
    """
    kernel = 0.02 * jax.random.normal(key, (num_layers, embed_dim), jnp.float32)
    return {"kernel": kernel, "bias": jnp.full(num_layers, bias, jnp.float32)}


def keep_probability(routers: Any, layer, h_BxTxD: jax.Array, seen_BxT: jax.Array, *, pool: Pool = "mean") -> jax.Array:
    """rho, float32 [B]: the sigmoid of one logit a token, pooled over the tokens that `seen` marks.

    `h` enters the layer; it is divided by its root mean square first, in float32. `layer` may be traced. Every row
    has at least one seen token; where padding lies plays no part.

    Raises ValueError for an unknown pool.

    >>> routers = init_routers(jax.random.key(0), 4, 8)
    >>> keep_probability(routers, 2, jnp.zeros((3, 5, 8)), jnp.ones((3, 5), bool)).round(2)
    Array([0.88, 0.88, 0.88], dtype=float32)
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; it must be one of {POOLS}")
    h = h_BxTxD.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-6)
    logits = h @ routers["kernel"][layer]
    if pool == "mean":
        pooled = jnp.sum(logits * seen_BxT, axis=1) / jnp.sum(seen_BxT, axis=1)
    elif pool == "max":
        pooled = jnp.max(jnp.where(seen_BxT, logits, -jnp.inf), axis=1)
    else:
        last = jnp.max(jnp.where(seen_BxT, jnp.arange(h.shape[1]), 0), axis=1)
        pooled = jnp.take_along_axis(logits, last[:, None], axis=1)[:, 0]
    return jax.nn.sigmoid(pooled + routers["bias"][layer])
