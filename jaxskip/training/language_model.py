"""What the training loop needs to train a decoder: its loss, its evaluation, its curvature."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxskip.losses import linear_cross_entropy, sampled_linear_cross_entropy
from jaxskip.models import Decoder, classifier
from jaxskip.optim import hutchinson_diag, sampled_gnb_diag
from jaxskip.training.sharding import BATCH_AXES, constrain, shard_batch
from jaxskip.training.step import Batch, CurvatureFn, LossFn


def _hidden_and_classifier(model: Decoder, params, inputs: jax.Array) -> tuple[Any, jax.Array, str]:
    hidden: Any = model.apply({"params": params}, inputs, return_hidden=True)
    # The loss splits positions over "tensor". Left to itself, the partitioner would do so in the layers too: their
    # matrices would be gathered, and cuDNN's attention refuses sequences in pieces.
    hidden = constrain(hidden, P(BATCH_AXES))
    matrix, layout = classifier(params, model.config)
    return hidden, matrix, layout


def next_token_loss(model: Decoder, **options: Any) -> LossFn:
    """Mean next-token cross-entropy in nats as a loss function for `make_train_step`.

    The batch holds "inputs" and "targets", int [B, T]; a target of -100 does not count. The logits are never
    materialised whole. `options` go to `jaxskip.losses.linear_cross_entropy` (softcap, z_loss, block_sizes, ...).

    >>> from jaxskip.models import decoder_config
    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> loss, _ = next_token_loss(model)(params, {"inputs": tokens, "targets": tokens}, jax.random.key(0))
    >>> loss.shape, loss.dtype.name
    ((), 'float32')
    """

    def loss_fn(params, batch: Batch, key: jax.Array):
        del key
        hidden, matrix, layout = _hidden_and_classifier(model, params, batch["inputs"])
        return linear_cross_entropy(hidden, matrix, batch["targets"], classifier_layout=layout, **options), {}

    return loss_fn


def evaluate_next_token(
    model: Decoder, batches: Sequence[dict[str, np.ndarray]], mesh: Mesh, **options: Any
) -> Callable[[Any], dict[str, float]]:
    """params -> {"val_loss": mean next-token loss in nats over `batches`}, for `fit(evaluate=...)`.

    Every batch must have the same number of targets; each process passes its own rows.
    """
    loss_fn = jax.jit(lambda params, batch: next_token_loss(model, **options)(params, batch, jax.random.key(0))[0])

    def evaluate(params) -> dict[str, float]:
        losses = [loss_fn(params, shard_batch(batch, mesh)) for batch in batches]
        return {"val_loss": float(np.mean(jax.device_get(losses)))}

    return evaluate


def gauss_newton_curvature(model: Decoder, *, max_norm: float | None = None, **options: Any) -> CurvatureFn:
    """Sophia-G's estimate for a decoder, for `make_hessian_refresh`: labels are drawn tile by tile, without logits.

    `max_norm=1.0` clips the sampled gradient before it is squared, as the authors' code does.
    """

    def curvature(params, batch: Batch, key: jax.Array):
        mask = batch["targets"] >= 0

        def sampled_loss(params, key):
            hidden, matrix, layout = _hidden_and_classifier(model, params, batch["inputs"])
            return sampled_linear_cross_entropy(key, hidden, matrix, mask, classifier_layout=layout, **options)

        num_terms = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
        return sampled_gnb_diag(sampled_loss, params, key, num_terms, max_norm=max_norm)

    return curvature


def hutchinson_curvature(model: Decoder, **options: Any) -> CurvatureFn:
    """Sophia-H's estimate for a decoder, for `make_hessian_refresh`.

    Forward over reverse, which cuDNN's attention cannot be differentiated by: the estimate goes through XLA's.

    Raises ValueError for a model that asks for `attention="cudnn"`.
    """
    if model.config.attention == "cudnn":
        raise ValueError("Hutchinson's estimate cannot differentiate cuDNN's attention; use attention='xla' or None")
    model = model.clone(config=dataclasses.replace(model.config, attention="xla"))
    loss_fn = next_token_loss(model, **options)

    def curvature(params, batch: Batch, key: jax.Array):
        return hutchinson_diag(lambda p: loss_fn(p, batch, key)[0], params, key)

    return curvature
