"""Loads, and the promise: every pattern of the design model decodes in time, every other one is told to wait."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.coding import (
    GC,
    MSGC,
    SRSGC,
    Dropping,
    Emulation,
    UndecodableError,
    arbitrary_lower_bound,
    bursty_lower_bound,
    conforms_arbitrary,
    conforms_bursty,
    conforms_per_round,
    cyclic,
    random_stragglers,
)

CYCLIC = functools.partial(cyclic, dtype=np.float64)


@functools.lru_cache
def gradients(job):
    """Integers, so that the exact sum is known to the last bit: 720 rows of two numbers."""
    return np.random.default_rng(job).integers(-50, 50, (720, 2)).astype(np.float64)


def compute(params, job, rows, weights):
    assert params == job
    return weights @ gradients(job)[rows]


def check_run(scheme, late, jobs, tolerance):
    """Runs the pattern; every job comes once, within its delay, and with the exact gradient."""
    master = Emulation(compute, scheme, jobs, 720, late)
    seen = []
    for number in range(1, master.rounds + 1):
        for job, gradient in master.step(number if number <= jobs else None):
            assert number <= job + scheme.delay
            np.testing.assert_allclose(gradient, gradients(job).sum(axis=0), atol=tolerance)
            seen.append(job)
    assert sorted(seen) == list(range(1, jobs + 1)) and not master.pending
    return master


@pytest.mark.parametrize(
    ("scheme", "load", "delay"),
    [
        (GC(256, 15), 0.0625, 0),
        (GC(256, 0), 1 / 256, 0),
        (Dropping(256, 15), 1 / 256, 0),
        (SRSGC(256, 2, 3, 23), 0.05078125, 2),
        (MSGC(256, 1, 2, 27), 0.007543103448275862, 1),
        (MSGC(256, 1, 2, 9), 0.007102272727272727, 1),
        (MSGC(256, 3, 5, 256), 7 / (256 * 4), 6),
    ],
)
def test_loads_are_those_of_the_authors_files(scheme, load, delay):
    assert scheme.load == pytest.approx(load, rel=1e-15) and scheme.delay == delay


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 4), st.data())
def test_m_sgc_meets_the_lower_bound_at_both_ends_and_its_chunks_are_all_data(n, B, more, data):
    W = B + more
    for lam in (n - 1, n):
        assert MSGC(n, B, W, lam).load == pytest.approx(bursty_lower_bound(n, B, W, lam), rel=1e-12)
    lam = data.draw(st.integers(0, n))
    scheme = MSGC(n, B, W, lam)
    assert scheme.load >= bursty_lower_bound(n, B, W, lam) * (1 - 1e-12)
    size = n * (B + (W - 1) * (lam + 1)) if lam < n else n * (W - 1)
    assert scheme.chunk_shares.sum() == scheme.units == size
    assert SRSGC(n, B, B + 1, lam).load >= bursty_lower_bound(n, B, B + 1, lam) * (1 - 1e-12)


def test_lower_bounds():
    assert bursty_lower_bound(8, 2, 2, 3) == 1 / 5
    assert arbitrary_lower_bound(8, 1, 4, 8) == 4 / 24
    with pytest.raises(ValueError, match="no scheme gets through"):
        arbitrary_lower_bound(8, 1, 1, 8)
    with pytest.raises(ValueError, match="B=3; it must be at least 1, at most 2"):
        bursty_lower_bound(8, 3, 2, 1)


SETTINGS = [
    (GC(6, 1), lambda s: conforms_per_round(s, 1)),
    (GC(6, 3, CYCLIC), lambda s: conforms_per_round(s, 3)),
    (SRSGC(6, 1, 2, 4), lambda s: conforms_bursty(s, 1, 2, 4)),
    (SRSGC(6, 2, 3, 2, CYCLIC), lambda s: conforms_bursty(s, 2, 3, 2)),
    (SRSGC(6, 2, 5, 3), lambda s: conforms_per_round(s, 1)),
    (MSGC(6, 1, 2, 2), lambda s: conforms_bursty(s, 1, 2, 2)),
    (MSGC(6, 2, 3, 1), lambda s: conforms_bursty(s, 2, 3, 1)),
    (MSGC(6, 2, 4, 3, CYCLIC), lambda s: conforms_arbitrary(s, 2, 5, 3)),
    (MSGC(6, 2, 3, 6), lambda s: conforms_bursty(s, 2, 3, 6)),
    (MSGC(6, 1, 3, 5), lambda s: conforms_arbitrary(s, 1, 3, 5)),
    (MSGC(6, 1, 2, 0), lambda s: conforms_bursty(s, 1, 2, 0)),
]


@pytest.mark.parametrize(("scheme", "conforms"), SETTINGS, ids=lambda x: str(x) if not callable(x) else "")
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_conforming_stragglers_never_wait_and_change_no_gradient(scheme, conforms, seed):
    jobs = 6
    scheme = dataclasses.replace(scheme)
    late = random_stragglers(conforms, 6, jobs + scheme.delay, seed)
    # Float64: exact with weights 0 and 1, and the cyclic code's |a| of at most 1e3 times 1e-16 times sums of 1e4.
    master = check_run(scheme, late, jobs, 1e-7 if scheme.code is CYCLIC else 0)
    assert not any(master.waited)


@pytest.mark.parametrize("scheme", [case[0] for case in SETTINGS], ids=str)
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**31))
def test_any_stragglers_are_waited_for_where_they_must_be(scheme, seed):
    jobs = 6
    scheme = dataclasses.replace(scheme)
    late = np.random.default_rng(seed).random((6, jobs + scheme.delay)) < 0.4
    late[:, 1:5] = True  # beyond every model
    master = check_run(scheme, late, jobs, 1e-7 if scheme.code is CYCLIC else 0)
    assert any(master.waited)


def prefixes(scheme, conforms, rounds, late=()):
    """All conforming patterns up to a length, each with the scheme's state after it, and what comes one round later."""
    n = scheme.n
    if len(late) == rounds:
        return
    for bits in itertools.product((False, True), repeat=n):
        pattern = np.array([*late, bits]).T
        allowed = scheme.allows(~np.array(bits))
        yield pattern, conforms(pattern), allowed
        if allowed:
            copy = dataclasses.replace(scheme)
            for column in pattern.T:
                copy.report(~column)
            for job in range(1, copy.rounds - copy.delay + 1):
                copy.decode(job)  # raises if a promise is broken
            yield from prefixes(copy, conforms, rounds, (*late, bits))


@pytest.mark.parametrize(
    ("scheme", "conforms", "rounds"),
    [
        (GC(4, 1), lambda s: conforms_per_round(s, 1), 2),
        (SRSGC(3, 1, 2, 2, CYCLIC), lambda s: conforms_bursty(s, 1, 2, 2) or conforms_per_round(s, 1), 4),
        (SRSGC(2, 2, 3, 1), lambda s: conforms_bursty(s, 2, 3, 1) or conforms_per_round(s, 1), 6),
        (MSGC(2, 2, 3, 1), lambda s: conforms_bursty(s, 2, 3, 1) or conforms_arbitrary(s, 2, 4, 1), 6),
        (MSGC(3, 1, 2, 1, CYCLIC), lambda s: conforms_bursty(s, 1, 2, 1), 4),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_brute_force(scheme, conforms, rounds):
    """Whatever conforms is allowed, whatever is allowed decodes; one straggler too many is not allowed."""
    found = {True: 0, False: 0}
    for pattern, conforming, allowed in prefixes(scheme, conforms, rounds):
        found[allowed] += 1
        assert allowed or not conforming, pattern
        # Models of which one holds now and the other held before are allowed too, so only the first round decides.
        if pattern.shape[1] == 1:
            assert allowed == conforming
    assert found[True] > 4 and found[False] > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "conforms", "rounds"),
    [
        (SRSGC(3, 2, 3, 2, CYCLIC), lambda s: conforms_bursty(s, 2, 3, 2) or conforms_per_round(s, 1), 5),
        (SRSGC(3, 1, 2, 3, CYCLIC), lambda s: conforms_bursty(s, 1, 2, 3), 4),
        (MSGC(3, 2, 3, 2), lambda s: conforms_bursty(s, 2, 3, 2) or conforms_arbitrary(s, 2, 4, 2), 6),
        (MSGC(3, 1, 3, 3), lambda s: conforms_bursty(s, 1, 3, 3) or conforms_arbitrary(s, 1, 3, 3), 6),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_brute_force_longer(scheme, conforms, rounds):
    test_brute_force(scheme, conforms, rounds)


def test_reporting_a_pattern_beyond_the_model_raises_and_changes_nothing():
    scheme = MSGC(4, 1, 2, 1)
    scheme.report(np.array([False, True, True, True]))
    with pytest.raises(UndecodableError, match=r"round 2: MSGC\(.*cannot do without workers \[0\]; wait for more"):
        scheme.report(np.array([False, True, True, True]))
    assert scheme.rounds == 1
    with pytest.raises(UndecodableError, match="1 uncoded chunks are missing"):
        scheme.decode(1)
    with pytest.raises(UndecodableError, match="job 3 has not been started"):
        scheme.decode(3)


def test_the_tasks_of_m_sgc_round_by_round():
    """Four workers, B=1, W=2, lam=1: own chunk, then the lost one again or the group's coded pair."""
    scheme = MSGC(4, 1, 2, 1)
    assert scheme.assign()[2] == [(1, "first", (2,), (1.0,)), None]
    scheme.report(np.array([True, True, False, True]))
    tasks = scheme.assign()
    assert tasks[2] == [(2, "first", (2,), (1.0,)), (1, "repeat", (2,), (1.0,))]
    assert tasks[3] == [(2, "first", (3,), (1.0,)), (1, "coded", (6, 7), (1.0, 1.0))]
    scheme.report(np.ones(4, bool))
    assert scheme.decode(1) == {(1, 0, 0): 1, (1, 1, 0): 1, (2, 2, 1): 1, (1, 3, 0): 1, (2, 0, 1): 1, (2, 3, 1): 1}
    assert [slots[0] for slots in scheme.assign(last_job=2)] == [None] * 4  # no job beyond the last
    assert not scheme.idle(last_job=2)


def test_the_tasks_of_sr_sgc_round_by_round():
    """n=6, s=2: of four lost results the two lowest workers' are repeated, and the job decodes with n - s."""
    scheme = SRSGC(6, 1, 2, 4)
    assert scheme.tolerance == 2
    scheme.report(np.array([True, True, False, False, False, False]))
    assert not scheme.decodable(1) and not scheme.idle(last_job=1)
    kinds = [slots[0].kind for slots in scheme.assign()]
    assert kinds == ["first", "first", "repeat", "repeat", "first", "first"]
    assert [slots[0] is not None for slots in scheme.assign(last_job=1)] == [False, False, True, True, False, False]
    scheme.report(np.ones(6, bool))
    assert {key.round for key in scheme.decode(1)} == {1, 2}
    assert scheme.idle(last_job=2)  # two results of job 2 are missing, and s = 2


def test_a_wrong_size_is_told_when_tasks_are_first_needed():
    scheme = MSGC(256, 1, 2, 27)
    assert scheme.allows(np.ones(256, bool))
    with pytest.raises(ValueError, match="takes s = .*31.*not 27"):
        scheme.assign()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GC(4, 4), "s=4; it must be at least 0, at most 3"),
        (lambda: GC(0, 0), "n=0"),
        (lambda: SRSGC(4, 2, 4, 1), r"W=4 with B=2; W must be B \+ 1, 2 B \+ 1"),
        (lambda: SRSGC(4, 1, 1, 1), "W=1 with B=1"),
        (lambda: SRSGC(4, 1, 2, 5), "lam=5; it must be at least 0, at most 4"),
        (lambda: MSGC(4, 2, 2, 1), "B=2; it must be at least 1, at most 1"),
        (lambda: MSGC(4, 1, 2, 5), "lam=5"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
