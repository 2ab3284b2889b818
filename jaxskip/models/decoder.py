"""One decoder-only transformer whose configuration covers GPT-2 and Llama.

Shape letters: B batch, T tokens, D width, H query heads, G key/value heads, K head width, F feed-forward width,
V vocabulary, L layers. Parameters of the L layers are stacked on a leading axis and run by one scan.
"""

import dataclasses
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.skip_attention import SkipSpec
from pallas_kernels.skip_attention import attention as skip_attention

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of rotary positions (``rope_type`` "llama3" in Hugging Face's files).

    Rotations slower than `low_freq_factor` turns per original context are slowed down by `factor`, those faster than
    `high_freq_factor` stay, and what lies between is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and style of a decoder. Hashable, so it may be a static argument.

    Attributes:
      vocab_size: V, rows of the token embedding.
      context_length: most tokens a sequence may have (the table's length for learned positions).
      num_layers, num_heads, embed_dim: L, H, D.
      num_kv_heads: G, key/value heads shared by H / G query heads each; None means H.
      head_dim: K; None means D / H.
      mlp_dim: F; None means 4 D.
      position: "learned" (GPT-2) or "rotary" (Llama, halves rotated as in Hugging Face's implementation).
      norm: "layernorm" or "rmsnorm".
      rope_theta, rope_scaling: base of the rotary frequencies, and their stretch to long contexts.
      activation: "gelu" (tanh form, one matrix up) or "swiglu" (gate and up).
      use_bias: biases in projections and LayerNorm; Sophia's and nanoGPT's pre-training set-ups have none.
      qkv_bias: biases of query, key and value alone (Qwen2 has them and no others); None means `use_bias`.
      fused: the form for decoding (see `fuse_projections`): one matrix for query, key and value and one for gate and
        up, and all matrices of the layers with their outputs first, "transposed".
      tie_embeddings: the classifier is the token embedding; otherwise a matrix "head" [D, V] of its own.
      scale_attention_by_layer: divide attention logits by (layer index + 1), as the Sophia authors do.
      init_std: standard deviation of all weights; residual projections use init_std / sqrt(2 L).
      dtype: activations and matrix products; norms and softmax accumulate in float32.
      param_dtype: parameters.
      remat: "none", "dots" (keep matrix products, recompute the rest) or "full" (keep only each layer's input).
      attention: "xla", "cudnn", "skip" for `pallas_kernels.skip_attention`, which leaves out blocks and sequences, or
        None for "skip" where something is to be left out, cuDNN's flash attention where it can run (NVIDIA compute
        capability 8.0 or later, 16-bit dtype) and XLA elsewhere. With "xla" and "cudnn" decoding is XLA's as well, its
        feed-forward blocks included.
      scan_unroll: layers per iteration of the scan; L removes the loop (faster on GPU, longer to compile).
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    embed_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    position: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    activation: Literal["gelu", "swiglu"] = "gelu"
    use_bias: bool = False
    qkv_bias: bool | None = None
    fused: bool = False
    tie_embeddings: bool = True
    scale_attention_by_layer: bool = False
    init_std: float = 0.02
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["xla", "cudnn", "skip"] | None = None
    scan_unroll: int = 1

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "embed_dim", "scan_unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; or give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_width}")

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """K."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        """F."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim


_CHOICES = {
    "position": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "remat": ("none", *REMAT_POLICIES),
    "attention": (None, "xla", "cudnn", "skip"),
}

_GPT2 = {"vocab_size": 50304, "context_length": 1024}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-tiny": {"vocab_size": 256, "context_length": 64, "num_layers": 2, "num_heads": 2, "embed_dim": 64},
    "gpt2-small": {**_GPT2, "num_layers": 12, "num_heads": 12, "embed_dim": 768},
    "gpt2-medium": {**_GPT2, "num_layers": 24, "num_heads": 16, "embed_dim": 1024},
    "gpt2-large": {**_GPT2, "num_layers": 36, "num_heads": 20, "embed_dim": 1280},
}


def decoder_config(preset: str, **overrides) -> DecoderConfig:
    """A named configuration with some fields replaced.

    The GPT-2 presets are nanoGPT's pre-training shapes (no biases, tied head, vocabulary padded to 50,304):
    124,373,760, 354,599,936 and 773,582,080 parameters. "gpt2-tiny" is for a laptop: bytes, 2 layers, width 64.

    >>> decoder_config("gpt2-small", remat="dots").num_layers
    12
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown model {preset!r}; it must be one of {sorted(PRESETS)}")
    return DecoderConfig(**{**PRESETS[preset], **overrides})


def attention_implementation(config: DecoderConfig) -> Literal["xla", "cudnn", "skip"]:
    """The attention that `config.attention` means on the target of this program."""
    if config.attention is not None:
        return config.attention
    target = dispatch.target()
    flash = (
        target.platform == "gpu"
        and (target.compute_capability or (0, 0)) >= (8, 0)
        and jnp.dtype(config.dtype).itemsize == 2
        and config.head_width % 8 == 0
        and config.head_width <= 128
    )
    return "cudnn" if flash else "xla"


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., K/2] in float32 of rotary position embedding (arXiv 2104.09864) at `positions` [...].

    >>> cos, sin = rotary_tables(jnp.arange(3), 8, 10_000.0)
    >>> cos.shape, float(sin[0, 0])
    ((3, 4), 0.0)
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        turns = scaling.original_context_length * frequencies / (2 * jnp.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = jnp.clip(share, 0, 1)
        frequencies = share * frequencies + (1 - share) * frequencies / scaling.factor
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_BxTxHxK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first half of each head against the second, in float32; the dtype is kept.

    `tables` as `rotary_tables` gives them for positions [B, T] or [1, T].
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


# Norms and activations are recomputed in the backward pass whatever `remat` says: from their 16-bit input, which is
# kept anyway, instead of from float32 intermediates that would have to be written and read.
def _norm(config: DecoderConfig, name: str | None = None) -> nn.Module:
    style = {"epsilon": config.norm_eps, "dtype": config.dtype, "param_dtype": config.param_dtype, "name": name}
    if config.norm == "rmsnorm":
        return nn.remat(nn.RMSNorm)(**style)
    return nn.remat(nn.LayerNorm)(use_bias=config.use_bias, **style)


class _OutputsFirst(nn.Module):
    """A dense layer whose matrix lies [*features, I] in memory: an output is the sum over one unbroken row.

    A product with a single token then is one kernel on a GPU that reads at the rate of memory; with the inputs first
    XLA writes all products out before it adds them up (1.2 instead of 1.0 ms a step of Llama-1B's shape on an H200).
    """

    features: tuple[int, ...]
    use_bias: bool
    dtype: Any
    param_dtype: Any
    kernel_init: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param("transposed", self.kernel_init, (*self.features, x.shape[-1]), self.param_dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        out = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (kernel.ndim - 1,)), ((), ())))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, self.param_dtype)
            out += jnp.broadcast_to(bias.astype(self.dtype), out.shape)
        return out


def _projection(config: DecoderConfig, features, *, residual: bool = False, use_bias: bool | None = None):
    std = config.init_std / (2 * config.num_layers) ** 0.5 if residual else config.init_std
    style = {
        "use_bias": config.use_bias if use_bias is None else use_bias,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "kernel_init": nn.initializers.normal(std),
    }
    if config.fused:
        return _OutputsFirst((features,) if isinstance(features, int) else features, **style)
    return (nn.Dense if isinstance(features, int) else nn.DenseGeneral)(features, **style)


@jax.checkpoint
def _gelu(x):
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.checkpoint
def _swiglu(gate, up):
    return (nn.silu(gate.astype(jnp.float32)) * up).astype(up.dtype)


class Attention(nn.Module):
    """Projections of self-attention with grouped key/value heads: into heads, and out of them."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        if c.fused:
            self.qkv = _projection(c, (c.kv_heads, c.num_heads // c.kv_heads + 2, c.head_width), use_bias=c.qkv_bias)
        else:
            self.query = _projection(c, c.num_heads * c.head_width, use_bias=c.qkv_bias)
            self.key = _projection(c, c.kv_heads * c.head_width, use_bias=c.qkv_bias)
            self.value = _projection(c, c.kv_heads * c.head_width, use_bias=c.qkv_bias)
        self.out = _projection(c, c.embed_dim, residual=True)

    def heads(self, x_BxTxD, layer_scale, rotary):
        """Queries [B, T, H, K], keys and values [B, T, G, K], positions applied."""
        c = self.config
        shape = (*x_BxTxD.shape[:2], -1, c.head_width)
        if c.fused:
            qkv = self.qkv(x_BxTxD)
            q, k, v = (x.reshape(shape) for x in jnp.split(qkv, (qkv.shape[3] - 2, qkv.shape[3] - 1), axis=3))
        else:
            q, k, v = (project(x_BxTxD).reshape(shape) for project in (self.query, self.key, self.value))
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        if c.scale_attention_by_layer:
            q = q * layer_scale.astype(q.dtype)
        return q, k, v

    def __call__(self, out_BxTxHxK):
        return self.out(out_BxTxHxK.reshape(*out_BxTxHxK.shape[:2], -1))


class FeedForward(nn.Module):
    """Position-wise feed-forward block [B, T, D] -> [B, T, D]."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        if c.activation == "swiglu" and c.fused:
            self.gate_up = _projection(c, (2, c.mlp_width))
        else:
            self.up = _projection(c, c.mlp_width)
            if c.activation == "swiglu":
                self.gate = _projection(c, c.mlp_width)
        self.down = _projection(c, c.embed_dim, residual=True)

    def __call__(self, x_BxTxD):
        c = self.config
        if c.activation == "gelu":
            hidden = _gelu(self.up(x_BxTxD))
        elif c.fused:
            hidden = _swiglu(*jnp.unstack(self.gate_up(x_BxTxD), axis=2))
        else:
            hidden = _swiglu(self.gate(x_BxTxD), self.up(x_BxTxD))
        return self.down(hidden)


class Block(nn.Module):
    """Pre-norm layer; returns (hidden states [B, T, D], None) as a scan body must.

    Its parts are methods of their own, so that decoding can put a cache between them or leave one out:
    `heads`, `attended`, `feed_forward`.
    """

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.attention_norm = _norm(c)
        self.attention = Attention(c)
        self.mlp_norm = _norm(c)
        self.mlp = FeedForward(c)

    def heads(self, x_BxTxD, layer_scale, rotary):
        """What attention works on: queries [B, T, H, K], keys and values [B, T, G, K]."""
        return self.attention.heads(self.attention_norm(x_BxTxD), layer_scale, rotary)

    def attended(self, x_BxTxD, out_BxTxHxK):
        """The residual stream after attention whose heads gave `out`."""
        return x_BxTxD + self.attention(out_BxTxHxK)

    def feed_forward(self, x_BxTxD):
        """The residual stream after the feed-forward block."""
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))

    def __call__(self, x_BxTxD, layer_scale, rotary, segments=None, skip=None):
        q, k, v = self.heads(x_BxTxD, layer_scale, rotary)
        out = causal_attention(self.config, q, k, v, segments=segments, skip=skip)
        return self.feed_forward(self.attended(x_BxTxD, out)), None


def causal_attention(
    config: DecoderConfig,
    q_BxTxHxK,
    k_BxTxGxK,
    v_BxTxGxK,
    *,
    segments: jax.Array | None = None,
    skip: SkipSpec | None = None,
    active: jax.Array | None = None,
) -> jax.Array:
    """Each token over itself and what comes before it; [B, T, H, K].

    With `segments` [B, T] over its own segment only, with `skip` over the blocks that this keeps; sequences that are
    not `active` [B] give 0. What is left out is not computed.
    """
    leaves_out = not (segments is None and skip is None and active is None)
    if config.attention == "skip" or (config.attention is None and leaves_out):
        out: Any = skip_attention(
            q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=True, q_segment_ids=segments, kv_segment_ids=segments, skip=skip,
            active=active,
        )  # fmt: skip
        return out
    if leaves_out:
        raise ValueError(
            f'attention is {config.attention!r} and leaves nothing out; segments, skip and active need "skip" or None'
        )
    implementation: Any = attention_implementation(config)
    return jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=True, implementation=implementation)


class Decoder(nn.Module):
    """Decoder-only language model: GPT-2 or Llama, by configuration.

    `apply(variables, tokens)` with tokens int [B, T], T <= context_length, gives float32 logits [B, T, V];
    with `return_hidden=True` the normalised hidden states [B, T, D] in `config.dtype`, which together with
    `classifier(params, config)` feed a fused loss that never builds the logits.
    `segments`, int [B, T], separates documents packed into a row: a token looks at its own only. `skip` is a
    `pallas_kernels.skip_attention.SkipSpec`, the pairs of blocks that attention keeps in every layer.
    Token ids are not checked here (a traced value cannot raise): the data pipeline does it.

    Raises ValueError for a sequence longer than the context and TypeError for tokens that are not integers.

    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens).shape
    (1, 8, 256)
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens_BxT, *, return_hidden: bool = False, segments=None, skip=None):
        c = self.config
        if not jnp.issubdtype(tokens_BxT.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, not {tokens_BxT.dtype}")
        if tokens_BxT.ndim != 2 or tokens_BxT.shape[1] > c.context_length:
            raise ValueError(f"tokens have shape {tokens_BxT.shape}; wanted [B, T] with T <= {c.context_length}")
        length = tokens_BxT.shape[1]
        table = {
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
            "embedding_init": nn.initializers.normal(c.init_std),
        }
        embed = nn.Embed(c.vocab_size, c.embed_dim, name="embed", **table)
        x = embed(tokens_BxT)
        positions = jnp.arange(length)[None]
        if c.position == "learned":
            x = x + nn.Embed(c.context_length, c.embed_dim, name="positions", **table)(positions)

        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            # Initialisation needs no speed, and unrolled takes a minute to compile at 24 layers.
            unroll=1 if self.is_initializing() else min(c.scan_unroll, c.num_layers),
        )
        x, _ = layers(c, name="layers")(x, layer_scales(c), rotary(c, positions), segments, skip)
        x = _norm(c, "final_norm")(x)
        if return_hidden:
            return x
        if c.tie_embeddings:
            return _logits(x, embed.embedding.astype(c.dtype), "vd")
        head = self.param("head", nn.initializers.normal(c.init_std), (c.embed_dim, c.vocab_size), c.param_dtype)
        return _logits(x, head.astype(c.dtype), "dv")


def _logits(x_BxTxD, matrix, layout: str) -> jax.Array:
    # Flattened because the CPU backend of JAX 0.7 lacks the 16-bit product with a float32 result in the 3-D form.
    rows = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
    logits = jnp.einsum(f"nd,{layout}->nv", rows, matrix, preferred_element_type=jnp.float32)
    return logits.reshape(*x_BxTxD.shape[:2], -1)


def embed_tokens(params, config: DecoderConfig, tokens_BxT: jax.Array, positions_BxT: jax.Array) -> jax.Array:
    """What enters the first layer, [B, T, D] in `config.dtype`, for tokens at these positions."""
    x = params["embed"]["embedding"][tokens_BxT].astype(config.dtype)
    if config.position == "learned":
        x = x + params["positions"]["embedding"][positions_BxT].astype(config.dtype)
    return x


def final_states(params, config: DecoderConfig, x_BxTxD: jax.Array) -> jax.Array:
    """What the classifier reads, [B, T, D] in `config.dtype`, of what leaves the last layer."""
    states: Any = _norm(config).apply({"params": params["final_norm"]}, x_BxTxD)
    return states


def output_logits(params, config: DecoderConfig, x_BxTxD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V] of what leaves the last layer: final norm and classifier."""
    return _logits(final_states(params, config, x_BxTxD), *classifier(params, config))


def rotary(config: DecoderConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """The tables of `rotary_tables` at these positions, or None where positions are learned."""
    if config.position == "learned":
        return None
    return rotary_tables(positions_BxT, config.head_width, config.rope_theta, config.rope_scaling)


def layer_scales(config: DecoderConfig) -> jax.Array:
    """1 / (layer index + 1) [L] in float32, for `scale_attention_by_layer`."""
    return 1.0 / (1.0 + jnp.arange(config.num_layers, dtype=jnp.float32))


def classifier(params, config: DecoderConfig) -> tuple[jax.Array, Literal["vd", "dv"]]:
    """The output matrix in `config.dtype` and its layout, for `linear_cross_entropy`.

    "vd" is [V, D] (the tied embedding), "dv" is [D, V] (a head of its own).

    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> matrix, layout = classifier(params, model.config)
    >>> matrix.shape, layout
    ((256, 64), 'vd')
    """
    if config.tie_embeddings:
        return params["embed"]["embedding"].astype(config.dtype), "vd"
    return params["head"].astype(config.dtype), "dv"


def fuse_projections(params, config: DecoderConfig) -> tuple[Any, DecoderConfig]:
    """The same network with `config.fused`, which decodes faster: fewer, larger products and unbroken rows.

    Query, key and value become one matrix [G, H / G + 2, K, D], gate and up [2, F, D]; the others are transposed.
    Adapters (`jaxskip.nn.merge_lora`) are merged before, and files are saved from the unfused parameters.

    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> fused, config = fuse_projections(params, model.config)
    >>> fused["layers"]["attention"]["qkv"]["transposed"].shape
    (2, 2, 3, 32, 64)
    """
    if config.fused:
        return params, config
    attention, mlp = dict(params["layers"]["attention"]), dict(params["layers"]["mlp"])

    def per_group(x):  # [L, (D,) heads K] -> [L, (D,) G, heads / G, K]
        return x.reshape(*x.shape[:-1], config.kv_heads, -1, config.head_width)

    parts = [attention.pop(name) for name in ("query", "key", "value")]
    attention["qkv"] = jax.tree.map(lambda *x: jnp.concatenate([per_group(part) for part in x], axis=-2), *parts)
    if config.activation == "swiglu":
        gate, up = mlp.pop("gate"), mlp.pop("up")
        mlp["gate_up"] = jax.tree.map(lambda *x: jnp.stack(x, axis=-2), gate, up)

    def outputs_first(projection):  # kernel [L, I, *features] -> [L, *features, I]
        kernel = projection.pop("kernel")
        return {**projection, "transposed": jnp.moveaxis(kernel, 1, -1)}

    attention, mlp = ({name: outputs_first({**x}) for name, x in block.items()} for block in (attention, mlp))
    layers = {**params["layers"], "attention": attention, "mlp": mlp}
    return {**params, "layers": layers}, dataclasses.replace(config, fused=True)


# Parameter path -> how its axes lie on the mesh. Layers are stacked, so the first axis of "layers/..." is L.
# Columns of what enters a block and rows of what leaves it are split over "tensor": one all-reduce a block.
PARTITION_RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"positions/embedding", P(None, "fsdp")),
    (r"layers/.*/(query|key|value|up|gate)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/.*/(query|key|value|up|gate)/bias", P(None, "tensor")),
    (r"layers/.*/qkv/transposed", P(None, "tensor", None, None, "fsdp")),
    (r"layers/.*/up/transposed", P(None, "tensor", "fsdp")),
    (r"layers/.*/gate_up/transposed", P(None, None, "tensor", "fsdp")),
    (r"layers/.*/qkv/bias", P(None, "tensor")),
    (r"layers/.*/gate_up/bias", P(None, None, "tensor")),
    (r"layers/.*/(out|down)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/.*/(out|down)/transposed", P(None, "fsdp", "tensor")),
    (r"layers/.*/(out|down)/bias", P()),
    (r"(layers/.*|final)_norm/(scale|bias)", P()),
    (r"head", P("fsdp", "tensor")),
)


def decay_mask(params) -> Any:
    """True for the matrices of the layers and a separate head, the weights that the Sophia authors decay.

    Embeddings (also when they are the tied classifier), norms and biases are left out.

    >>> decay_mask({"embed": {"embedding": 0}, "layers": {"mlp": {"up": {"kernel": 0, "bias": 0}}}})
    {'embed': {'embedding': False}, 'layers': {'mlp': {'up': {'bias': False, 'kernel': True}}}}
    """

    def decayed(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return re.fullmatch(r"layers/.*/(kernel|transposed)|head", name) is not None

    return jax.tree_util.tree_map_with_path(decayed, params)
