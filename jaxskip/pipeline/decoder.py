"""A decoder of `jaxskip.models` as a pipeline: embedding, layers split into stages, head with its loss.

The training loop keeps the decoder's own parameters, with layers [L, ...] along the mesh's "stage" axis, so that any
optimizer, checkpoint and evaluation of a decoder works on them as it is::

    mesh, axis = stage_mesh(topology), ("stage", "replica")
    state = training.init_state(init_params, tx, key, mesh, STAGE_RULES)
    step = training.make_train_step(pipelined_loss(config, table, mesh, axis), tx)
    training.fit(state, step, batches, mesh=mesh, ...)
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxskip.models import DecoderConfig, classifier, decoder
from jaxskip.pipeline.execute import EmbedFn, HeadLossFn, Params, StageFn, make_train_step, stack_stages
from jaxskip.pipeline.table import Table
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

STAGE_RULES = ((r"layers/.*", P("stage")), (r".*", P()))


def split_decoder(params: Mapping[str, Any], config: DecoderConfig, stages: int | Sequence[int]) -> Params:
    """``{"embed": ..., "stages": ..., "head": ...}`` for `decoder_functions`, from the parameters of a `Decoder`.

    stages: S, for leaves [S, L / S, ...], which `make_train_step` takes; or the number of layers of each stage, for a
    tuple of S trees with leaves [layers, ...], which `make_dataflow_step` takes. A tied embedding is in both embed and
    head: its gradient is the sum of theirs.

    Raises ValueError where the stages do not take L layers, or one takes none.

    >>> config = decoder.decoder_config("gpt2-tiny", num_layers=4)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> split_decoder(params, config, 2)["stages"]["layers"]["mlp"]["up"]["kernel"].shape
    (2, 2, 64, 256)
    >>> [len(stage["scale"]) for stage in split_decoder(params, config, (1, 3))["stages"]]
    [1, 3]
    """
    sizes = [config.num_layers // stages] * stages if isinstance(stages, int) else list(stages)
    if sum(sizes) != config.num_layers or min(sizes, default=0) < 1:
        raise ValueError(
            f"stages={stages}; give a divisor of the {config.num_layers} layers, or sizes with that sum, each 1 or more"
        )
    layers = {"layers": params["layers"], "scale": decoder.layer_scales(config)}
    if isinstance(stages, int):
        split: Any = jax.tree.map(lambda leaf: leaf.reshape(stages, -1, *leaf.shape[1:]), layers)
    else:
        bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        split = tuple(jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], layers) for a, b in bounds)
    output = "embed" if config.tie_embeddings else "head"
    return {
        "embed": {name: params[name] for name in ("embed", "positions") if name in params},
        "stages": split,
        "head": {name: params[name] for name in ("final_norm", output)},
    }


def decoder_functions(config: DecoderConfig, **options: Any) -> tuple[StageFn, EmbedFn, HeadLossFn]:
    """``(stage_fn, embed_fn, head_loss_fn)`` of a decoder, for `make_train_step` and `make_dataflow_step`.

    Tokens and targets of a microbatch are int [B, T], x is [B, T, D] in ``config.dtype``, the loss is the mean over
    targets that are not -100. ``options`` are those of `jaxskip.losses.linear_cross_entropy`.

    >>> stage_fn, embed_fn, head_loss_fn = decoder_functions(decoder.decoder_config("gpt2-tiny"))
    """

    def positions(tokens_BxT):
        return jnp.arange(tokens_BxT.shape[1])[None]

    def embed_fn(embed, tokens_BxT):
        return decoder.embed_tokens(embed, config, tokens_BxT, positions(tokens_BxT))

    def stage_fn(stage, x_BxTxD):
        rotary = decoder.rotary(config, positions(x_BxTxD))

        def layer(x, params_and_scale):
            params, scale = params_and_scale
            return decoder.Block(config).apply({"params": params}, x, scale, rotary)

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=decoder.REMAT_POLICIES[config.remat], prevent_cse=False)
        return jax.lax.scan(layer, x_BxTxD, (stage["layers"], stage["scale"]), unroll=config.scan_unroll)[0]

    def head_loss_fn(head, x_BxTxD, targets_BxT):
        states = decoder.final_states(head, config, x_BxTxD)
        matrix, layout = classifier(head, config)
        loss: Any = linear_cross_entropy(states, matrix, targets_BxT, classifier_layout=layout, **options)
        return loss

    return stage_fn, embed_fn, head_loss_fn


def path_loss(
    params: Mapping[str, Any],
    config: DecoderConfig,
    stages: int | Sequence[int],
    path: Iterable[Any],
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    **options: Any,
) -> jax.Array:
    """Loss of a decoder that runs only the stages on ``path``, in this order, on one device.

    It is what the pipeline computes for a microbatch, and, with any stages left out, the evaluation of a network in
    which nodes are missing; the others run as they are, without rescaling. ``path``: indices of stages, ints or, where
    ``stages`` is a number, traced int32 [K]. Other arguments: `split_decoder`, `decoder_functions`.

    Raises ValueError for an index of no stage.

    >>> config = decoder.decoder_config("gpt2-tiny", num_layers=4)
    >>> tokens = jnp.zeros((1, 4), jnp.int32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), tokens)["params"]
    >>> float(jax.jit(lambda p: path_loss(p, config, 4, (0, 1, 3), tokens, tokens))(params)) > 0
    True
    """
    if not isinstance(path, jax.Array):
        path, count = list(path), stages if isinstance(stages, int) else len(stages)
        if any(not 0 <= stage < count for stage in path):
            raise ValueError(f"path is {path}; stages are 0..{count - 1}")
    stage_fn, embed_fn, head_loss_fn = decoder_functions(config, **options)
    parts = split_decoder(params, config, stages)
    x = embed_fn(parts["embed"], tokens_BxT)
    if isinstance(stages, int):

        def run(x, index):
            return stage_fn(jax.tree.map(lambda leaf: leaf[index], parts["stages"]), x), None

        x, _ = jax.lax.scan(run, x, jnp.asarray(path))
    else:
        for index in path:
            x = stage_fn(parts["stages"][index], x)
    return head_loss_fn(parts["head"], x, targets_BxT)


def pipelined_loss(
    config: DecoderConfig,
    table: Table,
    mesh: Mesh,
    axis: str | tuple[str, str] = ("stage", "replica"),
    grad_norm: Literal["total", "visits"] = "total",
    **options: Any,
) -> Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """A decoder's loss for `jaxskip.training.make_train_step`, computed by the pipeline, its gradient too.

    The batch holds "inputs" and "targets", int [M B, T]: M microbatches, one after the other. Parameters are those of
    the decoder; with two axes (see `stage_mesh`) its layers lie along the first by ``STAGE_RULES``, with one axis,
    which stages of unequal numbers of nodes need, they are on all nodes between steps. The gradients come with the
    loss: to evaluate, `path_loss` is cheaper.

    Arguments as `make_train_step` of this package takes them; ``options`` as `decoder_functions`.

    Raises ValueError for L that is no multiple of S and for rows that M does not divide; see also `make_train_step`.

    >>> from jaxskip.pipeline import Topology, compile_table, stage_mesh
    >>> topology = Topology([[0], [1]])
    >>> config = decoder.decoder_config("gpt2-tiny")
    >>> loss_fn = pipelined_loss(config, compile_table([(0, 1)] * 3, topology), stage_mesh(topology))
    >>> tokens = jnp.zeros((6, 4), jnp.int32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), tokens)["params"]
    >>> loss, _ = jax.eval_shape(loss_fn, params, {"inputs": tokens, "targets": tokens}, jax.random.key(0))
    >>> loss.shape
    ()
    """
    topology, count = table.topology, len(table.paths)
    step = make_train_step(*decoder_functions(config, **options), table, mesh, axis, grad_norm)
    copies = isinstance(axis, str)
    first = np.array([nodes[0] for nodes in topology.stages])

    def forward(parts, tokens, targets):
        given = {**parts, "stages": stack_stages(parts["stages"], topology)} if copies else parts
        loss, grads = step(given, tokens, targets)
        if copies:
            grads = {**grads, "stages": jax.tree.map(lambda leaf: leaf[first], grads["stages"])}
        return loss, grads

    @jax.custom_vjp
    def loss_of(parts, tokens, targets):
        return forward(parts, tokens, targets)[0]

    def backward(grads, g):
        return jax.tree.map(lambda leaf: (g * leaf).astype(leaf.dtype), grads), None, None

    loss_of.defvjp(forward, backward)

    def loss_fn(params, batch, key):
        del key
        rows = batch["inputs"].shape[0]
        if rows % count:
            raise ValueError(
                f"a batch of {rows} sequences; the paths are of {count} microbatches, which must divide it"
            )
        tokens, targets = (x.reshape(count, -1, *x.shape[1:]) for x in (batch["inputs"], batch["targets"]))
        return loss_of(split_decoder(params, config, len(topology.stages)), tokens, targets), {}

    return loss_fn
