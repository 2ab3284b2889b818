import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.pipeline import Topology, compile_table, make_train_step, stack_stages, stage_mesh

VOCABULARY, WIDTH, ROWS, LENGTH = 11, 8, 2, 5
FOUR_BY_TWO = Topology([[0, 1], [2, 3], [4, 5], [6, 7]])
SHUFFLED = Topology([[5, 2], [7, 0], [1, 4], [3, 6]])
UNEQUAL = Topology([[3, 0, 6], [5, 1, 7], [2, 4]])  # groups of three: the chain of replicas is longer than a pair
CASES = {
    "full": (FOUR_BY_TWO, [(0, 2, 4, 6), (1, 3, 5, 7)] * 4),
    "skipped": (FOUR_BY_TWO, [(0, 2, 4), (1, 5, 7), (0, 2, 6), (1, 3, 5)] * 2),
    "swapped": (FOUR_BY_TWO, [(0, 4, 2), (1, 5, 3), (0, 6, 4), (1, 3, 7, 5)] * 2),
    "renumbered": (SHUFFLED, [(5, 7, 4), (2, 4, 7), (5, 0, 6), (2, 1, 3, 0)] * 2),
    "unequal": (UNEQUAL, [(3, 5), (0, 1, 2), (6, 4, 7), (3, 2, 1), (0, 7), (6, 5, 4)]),
}


def embed_fn(embed, tokens):
    return embed[tokens]


def stage_fn(stage, x):
    return x + jnp.tanh(x @ stage["in"]) @ stage["out"]


def head_loss_fn(head, x, targets):
    log_p = jax.nn.log_softmax(x @ head)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()


def problem(topology, paths):
    rng = np.random.default_rng(0)
    stages = {
        name: jnp.asarray(rng.normal(0, 0.5, (len(topology.stages), WIDTH, WIDTH)), jnp.float32)
        for name in ("in", "out")
    }
    params = {
        "embed": jnp.asarray(rng.normal(0, 1, (VOCABULARY, WIDTH)), jnp.float32),
        "stages": stages,
        "head": jnp.asarray(rng.normal(0, 0.3, (WIDTH, VOCABULARY)), jnp.float32),
    }
    tokens, targets = rng.integers(0, VOCABULARY, (2, len(paths), ROWS, LENGTH))
    return params, jnp.asarray(tokens, jnp.int32), jnp.asarray(targets, jnp.int32)


def reference(topology, paths):
    """The mean loss of the same paths on one device; parameters of stages are [S, ...]."""

    def loss(params, tokens, targets):
        total = 0.0
        for path, t, y in zip(paths, tokens, targets, strict=True):
            x = embed_fn(params["embed"], t)
            for node in path:
                x = stage_fn(jax.tree.map(lambda a, s=topology.stage_of[node]: a[s], params["stages"]), x)
            total += head_loss_fn(params["head"], x, y)
        return total / len(paths)

    return loss


def run(topology, paths, order, **kwargs):
    params, tokens, targets = problem(topology, paths)
    mesh = jax.make_mesh((8,), ("node",), axis_types=(AxisType.Auto,))
    step = make_train_step(stage_fn, embed_fn, head_loss_fn, compile_table(paths, topology, order), mesh, **kwargs)
    shard = NamedSharding(mesh, P("node"))
    placed = params | {"stages": jax.device_put(stack_stages(params["stages"], topology), shard)}
    loss, grads = jax.jit(step)(placed, tokens, targets)
    expected = jax.jit(jax.value_and_grad(reference(topology, paths)))(params, tokens, targets)
    return loss, grads, *expected


def check_close(got, want):
    """1e-5 of the largest entry: float32, sums in another order."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1e-3))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("case", "order", "grad_norm"),
    [("renumbered", "1f1b", "visits"), pytest.param("swapped", "gpipe", "total", marks=pytest.mark.slow)],
)
def test_replicas_along_an_axis_of_their_own(case, order, grad_norm):
    """Parameters without copies; nodes need not be numbered by stages."""
    topology, paths = CASES[case]
    params, tokens, targets = problem(topology, paths)
    mesh = stage_mesh(topology)
    table = compile_table(paths, topology, order)
    step = make_train_step(stage_fn, embed_fn, head_loss_fn, table, mesh, ("stage", "replica"), grad_norm)
    placed = params | {"stages": jax.device_put(params["stages"], NamedSharding(mesh, P("stage")))}
    loss, grads = jax.jit(step)(placed, tokens, targets)
    expected_loss, expected = jax.jit(jax.value_and_grad(reference(topology, paths)))(params, tokens, targets)
    check_close(loss, expected_loss)
    assert grads["stages"]["in"].sharding.spec == P("stage")
    for stage in range(4):
        visits = sum(topology.stage_of[n] == stage for path in paths for n in path)
        factor = len(paths) / visits if grad_norm == "visits" else 1.0
        for name, got in grads["stages"].items():
            check_close(got[stage], factor * expected["stages"][name][stage])
    for name in ("embed", "head"):
        check_close(grads[name], expected[name])


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("case", "order", "grad_norm"),
    [
        ("swapped", "1f1b", "total"),
        ("unequal", "gpipe", "visits"),
        slow("full", "1f1b", "total"),
        slow("full", "gpipe", "total"),
        slow("skipped", "1f1b", "total"),
        slow("skipped", "gpipe", "visits"),
        slow("swapped", "gpipe", "total"),
        slow("unequal", "1f1b", "total"),
    ],
)
def test_gradients_are_those_of_one_device(case, order, grad_norm):
    topology, paths = CASES[case]
    loss, grads, expected_loss, expected = run(topology, paths, order, grad_norm=grad_norm)
    check_close(loss, expected_loss)
    assert grads["stages"]["in"].sharding.spec == P("node")
    for node, stage in enumerate(topology.stage_of):
        visits = sum(topology.stage_of[n] == stage for path in paths for n in path)
        factor = len(paths) / visits if grad_norm == "visits" else 1.0
        for name, got in grads["stages"].items():
            check_close(got[node], factor * expected["stages"][name][stage])
            np.testing.assert_array_equal(got[node], got[topology.stages[stage][0]])
    for name in ("embed", "head"):
        check_close(grads[name], expected[name])


def test_dtypes():
    """Gradients have those of the parameters, the loss is float32; the message is what the embedding gives."""
    topology = Topology([[0], [1]])
    params, tokens, targets = problem(topology, [(0, 1)])
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    mesh = Mesh(np.array(jax.devices()[:2]), ("node",))
    step = make_train_step(stage_fn, embed_fn, head_loss_fn, compile_table([(0, 1)], topology), mesh)
    loss, grads = jax.eval_shape(step, params, tokens, targets)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), grads) == jax.tree.map(lambda a: (a.shape, a.dtype), params)


def test_bad_arguments():
    topology = Topology([[0], [1]])
    table = compile_table([(0, 1)], topology)
    mesh = Mesh(np.array(jax.devices()[:2]), ("node",))
    build = functools.partial(make_train_step, stage_fn, embed_fn, head_loss_fn)
    with pytest.raises(ValueError, match=r"mesh \{'node': 3\}; axis 'node' takes 2 devices"):
        build(table, Mesh(np.array(jax.devices()[:3]), ("node",)))
    with pytest.raises(ValueError, match="axis 'stage' takes 2 devices"):
        build(table, mesh, axis="stage")
    with pytest.raises(ValueError, match=r"take 2 stages of one number of nodes, these have \[1, 1\]"):
        build(table, mesh, axis=("node", "replica"))
    with pytest.raises(ValueError, match=r"these have \[3, 3, 2\]"):
        build(compile_table(CASES["unequal"][1], UNEQUAL), stage_mesh(FOUR_BY_TWO), axis=("stage", "replica"))
    with pytest.raises(ValueError, match=r"stages \(\(0,\), \(1, 2\)\) on 8 devices"):
        stage_mesh(Topology([[0], [1, 2]]))
    with pytest.raises(ValueError, match="grad_norm is 'mean'; choose 'total' or 'visits'"):
        build(table, mesh, grad_norm="mean")
    params, tokens, targets = problem(topology, [(0, 1)])
    with pytest.raises(ValueError, match="the paths are of 1 microbatches"):
        build(table, mesh)(params, jnp.concatenate([tokens, tokens]), targets)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\); it begins with 2"):
        build(table, mesh)(params | {"stages": jax.tree.map(lambda a: a[:1], params["stages"])}, tokens, targets)
    wider = make_train_step(lambda s, x: jnp.concatenate([x, x]), embed_fn, head_loss_fn, table, mesh)
    with pytest.raises(ValueError, match=r"float32\[2, 5, 8\] to float32\[4, 5, 8\]; it must keep both"):
        wider(params, tokens, targets)
