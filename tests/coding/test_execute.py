"""Coded gradients of a small network against plain ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxskip.coding import (
    GC,
    MSGC,
    SRSGC,
    Emulation,
    UndecodableError,
    coded_value_and_grad,
    conforms_bursty,
    cyclic,
    drop,
    frc,
    place,
    random_stragglers,
    train_interleaved,
)

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(160, 5)).astype(np.float32), RNG.normal(size=(160, 2)).astype(np.float32)


def init(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"a": jax.random.normal(keys[0], (5, 8)), "b": jax.random.normal(keys[1], (8, 2))}


def losses(params, rows):
    x, y = rows
    return jnp.sum((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2, axis=1)


@jax.jit
def weighted(params, x, y, weights):
    return jax.value_and_grad(lambda p: weights @ losses(p, (x, y)))(params)


def compute(params, job, rows, weights):
    return weighted(params, X[rows], Y[rows], weights / len(X))


def close(got, wanted, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.max(np.abs(b)))


@pytest.mark.multidevice
def test_one_program_over_devices_gives_the_plain_gradient_for_every_straggler():
    params = init(0)
    plain = jax.value_and_grad(lambda p: jnp.mean(losses(p, (X, Y))))(params)
    mesh = jax.make_mesh((4,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
    traces = []

    def counted(params, rows):
        traces.append(1)
        return losses(params, rows)

    # 1e-6 of the card for exact codes; the cyclic code's |a| is about 10 here.
    for code, grid, rtol in ((frc(8, 1), mesh, 1e-6), (cyclic(8, 2), None, 1e-4)):
        traces.clear()
        step = coded_value_and_grad(counted, code, grid)
        chunks = place(code, (X, Y))
        for straggler in range(8):
            mask = np.arange(8) != straggler
            # What a straggler holds does not matter, not even NaN.
            broken = jax.tree.map(lambda x, m=mask: np.where(m.reshape(8, 1, 1, 1), x, np.nan).astype(x.dtype), chunks)
            close(step(params, broken, mask), plain, rtol)
        assert len(traces) == 1  # patterns are data
    with pytest.raises(UndecodableError, match="3 stragglers"):
        step(params, chunks, np.arange(8) > 2)


def test_codes_that_must_not_meet_these_parameters():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(0))
    code = cyclic(8, 1)
    with pytest.raises(ValueError, match="bfloat16.*lose their digits in a cyclic code made for float32"):
        coded_value_and_grad(losses, code)(half, place(code, (X, Y)), np.ones(8, bool))
    mesh = jax.make_mesh((3,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    with pytest.raises(ValueError, match="must divide"):
        coded_value_and_grad(losses, code, mesh)
    with pytest.raises(ValueError, match="160 rows does not split into 7"):
        place(frc(7, 0), (X, Y))


def test_dropping_is_the_mean_of_those_who_are_left():
    params, code = init(0), drop(8, 3)
    mask = np.arange(8) > 2
    got = coded_value_and_grad(losses, code)(params, place(code, (X, Y)), mask)
    wanted = jax.value_and_grad(lambda p: jnp.mean(losses(p, (X[60:], Y[60:]))))(params)
    close(got, wanted, 1e-6)


@pytest.mark.parametrize("scheme", [GC(8, 3), SRSGC(8, 1, 2, 6), MSGC(8, 1, 2, 3)], ids=str)
def test_interleaved_networks_train_as_without_stragglers(scheme):
    """Two networks with Adam under stragglers, their losses against those of plain training: 1e-5."""
    jobs, tx = 12, optax.adam(1e-2)
    update = jax.jit(tx.update)

    def apply(state, message, job):
        params, opt_state, history = state
        loss, grad = message
        updates, opt_state = update(grad, opt_state)
        return optax.apply_updates(params, updates), opt_state, [*history, float(loss)]

    def start():
        return [(init(seed), tx.init(init(seed)), []) for seed in (1, 2)]

    lam = getattr(scheme, "lam", 3)
    late = random_stragglers(lambda s: conforms_bursty(s, 1, 2, lam), 8, jobs + 1, seed=0)
    master = Emulation(compute, dataclasses.replace(scheme), jobs, len(X), late)
    coded = train_interleaved(master, start(), lambda state: state[0], apply)
    assert late.sum() > 10 and (not any(master.waited) or isinstance(scheme, GC))
    everything = np.arange(len(X)), np.ones(len(X), np.float32)
    for state, plain in zip(coded, start(), strict=True):
        for job in range(jobs // 2):
            plain = apply(plain, compute(plain[0], job, *everything), job)
        np.testing.assert_allclose(state[2], plain[2], rtol=1e-5)
        close(state[0], plain[0], 1e-4)  # Adam divides by the root of small numbers
        assert state[2][-1] < state[2][0]


def test_a_batch_that_does_not_split_evenly_loses_no_row():
    """7 rows for 12 units of data: some chunks are empty, the sum is still over all rows."""
    late = np.zeros((4, 4), bool)
    late[1, 1] = True
    scheme = MSGC(4, 1, 2, 1)
    master = Emulation(lambda p, job, rows, weights: weights @ np.eye(7)[rows], scheme, 3, 7, late)
    done = [item for number in range(1, 5) for item in master.step(number if number < 4 else None)]
    assert [job for job, _ in done] == [1, 2, 3]
    for _, gradient in done:
        np.testing.assert_array_equal(gradient, np.ones(7))


def test_bad_arguments():
    late = np.zeros((4, 4), bool)
    with pytest.raises(ValueError, match="1 networks under a delay of 1 rounds; it takes 2"):
        train_interleaved(Emulation(compute, MSGC(4, 1, 2, 1), 3, 8, late), [0], lambda s: s, lambda s, g, j: s)
    with pytest.raises(ValueError, match=r"take bool \[4, >= 5\]"):
        Emulation(compute, MSGC(4, 1, 2, 1), 4, 8, late)
    with pytest.raises(ValueError, match="jobs=0"):
        Emulation(compute, GC(4, 1), 0, 8, late)
    master = Emulation(compute, GC(4, 1), 1, 8, late)
    with pytest.raises(ValueError, match="round 1 of 1 jobs takes parameters"):
        master.step()
    used = GC(4, 1)
    used.report(np.ones(4, bool))
    with pytest.raises(ValueError, match="a fresh scheme"):
        Emulation(compute, used, 1, 8, late)
