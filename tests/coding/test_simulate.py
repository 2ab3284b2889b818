import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.coding import (
    GC,
    MSGC,
    SRSGC,
    candidates,
    fit_alpha,
    gilbert_elliott_delays,
    simulate,
    tune,
)


def test_the_wait_out_rule_by_hand():
    """mu=1, one straggler allowed: deadline 2, all by 1.5, two stragglers so all 9 s, deadline 4."""
    delays = np.array([[1.0, 1.0, 1.0, 2.0], [1.0, 1.2, 9.0, 2.0], [5.0, 1.5, 8.0, 7.0]])
    run = simulate(GC(3, 1), delays, jobs=4)
    assert run.durations.tolist() == [2.0, 1.5, 9.0, 4.0]
    assert run.waited.tolist() == [False, False, True, False]
    assert run.returned[:, 2].all() and not run.returned[2, 0]
    assert simulate(GC(3, 1), delays, 4, mu=8.0).durations.tolist() == [5.0, 1.5, 9.0, 7.0]


def test_a_worker_exactly_at_the_deadline_is_not_late():
    assert simulate(GC(2, 0), np.array([[1.0], [2.0]]), 1).waited.tolist() == [False]


def test_m_sgc_waits_where_a_burst_is_longer_than_its_model():
    delays = np.ones((4, 7))
    delays[0, 2:4] = 10
    run = simulate(MSGC(4, 1, 2, 1), delays, jobs=6)
    assert run.waited.tolist() == [False, False, False, True, False, False, False]
    assert run.seconds == 6 * 1 + 1 + 10 and run.durations[2] == 2


def test_sr_sgc_runs_its_last_rounds_only_where_something_is_missing():
    delays = np.ones((6, 3))
    assert simulate(SRSGC(6, 1, 2, 4), delays, jobs=2).durations.tolist() == [1, 1, 0]
    delays[:4, 1] = 10
    assert simulate(SRSGC(6, 1, 2, 4), delays, jobs=2).durations.tolist() == [1, 2, 1]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31))
def test_no_scheme_is_slower_than_waiting_for_all_under_equal_delays(seed):
    delays = gilbert_elliott_delays(8, 16, seed, enter=0.1)
    for scheme in (GC(8, 1), SRSGC(8, 1, 2, 3), MSGC(8, 1, 2, 2), MSGC(8, 2, 3, 8)):
        run = simulate(scheme, delays, jobs=12)
        assert run.seconds <= delays[:, : 12 + scheme.delay].max(axis=0).sum() + 1e-9
        assert scheme.rounds == 0  # simulate works on a copy
        late = ~run.returned
        assert np.all(run.durations[late.any(axis=0)] < delays[:, : late.shape[1]].max(axis=0)[late.any(axis=0)])


def test_tune_finds_the_burst_length_of_its_probe():
    """Bursts of exactly two rounds of one worker at a time, far apart: M-SGC with B=2, and the least lam."""
    probe = np.ones((8, 30))
    for start, worker in ((3, 0), (11, 5), (19, 2)):
        probe[worker, start : start + 2] = 9
    scheme, run = tune(candidates("m-sgc", 8, max_delay=3), probe, alpha=1.0, jobs=27)
    assert (scheme.B, scheme.W, scheme.lam) == (2, 3, 1) and not run.waited.any()
    assert tune(candidates("gc", 8), probe, 1.0, 27)[0].s == 1


def test_candidates():
    assert all(s.delay <= 3 and s.lam <= 4 for kind in ("sr-sgc", "m-sgc") for s in candidates(kind, 8, 3, 4))
    assert len(list(candidates("gc", 8))) == 7 and len(list(candidates("sr-sgc", 8, 2))) == 2 * 3 * 8
    with pytest.raises(ValueError, match="kind is 'tc'; choose 'gc', 'sr-sgc' or 'm-sgc'"):
        next(candidates("tc", 8))
    with pytest.raises(ValueError, match="no schemes"):
        tune([], np.ones((2, 2)), 1.0, 1)


def test_fit_alpha():
    loads = np.array([0.0, 0.25, 0.5, 1.0])
    delays = 2.2 * loads[:, None, None] + np.random.default_rng(0).normal(1, 0.01, (4, 20, 30))
    alpha, constant = fit_alpha(loads, delays)
    # 600 delays a load: a standard error of about 6e-4.
    assert alpha == pytest.approx(2.2, abs=5e-3) and constant == pytest.approx(1, abs=5e-3)
    with pytest.raises(ValueError, match="two different ones"):
        fit_alpha(np.ones(3), np.ones(3))


@pytest.mark.parametrize(
    ("delays", "jobs", "mu", "message"),
    [
        (np.ones((3, 4)), 4, 1.0, r"delays \[3, 4\]; GC\(n=4, s=1\) and 4 jobs take \[4, >= 4\]"),
        (np.ones((4, 3)), 4, 1.0, r"delays \[4, 3\]"),
        (np.zeros((4, 4)), 4, 1.0, "finite positive seconds"),
        (np.full((4, 4), np.nan), 4, 1.0, "finite positive seconds"),
        (np.ones((4, 4)), 0, 1.0, "jobs=0"),
        (np.ones((4, 4)), 4, 0.0, "mu=0.0"),
    ],
)
def test_bad_arguments(delays, jobs, mu, message):
    with pytest.raises(ValueError, match=message):
        simulate(GC(4, 1), delays, jobs, mu)
