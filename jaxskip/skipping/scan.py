"""The layers of a decoder, run under a choice of what to leave out, so that what is left out costs nothing.

One rule makes skipping real on every backend: the weights of a layer, and its cache, are indexed *inside* the branch
that runs it. Weights that a scan slices for its body are read whether a conditional then uses them or not, and
`jnp.where` on results never saves anything.

Shape letters: B batch, T tokens, D width, H query heads, G key/value heads, K head width, L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxskip.models import decoder
from jaxskip.skipping import cache as caches
from pallas_kernels.gated_mlp import gated_mlp
from pallas_kernels.skip_attention import decode_attention


def when(wanted, run: Callable, *state) -> Any:
    """`run(*state)` where `wanted` holds, else `state` as it is: not executed, not read.

    `wanted` is one boolean for the whole batch: a Python or NumPy bool is decided while tracing, a traced one by
    `lax.cond`. Under `vmap` over `wanted` both sides would run: reduce it over the batch first.
    `run` gets and returns the same structure (one array, or a tuple of what it was given).

    >>> float(when(jnp.bool_(False), lambda x: x + 1, jnp.float32(2)))
    2.0
    """
    given = state[0] if len(state) == 1 else state
    if isinstance(wanted, bool | np.bool_):
        return run(*state) if wanted else given
    return jax.lax.cond(wanted, lambda: run(*state), lambda: given)


def unstack_layers(params) -> dict[str, Any]:
    """`params` with a tuple of L layers instead of stacked ones: decoding then unrolls them.

    A step is faster (no slice of a stack stands between a weight and its product) and takes longer to compile.

    >>> params = {"layers": {"w": jnp.ones((3, 2))}, "head": jnp.ones(2)}
    >>> len(unstack_layers(params)["layers"])
    3
    """
    if isinstance(params["layers"], tuple):
        return params
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count))
    return {**params, "layers": layers}


def take_layers(layers, keep: Sequence[int]):
    """The stacked layers `keep` of a stacked pytree [L, ...], in this order: a smaller network.

    >>> take_layers({"w": jnp.arange(4)}, (0, 3))["w"]
    Array([0, 3], dtype=int32)
    """
    return jax.tree.map(lambda x: x[np.asarray(keep)], layers)


@dataclasses.dataclass(frozen=True)
class Network:
    """What a policy works with while a program is traced: the layers of one decoder at the positions of one step.

    A policy calls `attention` and `feed_forward` for the blocks that it wants, in `over`, which loops over layers, with
    `when` around what may be left out; a feed-forward block that alone may be left out is handed the choice. `layer` is
    a Python int where layers are a tuple and a traced int32 where they are stacked; `pick` reads a table by either.

    Attributes:
      config, params: the decoder.
      positions: the tokens' places in their sequences, int [B, T].
      index: which generated token each is, int [B, T]: 1 for the first that decoding feeds back, 0 and less in prompts.
      real: bool [B, T], False for padding and for sequences that have ended.
      attend: `(q, k, v, cache, layer, active) -> (out [B, T, H, K], cache)`; with q None it only stores, and gives
        None. Rows that are not `active` [B] (None: all are) may be left out of it.
    """

    config: decoder.DecoderConfig
    params: Any
    positions: jax.Array
    index: jax.Array
    real: jax.Array
    attend: Callable

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def over(self, layers: Sequence[int], body: Callable, carry):
        """`carry, out = body(carry, layer)` for each of `layers`; returns the carry and the outputs stacked."""
        if not isinstance(self.params["layers"], tuple):
            return jax.lax.scan(body, carry, jnp.asarray(layers, jnp.int32))
        outs = []
        for layer in layers:
            carry, out = body(carry, layer)
            outs.append(out)
        return carry, jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *outs)

    def last(self, h_BxTxD):
        """The state of each sequence's last real token, [B, 1, D]."""
        last = jnp.sum(self.real, axis=1) - 1
        return jnp.take_along_axis(h_BxTxD, last[:, None, None], axis=1)

    def pick(self, table, layer):
        """`table[layer]`; a NumPy scalar, known while tracing, where `layer` is a Python int and `table` NumPy's."""
        return _pick(table, layer)

    def attention(self, h_BxTxD, cache, layer, active=None) -> tuple[jax.Array, Any]:
        """The residual stream after the attention of `layer`, and the cache with its keys and values.

        Where `active` [B] is False the result is of no use, and need not be computed: the caller drops it.
        """
        out, cache = self.attend(*self._heads(h_BxTxD, layer), cache, layer, active)
        return self._block(layer, "attended", h_BxTxD, out), cache

    def store(self, h_BxTxD, cache, layer) -> Any:
        """The cache with what the attention of `layer` would put into it, and nothing else done."""
        _, k, v = self._heads(h_BxTxD, layer)
        return self.attend(None, k, v, cache, layer, None)[1]

    def feed_forward(self, h_BxTxD, layer, run: Any = True) -> jax.Array:
        """The residual stream after the feed-forward block of `layer`, or as it is where `run` (see `when`) is False.

        For one new token a sequence, and weights as they lie in fused layers that are a tuple, it is one op that is
        handed `run`: a kernel may then do without a conditional, whose ends take longer on a GPU than many a block.
        """
        decided = isinstance(run, bool | np.bool_)
        weights = None if decided or h_BxTxD.shape[1] > 1 else self._gated_mlp(layer)
        if weights is None:
            return when(run, lambda h: self._block(layer, "feed_forward", h), h_BxTxD)
        kernel, epsilon = _kernel(self.config), self.config.norm_eps
        return gated_mlp(h_BxTxD[:, 0], *weights, run=run, epsilon=epsilon, implementation=kernel)[:, None]

    def _gated_mlp(self, layer):
        """The weights of the block as `gated_mlp` takes them, or None where they lie otherwise."""
        c, layers = self.config, self.params["layers"]
        fits = c.fused and c.activation == "swiglu" and c.norm == "rmsnorm" and not c.use_bias
        if not fits or not isinstance(layers, tuple):  # out of a stack, a kernel's operands would be copied
            return None
        norm, mlp = layers[layer]["mlp_norm"], layers[layer]["mlp"]
        gate_up, down = mlp["gate_up"]["transposed"], mlp["down"]["transposed"]
        return (norm["scale"], gate_up, down) if gate_up.dtype == down.dtype == c.dtype else None

    def _heads(self, h_BxTxD, layer):
        tables = decoder.rotary(self.config, self.positions)
        return self._block(layer, "heads", h_BxTxD, decoder.layer_scales(self.config)[layer], tables)

    def _block(self, layer, method: str, *operands) -> Any:
        layers = self.params["layers"]
        params = layers[layer] if isinstance(layers, tuple) else jax.tree.map(lambda x: x[layer], layers)
        return decoder.Block(self.config).apply({"params": params}, *operands, method=method)


def prompt_attention(config, layout: caches.CacheLayout | None):
    """`Network.attend` for whole sequences from their first token on; writes the layers that own slots.

    With `layout` None nothing is cached.
    """

    def attend(q, k, v, cache, layer, active):
        # Other forms of attention compute rows whether these count or not.
        active = active if config.attention == "skip" else None
        out = None if q is None else decoder.causal_attention(config, q, k, v, active=active)
        if layout is not None:
            groups, positions = layout.place(config.num_layers)
            for group in range(len(layout.groups)):
                position = _pick(positions, layer)
                put = lambda old, g=group, p=position: caches.write(old, g, p, k, v, 0)  # noqa: E731
                cache = when(_pick(groups == group, layer), put, cache)
        return out, cache

    return attend


def cached_attention(config, layout: caches.CacheLayout, lengths_B, prompt_slots, step, live_B):
    """`Network.attend` for one new token a sequence: its key and value go into the cache, then it looks at the cache.

    The prompt of row b lies in slots 0 to lengths[b] - 1; slots up to `prompt_slots` are padding. A group of stride w
    stores the tokens of steps w, 2 w, ... after them (`step` counts from 1), and attends at these steps only. Only
    layers that own slots may be asked for. Of sequences that are not `live`, or not active, nothing is read where a
    kernel does it.
    """

    def attend(q, k, v, cache, layer, active):
        groups, positions = layout.place(config.num_layers)

        def look(group):
            count = step // layout.strides[group]
            position = _pick(positions, layer)
            new = caches.write(cache, group, position, k, v, prompt_slots + count - 1)
            if q is None:
                return None, new
            keys, values = caches.read(new, group, position)
            recent = prompt_slots, count
            running = live_B if active is None else live_B & active
            out = decode_attention(
                q[:, 0], keys, values, lengths=lengths_B, recent=recent, active=running, implementation=_kernel(config)
            )
            return out[:, None], new

        group = _pick(groups, layer) if len(layout.groups) > 1 else 0
        if isinstance(group, int | np.integer):
            return look(int(group))
        return jax.lax.switch(group, [lambda g=g: look(g) for g in range(len(layout.groups))])

    return attend


def _kernel(config) -> str | None:
    """The implementation of what kernels do: XLA's alone where `config.attention` says so, as it does on a mesh."""
    return "xla" if config.attention in ("xla", "cudnn") else None


def _pick(table, layer):
    return table[layer] if isinstance(layer, int) else jnp.asarray(table)[layer]
