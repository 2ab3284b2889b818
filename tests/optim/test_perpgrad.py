"""⊥Grad against a transcript of the official code, a peer package, and the traps of its method card."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.losses import stablemax_cross_entropy_with_integer_labels
from jaxskip.optim import orthogonalize_to_params, perp_grad
from jaxskip.training import Checkpoints


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return a @ b / np.sqrt(a @ a * (b @ b))


def official(w, g):
    """The authors' formula for one array, in float64."""
    w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
    o = g - np.sum(w * g) / (np.sum(w * w) + 1e-30) * w
    return o * np.sqrt(np.sum(g * g)) / (np.sqrt(np.sum(o * o)) + 1e-30)


def normals(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


# The rule


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([-6, 0, 6]), st.sampled_from([-6, 0, 6]))
def test_orthogonal_of_equal_norm_and_downhill(seed, w_exponent, g_exponent):
    """Card test 3, at any scale: |<o,w>| <= 1e-6 |g| |w|, equal norms to 1e-6, <o,g> > 0."""
    w, g = normals((7, 5), (7, 5), seed=seed)
    w, g = w * 10.0**w_exponent, g * 10.0**g_exponent
    o = orthogonalize_to_params(g, w)
    assert abs(cosine(o, w)) <= 1e-6
    np.testing.assert_allclose(jnp.linalg.norm(o), jnp.linalg.norm(g), rtol=1e-6)
    assert cosine(o, g) > 0
    np.testing.assert_allclose(o, official(w, g), rtol=1e-4, atol=1e-6 * 10.0**g_exponent)


def test_the_papers_formula_leaves_the_norm():
    """Equation 12 is the bare projection; the transcript is float64, so 1e-6 is float32 rounding."""
    w, g = normals((6, 4), (6, 4))
    bare = orthogonalize_to_params(g, w, rescale=False)
    np.testing.assert_allclose(bare, g - np.sum(w * g) / np.sum(w * w) * w, atol=1e-6)
    assert float(jnp.linalg.norm(bare)) < float(jnp.linalg.norm(g))


def test_scope_global_is_one_vector_for_all_leaves():
    """The paper's theta: orthogonal as a whole, not leaf by leaf; the norm that is restored is the global one."""
    w1, w2, g1, g2 = normals((5, 3), (4, 2), (5, 3), (4, 2))
    params, grads = {"a": w1, "b": w2}, {"a": g1, "b": g2}
    out = orthogonalize_to_params(grads, params, scope="global")
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    np.testing.assert_allclose(flat(out), official(flat(params), flat(grads)), rtol=1e-5, atol=1e-6)
    assert abs(cosine(out["a"], w1)) > 1e-3


@pytest.mark.parametrize(("axis", "moved"), [(-1, (2, 0, 1)), (0, (0, 1, 2)), ((0, 2), (0, 2, 1))])
def test_scope_axis_is_a_vector_per_slice(axis, moved):
    """One output unit of a kernel (-1), one layer of a stack (0), or both."""
    w, g = normals((3, 4, 2), (3, 4, 2))
    out = orthogonalize_to_params(g, w, scope="axis", axis=axis)
    kept = 1 if isinstance(axis, int) else len(axis)
    slices = [
        np.asarray(x).transpose(moved).reshape(-1, np.prod([x.shape[a] for a in moved[kept:]])) for x in (w, g, out)
    ]
    for w_row, g_row, out_row in zip(*slices, strict=True):
        np.testing.assert_allclose(out_row, official(w_row, g_row), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["leaf", "axis"])
def test_one_coordinate_passes_unchanged(scope):
    """Trap 2: projected and rescaled it would come out as plus or minus g, or zero, by rounding."""
    for w, g in ((0.3, 7.0), (-1.1, 1e-3)):
        for shape in ((), (1,), (1, 1)):
            out = orthogonalize_to_params(jnp.full(shape, g), jnp.full(shape, w), scope="leaf")
            np.testing.assert_array_equal(out, np.full(shape, g, np.float32))
    rows = jnp.array([0.2, -0.7, 3.0])
    if scope == "axis":
        np.testing.assert_array_equal(orthogonalize_to_params(2 * rows, rows, scope="axis"), 2 * rows)


def test_a_parallel_gradient_becomes_nothing_and_not_noise():
    """Trap 2: official rescaling returns the gradient itself for w = ones and a constant gradient."""
    w = jnp.ones(1000) * 0.1
    for dtype, bound in ((jnp.float32, 1e-4), (jnp.bfloat16, 1e-2)):
        g = (0.37 * w).astype(dtype)
        out = orthogonalize_to_params(g, w.astype(dtype)).astype(jnp.float32)
        assert float(jnp.linalg.norm(out)) <= bound * float(jnp.linalg.norm(g.astype(jnp.float32)))
    (noise,) = normals((1000,))
    nearly = w + 1e-6 * noise  # rounding noise would be blown up by 1e5
    assert float(jnp.linalg.norm(orthogonalize_to_params(nearly, w))) < 1e-4
    blown_up = orthogonalize_to_params(nearly, w, min_ratio=0.0)
    np.testing.assert_allclose(jnp.linalg.norm(blown_up), jnp.linalg.norm(nearly), rtol=1e-4)


def test_zero_weights_pass_the_gradient():
    """Trap 3 and card test 5."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        g = normals((4, 3))[0].astype(dtype)
        np.testing.assert_array_equal(orthogonalize_to_params(g, jnp.zeros_like(g)), g)


def test_zero_and_vanishing_gradients():
    """Squares of 1e-25 are below float32: then the norm cannot be restored, but the direction is not lost."""
    w, g = normals((4, 3), (4, 3))
    np.testing.assert_array_equal(orthogonalize_to_params(jnp.zeros_like(g), w), 0)
    tiny = orthogonalize_to_params(1e-25 * g, w)
    assert cosine(tiny, official(w, g)) > 0.999


def test_long_bf16_vectors_are_summed_in_float32():
    """Trap 3: a bfloat16 sum of 2^16 products stalls at 256; the cosine left over is that of rounding the result."""
    w, g = (x.astype(jnp.bfloat16) for x in normals((2**16,), (2**16,)))
    g = g + w
    out = orthogonalize_to_params(g, w)
    assert out.dtype == jnp.bfloat16
    assert cosine(g.astype(jnp.float32), w.astype(jnp.float32)) > 0.5
    assert abs(cosine(out.astype(jnp.float32), w.astype(jnp.float32))) < 1e-3


# As a transformation


def homogeneous_net(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def trained_net():
    """A ReLU net without biases past 100 % training accuracy, and the gradient of its loss there."""
    x, first, second = normals((24, 6), (6, 16), (16, 4))
    labels = jnp.arange(24) % 4
    params = {"first": first, "second": second}
    tx = optax.adam(0.03)
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(homogeneous_net(p, x), labels).mean()  # noqa: E731

    @jax.jit
    def train(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = jax.lax.scan(body, (params, tx.init(params)), length=500)[0][0]
        return params, jax.grad(loss)(params), (homogeneous_net(params, x).argmax(-1) == labels).mean()

    return train(params)


def test_a_homogeneous_net_past_perfect_accuracy():
    """Card test 4: what only scales the logits is there before and gone after, by leaf and for theta as a whole."""
    params, grads, accuracy = trained_net()
    assert accuracy == 1
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    assert cosine(flat(grads), flat(params)) < -0.2
    by_leaf = orthogonalize_to_params(grads, params)
    assert all(abs(cosine(by_leaf[name], params[name])) < 1e-6 for name in params)
    whole = orthogonalize_to_params(grads, params, scope="global")
    assert abs(cosine(flat(whole), flat(params))) < 1e-6


def test_a_scale_invariant_layer_is_left_alone():
    """Trap 4: before a normalisation g is orthogonal to w already; 1e-5 is the rounding of that gradient."""
    x, w = normals((10, 6), (6, 4))
    loss = lambda w: jnp.sum(jnp.tanh(x @ w / jnp.linalg.norm(w)))  # noqa: E731
    g = jax.grad(loss)(w)
    np.testing.assert_allclose(orthogonalize_to_params(g, w), g, rtol=1e-4, atol=1e-5)


def test_the_weights_only_grow():
    """Trap 4: ||w - a o||² = ||w||² + a² ||o||², to float32 rounding."""
    w, g = normals((6, 4), (6, 4))
    o = orthogonalize_to_params(g, w)
    np.testing.assert_allclose(jnp.sum((w - 0.5 * o) ** 2), jnp.sum(w**2) + 0.25 * jnp.sum(o**2), rtol=1e-6)


def test_the_default_mask_takes_matrices_only():
    """Trap 2: biases, gates and normalisation scales pass; mask=... takes what it names."""
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "gate": jnp.ones(())}
    grads = jax.tree.map(lambda p: 3.0 * p, params)
    out, _ = perp_grad().update(grads, perp_grad().init(params), params)
    np.testing.assert_allclose(out["kernel"], 0, atol=1e-5)
    np.testing.assert_array_equal(out["bias"], grads["bias"])
    np.testing.assert_array_equal(out["gate"], grads["gate"])
    everything = perp_grad(mask=lambda p: jax.tree.map(lambda _: True, p))
    out, _ = everything.update(grads, everything.init(params), params)
    np.testing.assert_allclose(out["bias"], 0, atol=1e-5)
    named = perp_grad(mask={"kernel": False, "bias": True, "gate": False})
    out, _ = named.update(grads, named.init(params), params)
    np.testing.assert_array_equal(out["kernel"], grads["kernel"])


def test_it_acts_on_the_accumulated_gradient():
    """Trap 9: projecting every micro-batch and averaging would restore the wrong norm."""
    w, g1, g2 = normals((5, 3), (5, 3), (5, 3))
    tx = optax.MultiSteps(optax.chain(perp_grad(), optax.sgd(1.0)), 2)
    _, state = tx.update(g1, tx.init(w), w)
    updates, _ = tx.update(g2, state, w)
    np.testing.assert_allclose(updates, -official(w, (g1 + g2) / 2), rtol=1e-4, atol=1e-6)


def test_clip_comes_first_and_the_norm_survives():
    w, g = normals((5, 3), (5, 3))
    tx = optax.chain(optax.clip_by_global_norm(0.1), perp_grad(), optax.sgd(1.0))
    updates, _ = tx.update(g, tx.init(w), w)
    np.testing.assert_allclose(jnp.linalg.norm(updates), 0.1, rtol=1e-5)


def test_inject_hyperparams_and_apply_if_finite():
    w, g = normals((5, 3), (5, 3))
    tx = optax.apply_if_finite(optax.inject_hyperparams(perp_grad)(min_ratio=1e-3, rescale=False), 3)
    step = jax.jit(tx.update)
    out, state = step(g, tx.init(w), w)
    np.testing.assert_allclose(out, orthogonalize_to_params(g, w, rescale=False), rtol=1e-5, atol=1e-7)
    out, state = step(g * jnp.nan, state, w)
    np.testing.assert_array_equal(out, 0)
    assert int(state.total_notfinite) == 1


def test_vmap_over_seeds_is_separate_runs():
    ws, gs = normals((3, 5, 4), (3, 5, 4))
    together = jax.jit(jax.vmap(orthogonalize_to_params))(gs, ws)
    for w, g, out in zip(ws, gs, together, strict=True):
        np.testing.assert_allclose(out, orthogonalize_to_params(g, w), rtol=1e-5, atol=1e-7)


@pytest.mark.multidevice
@pytest.mark.parametrize("scope", ["leaf", "global", "axis"])
def test_sharded_over_eight_devices(scope):
    """Card test 8: eight devices, both axes of each leaf split, give the result of one (1e-5: order of the sums)."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"a": (8, 6), "b": (16, 4), "c": (4, 8)}
    params = dict(zip(shapes, normals(*shapes.values()), strict=True))
    grads = dict(zip(shapes, normals(*shapes.values(), seed=1), strict=True))
    sharding = NamedSharding(mesh, P("data", "tensor"))
    f = jax.jit(lambda g, p: orthogonalize_to_params(g, p, scope=scope))
    one = f(grads, params)
    many = f(*jax.device_put((grads, params), sharding))
    for name in shapes:
        assert many[name].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-6)


def test_checkpoints(tmp_path):
    """⊥AdamW through Orbax: the restored run goes on as if it had not stopped."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), perp_grad(), optax.adamw(0.1))
    w, g = normals((5, 3), (5, 3))
    step = jax.jit(lambda w, s: tx.update(jnp.sin(w) * g, s, w))
    _, state = step(w, tx.init(w))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": w, "opt": state}, {})
        _, restored, _ = checkpoints.restore({"w": jnp.zeros_like(w), "opt": tx.init(w)})
    np.testing.assert_array_equal(step(w, state)[0], step(restored["w"], restored["opt"])[0])


@pytest.mark.slow
def test_perp_sgd_with_stablemax_in_float64():
    """The paper's ⊥SGD row computes in float64: nothing on the way may fall back to float32."""
    from tests.losses.test_stablemax import x64

    with x64():
        w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
        x = jnp.asarray(np.random.default_rng(1).normal(size=(12, 6)))
        loss = lambda w: stablemax_cross_entropy_with_integer_labels(x @ w, jnp.arange(12) % 4).mean()  # noqa: E731
        g = jax.grad(loss)(w)
        out = orthogonalize_to_params(g, w)
        assert out.dtype == g.dtype == jnp.float64
        assert abs(cosine(out, w)) < 1e-15
        np.testing.assert_allclose(out, official(w, g), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.peer
def test_parity_with_the_pytorch_port():
    """Card test 6: OrthoGrad(SGD) of pytorch_optimizer 3.9.0, 20 steps on a two-layer MLP, rtol 1e-5."""
    torch = pytest.importorskip("torch")
    ortho_grad = pytest.importorskip("pytorch_optimizer").OrthoGrad
    x, first, second = normals((12, 5), (8, 5), (3, 8))
    labels = np.arange(12) % 3
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(w))) for w in (first, second)]
    peer = ortho_grad(torch.optim.SGD(theirs, lr=0.1, momentum=0.8))
    params = (first, second)
    tx = optax.chain(perp_grad(min_ratio=0.0), optax.sgd(0.1, momentum=0.8))

    def loss(params):
        logits = jax.nn.relu(x @ params[0].T) @ params[1].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(20):
        peer.zero_grad()
        logits = torch.relu(torch.tensor(np.asarray(x)) @ theirs[0].T) @ theirs[1].T
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        peer.step()
        params, state = step(params, state)
    for ours, their in zip(params, theirs, strict=True):
        np.testing.assert_allclose(ours, their.detach().numpy(), rtol=1e-5, atol=1e-6)


# Errors


def test_errors():
    w = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="scope='rows'"):
        perp_grad(scope="rows")
    with pytest.raises(ValueError, match="scope='rows'"):
        orthogonalize_to_params(w, w, scope="rows")
    with pytest.raises(ValueError, match="axis=2, but an array of the tree has 2 axes"):
        orthogonalize_to_params(w, w, scope="axis", axis=2)
    with pytest.raises(ValueError, match=r"'w'.* the gradient has shape \(2, 3\), the params \(2, 1\)"):
        orthogonalize_to_params({"w": w}, {"w": w[:, :1]})
    with pytest.raises(ValueError, match="grads and params differ"):
        orthogonalize_to_params({"w": w}, {"v": w})
    with pytest.raises(ValueError, match="pass `params`"):
        perp_grad().update(w, perp_grad().init(w))
