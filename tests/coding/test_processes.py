"""Real processes: one is stopped, one is killed, and every gradient is still exact."""

import os
import signal

import numpy as np
import pytest

from jaxskip.coding import GC, MSGC, WorkerProcesses
from tests.coding import workers


def check(done, params, rtol=1e-12):
    """1e-12: NumPy in float64, rows are added in another order."""
    for job, gradient in done:
        np.testing.assert_allclose(gradient["w"], workers.exact(params[job], job)["w"], rtol=rtol)
    return [job for job, _ in done]


def test_a_stalled_and_a_killed_worker_change_no_gradient():
    """GC of four workers against one straggler: first worker 2 is stopped, then continued, then worker 1 is killed."""
    params = {job: {"w": np.full(3, float(job))} for job in range(1, 9)}
    with WorkerProcesses(workers.make_compute, GC(4, 1), jobs=8, batch_size=workers.ROWS, mu=300.0) as master:
        pids = [process.pid for process in master.processes]
        for job in params:
            if job == 3:
                os.kill(pids[2], signal.SIGSTOP)
            if job == 5:
                os.kill(pids[2], signal.SIGCONT)
            if job == 6:
                os.kill(pids[1], signal.SIGKILL)
            assert check(master.step(params[job]), params) == [job]
        assert master.late[2][2] and master.late[3][2]  # stopped
        assert np.all(np.sum(master.late, axis=1) <= 1)
        assert not master.late[7][1]  # another process does the dead one's work
        with pytest.raises(ValueError, match="all 8 rounds are done"):
            master.step()
    assert not any(process.is_alive() for process in master.processes)


@pytest.mark.slow
def test_m_sgc_survives_two_workers_that_never_come_back():
    """Such stragglers are beyond any burst: the master waits, gives up on the silent one, and hands its work over."""
    jobs = 8
    params = {job: {"w": np.full(3, float(job))} for job in range(1, jobs + 1)}
    scheme = MSGC(4, 1, 2, 1)
    done = []
    with WorkerProcesses(workers.make_jax_compute, scheme, jobs, workers.ROWS, mu=20.0, patience=8.0) as master:
        for number in range(1, master.rounds + 1):
            if number == 3:
                os.kill(master.processes[0].pid, signal.SIGSTOP)
            if number == 6:
                os.kill(master.processes[3].pid, signal.SIGKILL)
            done += check(master.step(params.get(number)), params, rtol=1e-4)  # float32, terms of either sign
        assert master.late[2][0]
        assert max(master.seconds) > 7.9  # the wait for the stopped one
    assert done == list(range(1, jobs + 1))


def test_a_bug_in_a_worker_is_told_with_its_traceback():
    with (
        WorkerProcesses(workers.make_failing, GC(1, 0), 1, workers.ROWS) as master,
        pytest.raises(RuntimeError, match="a bug in the worker"),
    ):
        master.step({"w": np.zeros(3)})
    with pytest.raises(ValueError, match="use a with block"):
        WorkerProcesses(workers.make_compute, GC(1, 0), 1, workers.ROWS).step({"w": np.zeros(3)})


def test_no_worker_left_raises():
    with WorkerProcesses(workers.make_compute, GC(1, 0), 2, workers.ROWS) as master:
        check(master.step({"w": np.ones(3)}), {1: {"w": np.ones(3)}})
        master.processes[0].kill()
        with pytest.raises(RuntimeError, match="no worker is left"):
            master.step({"w": np.ones(3)})
