import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.models import Decoder, DecoderConfig
from jaxskip.pipeline import (
    Costs,
    Topology,
    decoder_functions,
    make_dataflow_step,
    path_loss,
    simulate,
    split_decoder,
)

CONFIG = DecoderConfig(
    vocab_size=32, context_length=8, num_layers=6, num_heads=2, embed_dim=8, init_std=0.3, dtype=jnp.float32
)
# Stages of other sizes and other numbers of nodes, which are not numbered by stages and not equally fast.
LAYERS = (1, 3, 2)
TOPOLOGY = Topology([[2, 0, 7], [1, 5, 4], [6, 3]])
PATHS = [(2, 1, 6), (0, 3), (7, 6, 5), (2, 4), (0, 3, 1), (7, 5)]
COSTS = Costs(np.random.default_rng(0).random((8, 8)), compute=np.linspace(0.5, 2, 8))


def problem():
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tokens, targets = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, len(PATHS), 2, 8)))
    return params, tokens, targets


def expected(params, tokens, targets):
    """Autodiff of the mean loss; the gradient of a tied embedding is that of embed and head together."""

    def loss(params):
        paths = [[TOPOLOGY.stage_of[node] for node in path] for path in PATHS]
        rows = zip(paths, tokens, targets, strict=True)
        return sum(path_loss(params, CONFIG, LAYERS, path, t, y) for path, t, y in rows) / len(PATHS)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.multidevice
@pytest.mark.slow  # an executable for each kind of work on each node
@pytest.mark.parametrize("grad_norm", ["total", "visits"])
def test_gradients_are_those_of_one_device(grad_norm):
    """1e-5 of the largest entry: float32, sums in another order."""
    params, tokens, targets = problem()
    timeline = simulate(PATHS, TOPOLOGY, COSTS).timeline
    step = make_dataflow_step(*decoder_functions(CONFIG), timeline, TOPOLOGY, jax.devices()[:8], grad_norm=grad_norm)
    loss, grads = step(split_decoder(params, CONFIG, LAYERS), tokens, targets)
    want_loss, want = expected(params, tokens, targets)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    visits = [6, 5, 4]
    start = 0
    for stage, size in enumerate(LAYERS):
        factor = 6 / visits[stage] if grad_norm == "visits" else 1.0
        layers = jax.tree.map(lambda leaf, a=start, n=size, f=factor: f * leaf[a : a + n], want["layers"])
        check_tree(grads["stages"][stage]["layers"], layers)
        start += size
    tied = jax.tree.map(jnp.add, grads["embed"]["embed"], grads["head"]["embed"])
    check_tree(tied, want["embed"])
    check_tree(grads["head"]["final_norm"], want["final_norm"])
    check_tree(grads["embed"]["positions"], want["positions"])


def check_tree(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), got, want)


@pytest.mark.multidevice
def test_gradients_are_where_the_parameters_are():
    """Each stage of a toy on a device of its own, and one device that serves three nodes."""
    topology = Topology([[0], [1], [2]])
    timeline = simulate([(0, 1), (0, 2)], topology, Costs(np.ones((3, 3)), compute=1.0)).timeline
    functions = (lambda w, x: w * x, lambda e, t: e * t, lambda h, x, y: jnp.sum(h * x - y))
    ones, devices = jnp.ones((2, 1)), jax.devices()
    params = {
        "embed": jax.device_put(1.0, devices[4]),
        "stages": [jax.device_put(jnp.bfloat16(w), devices[d]) for w, d in ((2, 5), (3, 6), (5, 7))],
        "head": jax.device_put(1.0, devices[4]),
    }
    loss, grads = make_dataflow_step(*functions, timeline, topology, [devices[3]] * 3)(params, ones, 0 * ones)
    assert float(loss) == (2 * 3 + 2 * 5) / 2
    assert [float(g) for g in grads["stages"]] == [4.0, 1.0, 1.0]
    assert [g.device for g in grads["stages"]] == devices[5:8] and grads["stages"][0].dtype == jnp.bfloat16
    assert float(grads["embed"]) == float(grads["head"]) == 8.0


def test_bad_arguments():
    timeline = simulate([(0, 1)] * 2, Topology([[0], [1]]), Costs(np.ones((2, 2)), compute=1.0)).timeline
    topology, devices = Topology([[0], [1]]), jax.devices()[:1] * 2

    def build(timeline=timeline, devices=devices, **kwargs):
        return make_dataflow_step(
            lambda w, x: x, lambda e, t: t, lambda h, x, y: x.sum(), timeline, topology, devices, **kwargs
        )

    with pytest.raises(ValueError, match="1 devices; the topology has 2 nodes"):
        build(devices=devices[:1])
    with pytest.raises(ValueError, match=r"the timeline is of microbatches \[1\]"):
        build([work for work in timeline if work.microbatch == 1])
    with pytest.raises(ValueError, match=r"microbatch 0 does not go along \(0, 1\) and back"):
        build([work for work in timeline if (work.microbatch, work.kind) != (0, "H")])
    with pytest.raises(ValueError, match="grad_norm is 'mean'"):
        build(grad_norm="mean")
    step, ones = build(), jnp.ones((2, 1))
    with pytest.raises(ValueError, match="the paths are of 2 microbatches"):
        step({"embed": 1.0, "stages": [1.0, 1.0], "head": 1.0}, ones[:1], ones)
    with pytest.raises(ValueError, match="parameters of 1 stages; there are 2"):
        step({"embed": 1.0, "stages": [1.0], "head": 1.0}, ones, ones)
