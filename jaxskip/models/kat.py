"""The Kolmogorov-Arnold Transformer for pictures (arXiv 2409.10594), and the vision transformer that it is made of.

Shape letters: B pictures, S side of a picture, T tokens (patches and one class token), D width, H heads.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxskip.nn.gr_kan import GRKAN, Activation


class KAT(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks of attention and GR-KAN (or an MLP), a linear head.

    Attributes:
      num_classes: outputs of the head.
      image_size, patch_size: S and the side of a patch, of which S is a multiple.
      embed_dim, num_layers, num_heads: D, blocks, H.
      mlp_ratio: hidden channels of GR-KAN or MLP over D.
      mlp: "gr_kan" (KAT) or "gelu" (the ViT of equal size, but for the coefficients).
      num_groups, act_init, kernel_init, implementation: of `jaxskip.nn.GRKAN`.
      attention_init: "mimetic" draws query and key so that their product is near 0.7 I, value and output near -0.4 I
        (one singular value decomposition a head: seconds at D 768); "trunc_normal_002" draws N(0, 0.02^2).
      drop_path_rate: of the last block; grows from 0 in equal steps. Needs the random stream "dropout" in training.
      dtype, param_dtype: of activations and of parameters; norms and rationals are computed in float32.

    Takes [B, S, S, C] and returns logits [B, num_classes] in float32. Raises ValueError where sizes do not fit.

    >>> model = KAT(num_classes=3, image_size=8, patch_size=4, embed_dim=16, num_layers=1, num_heads=2, num_groups=4)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> model.apply(params, jnp.zeros((2, 8, 8, 1))).shape
    (2, 3)
    """

    num_classes: int = 1000
    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 192
    num_layers: int = 12
    num_heads: int = 3
    mlp_ratio: int = 4
    mlp: Literal["gr_kan", "gelu"] = "gr_kan"
    num_groups: int = 8
    act_init: tuple[Activation, Activation] = ("identity", "swish")
    kernel_init: Literal["variance_preserving", "trunc_normal_002"] = "variance_preserving"
    attention_init: Literal["mimetic", "trunc_normal_002"] = "mimetic"
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, pictures: jax.Array, deterministic: bool = True) -> jax.Array:
        self._check(pictures)
        normal, dtypes = nn.initializers.normal(0.02), {"dtype": self.dtype, "param_dtype": self.param_dtype}
        side = (self.patch_size, self.patch_size)
        x = nn.Conv(self.embed_dim, side, strides=side, padding="VALID", name="patches", **dtypes)(pictures)
        x = x.reshape(x.shape[0], -1, self.embed_dim)
        token = self.param("class_token", normal, (1, 1, self.embed_dim), self.param_dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.embed_dim)).astype(x.dtype), x], 1)
        x += self.param("positions", normal, (1, *x.shape[1:]), self.param_dtype).astype(x.dtype)
        for number in range(self.num_layers):
            x = self._block(number, x, deterministic)
        x = nn.LayerNorm(1e-6, name="norm", **dtypes)(x[:, 0])
        head = nn.Dense(self.num_classes, kernel_init=normal, name="head", **dtypes)
        return head(x).astype(jnp.float32)

    def _check(self, pictures):
        if self.image_size % self.patch_size or self.embed_dim % self.num_heads:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}, embed_dim "
                f"{self.embed_dim} of num_heads {self.num_heads}"
            )
        if pictures.ndim != 4 or pictures.shape[1:3] != (self.image_size,) * 2:
            raise ValueError(f"pictures must be [B, {self.image_size}, {self.image_size}, C], got {pictures.shape}")
        for name, allowed in (("mlp", ("gr_kan", "gelu")), ("attention_init", ("mimetic", "trunc_normal_002"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")

    def _block(self, number: int, x, deterministic: bool):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rate = self.drop_path_rate * number / max(self.num_layers - 1, 1)

        def added(branch):  # a picture keeps the whole branch or nothing of it
            return x + nn.Dropout(rate, broadcast_dims=(1, 2))(branch, deterministic=deterministic)

        name = f"block{number}"
        y = nn.LayerNorm(1e-6, name=f"{name}_norm1", **dtypes)(x)
        mimetic = self.attention_init == "mimetic"
        x = added(Attention(self.num_heads, mimetic, name=f"{name}_attention", **dtypes)(y))
        y = nn.LayerNorm(1e-6, name=f"{name}_norm2", **dtypes)(x)
        hidden = self.mlp_ratio * self.embed_dim
        if self.mlp == "gr_kan":
            y = GRKAN(
                self.embed_dim,
                hidden,
                self.num_groups,
                self.act_init,
                kernel_init=self.kernel_init,
                implementation=self.implementation,
                name=f"{name}_gr_kan",
                **dtypes,
            )(y, deterministic)
        else:
            normal = nn.initializers.normal(0.02)
            y = nn.gelu(nn.Dense(hidden, kernel_init=normal, name=f"{name}_fc1", **dtypes)(y), approximate=False)
            y = nn.Dense(self.embed_dim, kernel_init=normal, name=f"{name}_fc2", **dtypes)(y)
        return added(y)


class Attention(nn.Module):
    """Self-attention over all tokens: one biased map to queries, keys and values, one to the output."""

    num_heads: int
    mimetic: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal: Any = nn.initializers.normal(0.02)
        qkv_init, out_init = normal, normal
        if self.mimetic:
            # Both matrices come from one product, so that both maps draw it from the same key.
            key = self.make_rng("params") if self.is_initializing() else jax.random.key(0)
            for_heads, for_values = jax.random.split(key)

            def qkv_init(_, shape, dtype):
                heads = [_near_identity(k, width, 0.7, 0.7) for k in jax.random.split(for_heads, self.num_heads)]
                own = width // self.num_heads
                queries, keys = [left[:, :own] for left, _ in heads], [right[:own].T for _, right in heads]
                value, _ = _near_identity(for_values, width, 0.4, -0.4)
                return jnp.concatenate([*queries, *keys, value], 1).astype(dtype)

            def out_init(_, shape, dtype):
                return _near_identity(for_values, width, 0.4, -0.4)[1].astype(dtype)

        qkv = nn.Dense(3 * width, kernel_init=qkv_init, name="qkv", **dtypes)(x)
        query, key, value = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.num_heads, -1), 3, axis=2)
        out = jax.nn.dot_product_attention(query, key, value)
        return nn.Dense(width, kernel_init=out_init, name="out", **dtypes)(out.reshape(x.shape))


def _near_identity(key, width, noise, identity):
    """(L, R) with L R = noise * U + identity * I, U uniform of variance 1 / width; both sides have the same size."""
    uniform = jax.random.uniform(key, (width, width), jnp.float32, -1, 1) * (3 / width) ** 0.5
    left, values, right = jnp.linalg.svd(noise * uniform + identity * jnp.eye(width))
    root = jnp.sqrt(values)
    return left * root[None], root[:, None] * right


def kat_tiny(**options) -> KAT:
    """KAT-T (5.7M parameters at 224 x 224 and 1000 classes); options are those of `KAT`, drop path 0.1 as published.

    >>> kat_tiny(num_classes=10, image_size=32, patch_size=4).embed_dim
    192
    """
    return KAT(**{"embed_dim": 192, "num_heads": 3, "drop_path_rate": 0.1} | options)


def kat_small(**options) -> KAT:
    """KAT-S (22.1M parameters), as `kat_tiny`.

    >>> kat_small().num_heads
    6
    """
    return KAT(**{"embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.1} | options)


def kat_base(**options) -> KAT:
    """KAT-B (86.6M parameters), as `kat_tiny`; drop path 0.4.

    >>> kat_base().drop_path_rate
    0.4
    """
    return KAT(**{"embed_dim": 768, "num_heads": 12, "drop_path_rate": 0.4} | options)
