"""Fira against transcripts of the paper and of the official code, its peers, and the traps of its method card."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.models import Decoder, decoder_config
from jaxskip.optim import (
    FiraState,
    fira,
    limit_norm_growth,
    low_rank_mask,
    refresh_projection,
    scale_by_fira,
)
from jaxskip.training import Checkpoints, make_mesh

SHAPES = {"tall": (16, 8), "wide": (8, 16), "square": (8, 8)}
STEPS = 9


def gradients(shape, steps=STEPS, seed=0):
    """A sequence in which one gradient is six times the others."""
    grads = np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)
    grads[5 % steps] *= 6
    return grads


GRADS = {name: gradients(shape) for name, shape in SHAPES.items()}


def matrices(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def run(tx, grads, params=None):
    """The directions [steps, ...] and the last state; one scan under jit."""
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads) if params is None else params

    def body(state, grad):
        direction, state = tx.update(grad, state, params)
        return state, direction

    state, directions = jax.jit(lambda g: jax.lax.scan(body, tx.init(params), g))(grads)
    return directions, state


@functools.cache
def all_directions(**kwargs):
    return run(scale_by_fira(rank=3, mask=matrices, **kwargs), GRADS)


def directions(shape, **kwargs):
    """What one shape gets; the three share a program, which is what costs time here."""
    return all_directions(**kwargs)[0][shape]


def first_projection(grad):
    """The subspace's basis in float64; its signs do not matter before the first switch."""
    return np.linalg.svd(grad.astype(np.float64), full_matrices=False)[0][:, :3]


def transcript(
    grads,
    *,
    variant="official",
    scaling="column",
    base="adam",
    gap=200,
    alpha=0.25,
    gamma=1.01,
    b2=0.999,
    layout="flax",
):
    """The rule in float64, one matrix, written down from the card for the left side."""
    rows, columns = grads.shape[1:]
    if rows > columns or (rows == columns and layout == "torch"):
        turned = transcript(grads.swapaxes(1, 2), variant=variant, scaling=scaling, base=base, gap=gap, alpha=alpha,
                            gamma=gamma, b2=b2)  # fmt: skip
        return turned.swapaxes(1, 2)
    m = v = 0.0
    s, out = None, []
    for t, g in enumerate(grads.astype(np.float64)):
        if t % gap == 0:
            p = np.linalg.svd(g, full_matrices=False)[0][:, :3]
            p = p * np.sign(p[np.argmax(np.abs(p), axis=0), np.arange(3)])
        r = p.T @ g
        m = 0.9 * m + 0.1 * r
        v = v + r * r if base == "adagrad" else b2 * v + (1 - b2) * r * r
        n = (m if base == "adam" else r) / (np.sqrt(v) + 1e-6)
        bias = np.sqrt(1 - b2 ** (t + 1)) / (1 - 0.9 ** (t + 1)) if base == "adam" else 1.0
        if variant == "paper":
            n = bias * n
        axis = 0 if scaling == "column" else None
        phi = 1.0 if scaling == "none" else np.linalg.norm(n, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        rest = phi * (g - (alpha if variant == "official" else 1.0) * p @ r)
        norm = np.linalg.norm(rest)
        factor = 1.0 if s is None else gamma / max(norm / (s + 1e-8), gamma)
        rest, s = rest * factor, norm * factor
        out.append(bias * (alpha * p @ n + rest) if variant == "official" else alpha * (p @ n + rest))
    return np.stack(out)


# The rule


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "paper"},
        {"gap": 4},
        pytest.param({"scaling": "matrix", "gap": 4}, marks=pytest.mark.slow),
        pytest.param({"scaling": "none", "variant": "paper", "gap": 4}, marks=pytest.mark.slow),
        pytest.param({"base": "rmsprop", "b2": 0.9}, marks=pytest.mark.slow),
        pytest.param({"base": "adagrad", "gap": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_transcripts(shape, options):
    """Card test 1 for both variants, every scaling and base, with and without switches; 1e-5 is float32 SVD noise."""
    named = {"update_proj_gap" if key == "gap" else key: value for key, value in options.items()}
    wanted = transcript(GRADS[shape], **options)
    np.testing.assert_allclose(directions(shape, **named), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_official_steps_to_the_sixth_decimal(shape):
    """Card test 1: weights after nine steps of 0.01, without a switch, <= 1e-6."""
    ours = 0.01 * directions(shape).sum(0)
    np.testing.assert_allclose(ours, 0.01 * transcript(GRADS[shape]).sum(0), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_side", ["short", "long", "left", "right"])
def test_parity_with_fira_1_0_2(shape, proj_side):
    """Card test 1 against the authors' package (torch layout, no switch: its signs are LAPACK's), weights <= 1e-6."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("fira")
    names = {"short": "std", "long": "reverse_std"}
    weight = torch.nn.Parameter(torch.zeros(SHAPES[shape]))
    group = {"params": [weight], "rank": 3, "update_proj_gap": 200, "alpha": 0.25}
    peer = package.FiraAdamW(
        [{**group, "proj_type": names.get(proj_side, proj_side)}], lr=0.01, no_deprecation_warning=True
    )
    for grad in GRADS[shape]:
        weight.grad = torch.tensor(grad)
        peer.step()
    ours = -0.01 * directions(shape, proj_side=proj_side, layout="torch").sum(0)
    np.testing.assert_allclose(ours, weight.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_is_optax_galore_on_its_side(shape):
    """Card test 4 and trap 3: Optax projects the long side; eps sits elsewhere, so it is made idle. 1e-5: rounding."""
    peer = optax.contrib.scale_by_galore(3, 4, 0.25, optax.scale_by_adam(eps=1e-30))
    # Of a square matrix Optax projects the left side.
    side = "left" if shape == "square" else "long"
    options = {"rule": "galore", "proj_side": side, "update_proj_gap": 4, "eps": 1e-30, "signs": "none"}
    np.testing.assert_allclose(directions(shape, **options), run(peer, GRADS[shape])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_without_the_rest_it_is_galore(variant):
    """Card test 4: gamma = inf, phi = 1; the rest, which is then known in closed form, is all that differs."""
    options = {"variant": variant, "update_proj_gap": 4}
    g = GRADS["wide"][0]
    p = first_projection(g)
    both = directions("wide", scaling="none", gamma=math.inf, **options)[0]
    galore = directions("wide", rule="galore", **options)[0]
    bias = math.sqrt(1 - 0.999) / (1 - 0.9)
    rest = bias * (g - 0.25 * p @ p.T @ g) if variant == "official" else 0.25 * (g - p @ p.T @ g)
    np.testing.assert_allclose(both - galore, rest, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_only_scaling():
    """Equation 11: phi(R) G, here without the limiter."""
    grads = GRADS["wide"]
    got = directions("wide", rule="only_scaling", gamma=math.inf, variant="paper")
    p = first_projection(grads[0])
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        r = p.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        n = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
        phi = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        np.testing.assert_allclose(got[t - 1], phi * g, rtol=1e-4, atol=1e-5)


def test_full_rank_is_the_base_rule():
    """Card test 4 and trap 7: no residual of an alpha that is not 1, but plain Adam, also for what is not projected.

    Optax adds eps after bias correction, so it is made idle; 1e-5 is rounding.
    """
    grads = {"w": GRADS["tall"], "b": GRADS["wide"][:, 0]}
    got, state = run(scale_by_fira(rank=8, mask=matrices, eps=1e-30), grads)
    wanted, _ = run(optax.scale_by_adam(eps=1e-30), grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)
    assert not jax.tree.leaves(state.proj) and state.mu["w"].shape == SHAPES["tall"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rest_is_orthogonal_to_the_subspace(shape):
    """Card test 2 (paper variant): |Pᵀ S| <= 1e-5 |S| and PᵀP = I to 1e-5."""
    rest = directions(shape, variant="paper") - directions(shape, variant="paper", rule="galore")
    p = all_directions(variant="paper")[1].proj[shape]
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-5)
    inside = rest @ p if shape == "tall" else p.T @ rest
    # A float32 subtraction leaves 1e-7 of the larger part inside the subspace, here about as large as the rest.
    assert np.all(np.linalg.norm(inside, axis=(1, 2)) <= 1e-5 * np.linalg.norm(rest, axis=(1, 2)))


def test_square_kernels_follow_the_layout():
    """Card test 6: torch's [out, in] projected on the right is Flax's [in, out] projected on the left."""
    flax = directions("square", update_proj_gap=4)
    tx = scale_by_fira(rank=3, mask=matrices, layout="torch", update_proj_gap=4)
    torch, state = run(tx, GRADS["square"].swapaxes(1, 2))
    np.testing.assert_allclose(torch.swapaxes(1, 2), flax, rtol=1e-4, atol=1e-5)
    assert state.nu.shape == (8, 3)
    for shape in ("tall", "wide"):
        shapes = [x.shape for x in jax.tree.leaves(tx.init(GRADS[shape][0]))]
        assert shapes == [x.shape for x in jax.tree.leaves(scale_by_fira(rank=3, mask=matrices).init(GRADS[shape][0]))]


def test_learning_rates_do_not_carry_over():
    """Trap 1: the official rest is not multiplied by alpha, so its share is about 1 / alpha times the paper's."""
    shares = {}
    galore = directions("wide", variant="paper", rule="galore")  # the variants share this part
    for variant in ("official", "paper"):
        shares[variant] = np.linalg.norm(directions("wide", variant=variant) - galore) / np.linalg.norm(galore)
    assert 3 < shares["official"] / shares["paper"] < 6


def test_weight_decay_is_optax_s():
    params = jnp.full(4, 2.0)
    plain, decayed = fira(0.1, mask=False), fira(0.1, mask=False, weight_decay=0.5)
    (a, _), (b, _) = (tx.update(jnp.ones(4), tx.init(params), params) for tx in (plain, decayed))
    np.testing.assert_allclose(b - a, -0.1 * 0.5 * 2.0, rtol=1e-4)


# The limiter


limited = jax.jit(lambda gamma, u, state: limit_norm_growth(gamma).update(u, state))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 1e4), min_size=5, max_size=5),
    st.sampled_from([1.0, 1.01, 1.5]),
)
def test_norms_grow_by_gamma_at_most(sizes, gamma):
    """Card test 3: s_t <= gamma s_{t-1}, up to eps; a norm that shrinks is left alone; zeros do not move s."""
    state, before = limit_norm_growth().init(jnp.ones(4)), 0.0
    for size in sizes:
        updates, state = limited(gamma, jnp.full(4, size / 2), state)
        after = float(np.linalg.norm(updates))
        np.testing.assert_allclose(state.norm, after if size > 0 else before, rtol=1e-6)
        if before == 0 or 0 < size <= before:
            np.testing.assert_allclose(after, size, rtol=1e-6)
        else:
            assert after <= gamma * (before + 1e-8) * (1 + 1e-6)
        before = float(state.norm)


def test_the_norm_of_fira_s_rest_grows_by_gamma_at_most():
    """Card test 3 (paper variant, where the rest can be read off): and the limiter acts, the spike included."""
    rest = directions("wide", variant="paper") - directions("wide", variant="paper", rule="galore")
    norms = np.linalg.norm(rest, axis=(1, 2))
    growth = norms[1:] / norms[:-1]
    # 1e-5: the rest is a difference of float32 numbers here.
    assert norms[0] > 0 and np.all(growth <= 1.01 * (1 + 1e-5)) and np.any(growth > 1.0099)


@pytest.mark.parametrize("floor", [None, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_a_zero_gradient_does_not_lock_the_limiter(floor):
    """Trap 2 and card test 5, at the first update and later: 54 steps on, the authors' rest is 1e-7 of what it was.

    What still locks is a rest that all but vanishes for once, here to float32 rounding; the floor frees it.
    """
    grads = np.stack([gradients((8, 16), 12)] * 4, axis=1)
    grads[0, 1] = grads[3, 2] = 0.0
    p = first_projection(grads[0, 3])
    grads[3, 3] = p @ p.T @ grads[3, 3]
    _, state = run(scale_by_fira(rank=3, mask=matrices, variant="paper", limiter_floor=floor), grads)
    share = np.asarray(state.norm)[1:] / state.norm[0]
    assert np.all(share[:2] > 0.3)
    assert (share[2] < 1e-6 and state.peak is None) if floor is None else share[2] > 1e-4


def test_the_limiter_alone_in_a_chain():
    """Per leaf and global; gamma = inf changes nothing; bf16 updates stay bf16."""
    grads = {"a": jnp.array([[1.0], [10.0], [10.0]]), "b": jnp.array([[4.0], [4.0], [1.0]])}
    per_leaf, _ = run(optax.chain(limit_norm_growth(2.0), optax.sgd(1.0)), grads)
    np.testing.assert_allclose(per_leaf["a"][:, 0], [-1, -2, -4], rtol=1e-6)
    np.testing.assert_allclose(per_leaf["b"], -grads["b"], rtol=1e-6)
    together, state = run(limit_norm_growth(2.0, per_leaf=False), grads)
    scale = 2 * math.hypot(1, 4) / math.hypot(10, 4)
    np.testing.assert_allclose(together["a"][1, 0], 10 * scale, rtol=1e-6)
    assert state.norm.shape == ()
    free, _ = run(limit_norm_growth(math.inf), jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads))
    assert free["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(free["a"].astype(jnp.float32), grads["a"])


# The projection


@pytest.mark.parametrize("proj_side", ["short", pytest.param("long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("projector", ["eigh", "subspace"])
def test_projectors_find_the_svd_s_subspace(projector, proj_side):
    """Trap 4, for a slow SVD on TPU. Singular values 3 and 4 differ fourfold: 16 a round, 1e-3 after four refreshes."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (8, 16))
    grads = ((u * [40, 30, 20, 5, 4, 3, 2, 1]) @ v.T).astype(np.float32)
    state = scale_by_fira(rank=3, mask=matrices, proj_side=proj_side).init(grads)
    refresh = jax.jit(functools.partial(refresh_projection, projector=projector))
    assert "svd" not in str(jax.make_jaxpr(refresh)(grads, state))
    for _ in range(4):
        state = refresh(grads, state)
    got, wanted = np.asarray(state.proj), (u if proj_side == "short" else v)[:, :3]
    np.testing.assert_allclose(got.T @ got, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(got @ got.T, wanted @ wanted.T, atol=1e-3)


def test_signs():
    """Trap 4: with a sign rule a flipped SVD gives the same P, and "align" continues the old one."""
    grads = jnp.asarray(GRADS["wide"][0])
    tx = scale_by_fira(rank=3, mask=matrices, external_refresh=True)
    state = tx.init(grads)
    p = refresh_projection(grads, state).proj
    assert np.all(np.take_along_axis(np.asarray(p), np.argmax(np.abs(p), 0)[None], 0) > 0)
    np.testing.assert_allclose(refresh_projection(-grads, state).proj, p, atol=1e-6)
    flipped = p * jnp.array([[-1.0, 1.0, -1.0]])
    aligned = refresh_projection(grads, state._replace(proj=flipped), signs="align").proj
    np.testing.assert_allclose(aligned, flipped, atol=1e-6)
    raw = refresh_projection(grads, state, signs="none").proj
    np.testing.assert_allclose(np.abs(raw), np.abs(p), atol=1e-6)


def test_the_projection_changes_every_t_th_update_only():
    tx = scale_by_fira(rank=3, mask=matrices, update_proj_gap=4)
    state, changed = tx.init(jnp.zeros((8, 16))), []
    step = jax.jit(tx.update)
    for count, grad in enumerate(GRADS["wide"]):
        old, (_, state) = state.proj, step(grad, state)
        if not np.array_equal(old, state.proj):
            changed.append(count)
    assert changed == [0, 4, 8]
    assert step._cache_size() == 1


def test_refresh_outside_equals_inside():
    """Trap 5: the same numbers (1e-6), a hot step without the decomposition, each compiled once."""
    tx = scale_by_fira(rank=3, mask=matrices, update_proj_gap=4, external_refresh=True)
    assert "svd" not in str(jax.make_jaxpr(lambda g: tx.update(g, tx.init(g)))(jnp.ones((8, 16))))
    step = jax.jit(tx.update)
    refresh = jax.jit(refresh_projection, donate_argnums=1)
    state, got = tx.init(jnp.zeros((8, 16))), []
    np.testing.assert_array_equal(step(GRADS["wide"][0], state)[0], 0.0)  # forgotten: nothing moves
    for count, grad in enumerate(GRADS["wide"]):
        if count % 4 == 0:
            old = state.nu
            state = refresh(grad, state)
            assert old.is_deleted()
        direction, state = step(grad, state)
        got.append(direction)
    np.testing.assert_allclose(np.stack(got), directions("wide", update_proj_gap=4), rtol=1e-6, atol=1e-6)
    assert step._cache_size() == refresh._cache_size() == 1


@pytest.mark.slow
def test_stacked_layers_are_matrices_of_their_own():
    """Trap 9: [2, 8, 16] gives what its two layers give alone, the limiter included."""
    grads = np.stack([GRADS["wide"], gradients((8, 16), seed=1)], axis=1)
    stacked, state = run(scale_by_fira(rank=3, mask=matrices, update_proj_gap=4), grads)
    assert state.norm.shape == (2,) and state.proj.shape == (2, 8, 3)
    np.testing.assert_allclose(stacked[:, 0], directions("wide", update_proj_gap=4), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_stagger_renews_one_after_the_other():
    """Trap 5: all at the first update, then leaf or layer i at count = -i mod T."""
    tx = scale_by_fira(rank=3, mask=matrices, update_proj_gap=4, stagger=True)
    grads = {"a": GRADS["wide"], "b": np.stack([GRADS["tall"]] * 2, axis=1)}
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    step = jax.jit(lambda g, s: tx.update(g, s)[1])
    changed = {0: [], 1: [], 2: []}
    for count in range(STEPS):
        old, state = state.proj, step(jax.tree.map(lambda g: g[count], grads), state)  # noqa: B023
        pairs = [(old["a"], state.proj["a"]), *zip(old["b"], state.proj["b"], strict=True)]
        for i, (before, after) in enumerate(pairs):
            if not np.array_equal(before, after):
                changed[i].append(count)
    assert changed == {0: [0, 4, 8], 1: [0, 3, 7], 2: [0, 2, 6]}


@pytest.mark.slow
def test_max_scaling_bounds_a_dead_column():
    """Trap 8: a column of R that vanished for one step has phi = |N| / 1e-8."""
    grads = np.array(GRADS["wide"][:2])
    grads[1, :, 0] *= 1e-12
    free, _ = run(scale_by_fira(rank=3, mask=matrices, gamma=math.inf), grads)
    bound, _ = run(scale_by_fira(rank=3, mask=matrices, gamma=math.inf, max_scaling=10.0), grads)
    galore, _ = run(scale_by_fira(rank=3, mask=matrices, rule="galore"), grads)
    assert np.abs(free - galore)[1, :, 0].max() > 1e4 * np.abs(bound - galore)[1, :, 0].max()


# State and neighbours


def test_state_bytes():
    """Card test 8, exactly: m r + 2 n r + 1 numbers a matrix for Adam; GaLore has no norm, the other bases no mu."""
    params = {"w": jnp.zeros((5, 8, 16)), "v": jnp.zeros((24, 10)), "b": jnp.zeros(7)}

    def numbers(**kwargs):
        state = jax.eval_shape(scale_by_fira(rank=3, mask=matrices, **kwargs).init, params)
        leaves = jax.tree.leaves(state._replace(count=None))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
        return sum(leaf.size for leaf in leaves)

    adam = 5 * (8 * 3 + 2 * 16 * 3 + 1) + (10 * 3 + 2 * 24 * 3 + 1) + 2 * 7
    assert numbers() == adam
    assert numbers(rule="galore") == adam - 6
    assert numbers(limiter_floor=1e-3) == adam + 6
    assert numbers(base="rmsprop") == adam - (5 * 16 * 3 + 24 * 3 + 7)
    assert numbers(proj_side="long") == 5 * (16 * 3 + 2 * 8 * 3 + 1) + (24 * 3 + 2 * 10 * 3 + 1) + 2 * 7


def test_low_rank_mask_takes_kernels_only():
    """Stacked norms and biases have two axes too, and "attention_norm" has the word in its name."""
    model = Decoder(decoder_config("gpt2-tiny", vocab_size=64, use_bias=True))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    flat = jax.tree_util.tree_leaves_with_path(low_rank_mask(params))
    chosen = {jax.tree_util.keystr(path, simple=True, separator="/") for path, yes in flat if yes}
    attention = {f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert chosen == attention | {"layers/mlp/up/kernel", "layers/mlp/down/kernel"}
    query = jax.tree.leaves(low_rank_mask(params, include=("query",)))
    assert sum(query) == 1
    with pytest.raises(ValueError, match="no kernel has one of"):
        low_rank_mask(params, include=("experts",))


@pytest.mark.multidevice
def test_two_dimensional_mesh_gives_the_one_device_result():
    """Card test 7 and trap 6: W split along both axes and a stack, three steps, rtol 1e-5 (order of summation)."""
    mesh = make_mesh(1, 4, 2)
    params = {"up": jnp.zeros((2, 8, 16)), "b": jnp.zeros(16)}
    shardings = {"up": NamedSharding(mesh, P(None, "fsdp", "tensor")), "b": NamedSharding(mesh, P())}
    grads = [{"up": np.stack([GRADS["wide"][t]] * 2), "b": GRADS["wide"][t, 0]} for t in range(3)]
    tx = scale_by_fira(rank=3, mask=matrices, update_proj_gap=2)
    step = jax.jit(tx.update)

    def train(place):
        state, out = tx.init(place(params)), []
        first = state
        for grad in grads:
            direction, state = step(place(grad), state)
            out.append(direction)
        return out, first

    one, _ = train(lambda tree: tree)
    many, first = train(lambda tree: jax.device_put(tree, shardings))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), many, one)
    assert first.nu["up"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "tensor")), 3)


@pytest.mark.slow
def test_bf16_gradients_leave_a_float32_rest():
    """Trap 8: R holds nearly all of G; in bf16 the rest would be rounding, here it is good to 1e-4."""
    rng = np.random.default_rng(0)
    strong = 100 * rng.normal(size=(8, 1)) @ rng.normal(size=(1, 16))
    grads = jnp.asarray(strong + rng.normal(size=(8, 16)), jnp.bfloat16)
    options = {"rank": 1, "mask": matrices, "variant": "paper", "alpha": 1.0}
    got, state = run(scale_by_fira(**options), grads[None].astype(jnp.float32))
    low, low_state = run(scale_by_fira(**options), grads[None])
    assert low.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(low_state._replace(count=None))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(low_state.norm, state.norm, rtol=1e-4)
    np.testing.assert_allclose(low.astype(jnp.float32), got, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_vmap_over_seeds():
    """Each seed gets what it gets alone, and a vmap around the whole run keeps the branch that saves the SVD."""
    tx = scale_by_fira(rank=3, mask=matrices, update_proj_gap=4)
    runs = jax.vmap(lambda g: run(tx, g)[0])
    assert " cond[" in str(jax.make_jaxpr(runs)(jnp.zeros((2, STEPS, 8, 16))))
    got = runs(jnp.stack([GRADS["wide"], gradients((8, 16), seed=1)]))
    np.testing.assert_allclose(got[0], directions("wide", update_proj_gap=4), rtol=1e-5, atol=1e-6)


def wrapped(name):
    tx = fira(0.1, rank=3, mask=matrices, external_refresh=True)
    return {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), tx),
        "inject": lambda: optax.inject_hyperparams(fira, ("rank", "mask"))(
            0.1, rank=3, mask=matrices, external_refresh=True
        ),
        "multisteps": lambda: optax.MultiSteps(tx, 2),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
        "masked": lambda: optax.masked(tx, {"a": True, "b": False}),
    }[name]()


@pytest.mark.parametrize("name", ["chain", "inject", "multisteps", "apply_if_finite", "masked"])
def test_refresh_projection_finds_the_state_anywhere(name):
    grads = {"a": GRADS["wide"][0], "b": GRADS["tall"][0]}
    before = wrapped(name).init(grads)
    after = refresh_projection(grads, before)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    states = jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, FiraState))
    (state,) = (node for node in states if isinstance(node, FiraState))
    assert len(jax.tree.leaves(state.proj)) == (1 if name == "masked" else 2)
    np.testing.assert_allclose(state.proj["a"].T @ state.proj["a"], np.eye(3), atol=1e-5)


def test_not_finite_gradients_leave_the_projection_alone():
    tx = optax.apply_if_finite(fira(0.1, rank=3, mask=matrices, update_proj_gap=1), 5)
    params = jnp.zeros((8, 16))
    step = jax.jit(tx.update)
    _, state = step(GRADS["wide"][0], tx.init(params), params)
    updates, after = step(GRADS["wide"][1] * np.nan, state, params)
    np.testing.assert_array_equal(updates, 0.0)
    np.testing.assert_array_equal(after.inner_state[0].proj, state.inner_state[0].proj)


def test_checkpoint(tmp_path):
    """Orbax keeps count, moments, P and norm bit for bit, holes included."""
    tx = fira(0.1, rank=3, mask=matrices)
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}
    state = refresh_projection(jax.tree.map(lambda p: p + 1, params), tx.init(params))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        _, restored, _ = checkpoints.restore(tx.init(params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_an_explicit_mask_may_be_a_prefix():
    params = {"x": {"w": jnp.zeros((8, 16))}, "y": {"w": jnp.zeros((8, 16))}}
    state = scale_by_fira(rank=3, mask={"x": True, "y": False}).init(params)
    assert state.proj["x"]["w"].shape == (8, 3) and state.mu["y"]["w"].shape == (8, 16)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rank": 0},
        {"update_proj_gap": 0},
        {"update_proj_gap": 1.5},
        {"gamma": 0.99},
        {"b1": 1.0},
        {"b2": -0.1},
        {"eps": -1.0},
        {"scaling": "row"},
        {"variant": "arxiv"},
        {"rule": "apollo"},
        {"proj_side": "full"},
        {"layout": "nnx"},
        {"projector": "qr"},
        {"signs": "plus"},
        {"base": "sgd"},
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused(kwargs):
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        fira(1e-3, **kwargs)


def test_other_errors():
    vector = {"b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        scale_by_fira(mask={"b": True}).init(vector)
    with pytest.raises(TypeError, match="static_args"):
        fira(1e-3, rank=3.0)
    with pytest.raises(ValueError, match="no FiraState"):
        refresh_projection(vector, optax.adam(1e-3).init(vector))
    with pytest.raises(ValueError, match="projector='qr'"):
        refresh_projection(vector, scale_by_fira(mask=matrices).init(vector), projector="qr")
