"""Gradients under stragglers: inside one SPMD program, and emulated round by round.

Collectives of one program wait for the slowest device, so that inside it coding saves no time: `coded_value_and_grad`
is for emulation, and for hosts whose results get lost. Time is saved between programs, by
`jaxskip.coding.WorkerProcesses`. Both that and its emulation `Emulation` run any scheme through ``step(params)``;
`train_interleaved` drives several networks with it.

Everything that is not linear in the gradients of rows (clipping, Adam's moments) belongs after decoding. What is random
or averaged in a loss (dropout, batch statistics) must depend on the row or chunk, not on the worker, or replicas of a
chunk disagree.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxskip.coding.codes import GradientCode
from jaxskip.coding.schemes import Message, Scheme, Task

# (params, job, rows int [r], weights [r]) -> sum_k weights[k] * gradient of row rows[k] of the job's batch, any pytree.
Compute = Callable[[Any, int, np.ndarray, np.ndarray], Any]


def place(code: GradientCode, batch: Any) -> Any:
    """Each worker's chunks, [n, k, N / n, ...], of a batch whose leaves are [N, ...]; shard the first axis.

    Raises ValueError unless n divides N.

    >>> from jaxskip.coding import frc
    >>> place(frc(2, 1), np.arange(4)).tolist()
    [[[0, 1], [2, 3]], [[0, 1], [2, 3]]]
    """

    def leaf(x):
        if x.shape[0] % code.n:
            raise ValueError(f"a batch of {x.shape[0]} rows does not split into {code.n} chunks")
        return x.reshape(code.n, -1, *x.shape[1:])[code.support]

    return jax.tree.map(leaf, batch)


def coded_value_and_grad(
    loss_fn: Callable[[Any, Any], jax.Array], code: GradientCode, mesh: Mesh | None = None, axis_name: str = "worker"
) -> Callable[[Any, Any, np.ndarray], tuple[jax.Array, Any]]:
    """Mean loss of a batch and its gradient from the workers that answered, in one program; see the module's docstring.

    The function returned takes ``(params, chunks, mask)``: chunks from `place` ([n, k, r, ...], the first axis over
    the devices of ``axis_name``), mask bool [n] in NumPy. What the other workers computed, even NaN, does not matter.
    The pattern is data, not program: nothing is compiled again. The step is ``jit`` inside, decoding is on the host.

    Args:
      loss_fn: (params, rows [r', ...]) -> float losses of the rows, [r'].
      code: `frc`, `cyclic` or, for a baseline, `drop`.
      mesh: with an axis ``axis_name`` whose size divides n; None for all workers in turn on one device.

    Raises ValueError for a mesh that does not fit, and for a cyclic code with parameters less precise than its
    ``dtype``; `UndecodableError` where the mask does not determine the gradient.

    Source: Tandon et al., 2017; arXiv 2211.13802.

    >>> from jaxskip.coding import frc
    >>> code, batch = frc(4, 1), np.arange(8.0, dtype=np.float32)
    >>> step = coded_value_and_grad(lambda w, x: w * x, code)
    >>> loss, grad = step(jnp.float32(2.0), place(code, batch), np.array([False, True, True, False]))
    >>> float(loss), float(grad)
    (7.0, 3.5)
    """
    if mesh is not None and (axis_name not in mesh.shape or code.n % mesh.shape[axis_name]):
        raise ValueError(f"a mesh of {dict(mesh.shape)} for {code.n} workers: axis {axis_name!r} must divide them")
    coefficients = np.take_along_axis(code.encode, code.support, axis=1).astype(np.float32)

    def worker(params, operands):
        chunks, coefficients, a = operands
        length = jax.tree.leaves(chunks)[0].shape[1]
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunks)
        weights = jnp.repeat(coefficients, length) / (code.n * length)
        message = jax.value_and_grad(lambda p: jnp.sum(weights * loss_fn(p, rows).astype(jnp.float32)))(params)
        # A worker that is left out may have sent NaN, and 0 * NaN is NaN.
        return jax.tree.map(lambda x: jnp.where(a == 0, 0.0, a * x.astype(jnp.float32)), message)

    def device(params, chunks, coefficients, a):
        messages = jax.lax.map(lambda operands: worker(params, operands), (chunks, coefficients, a))
        total = jax.tree.map(lambda x: jnp.sum(x, axis=0), messages)
        return total if mesh is None else jax.lax.psum(total, axis_name)

    @jax.jit
    def program(params, chunks, a):
        # With check_vma, gradients by replicated parameters would be summed over devices before they are weighed.
        each = P(axis_name)
        run = (
            device
            if mesh is None
            else jax.shard_map(device, mesh=mesh, in_specs=(P(), each, each, each), out_specs=P(), check_vma=False)
        )
        loss, grad = run(params, chunks, jnp.asarray(coefficients), a)
        return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grad, params)

    def step(params, chunks, mask):
        if code.name == "cyclic":
            _check_precision(params, code)
        return program(params, chunks, code.decode(mask).astype(np.float32))

    return step


class Master:
    """What `Emulation` and `WorkerProcesses` share: from a round's tasks to decoded gradients.

    ``step(params)`` runs the next round. In rounds 1 to ``jobs`` it starts the job of that number with these parameters
    (a pytree of arrays); later rounds take none. It returns the jobs that can be decoded now, in order, each with its
    gradient: the sum over the rows of its batch of whatever ``compute`` gives. ``rounds`` steps decode all jobs.
    """

    def __init__(self, scheme: Scheme, jobs: int, batch_size: int):
        if jobs < 1 or batch_size < 1 or scheme.rounds:
            raise ValueError(f"jobs={jobs}, batch_size={batch_size}, {scheme.rounds} rounds behind the scheme; it "
                             "takes at least one job and row, and a fresh scheme")  # fmt: skip
        self.scheme, self.jobs = scheme, jobs
        self.rounds = jobs + scheme.delay
        self.pending: dict[int, Any] = {}  # parameters of jobs that are not decoded yet
        ends = np.cumsum(scheme.chunk_shares) * batch_size // scheme.units
        self.bounds = np.concatenate([[0], ends])

    def step(self, params: Any = None) -> list[tuple[int, Any]]:
        """Runs the next round: [(job, gradient), ...] of what it completed."""
        raise NotImplementedError

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the job's batch, int [r], and their weights, float64 [r].

        All tasks have the same number of rows where ``scheme.units`` divides the batch.
        """
        rows = [np.arange(self.bounds[c], self.bounds[c + 1]) for c in task.chunks]
        weights = np.repeat(np.array(task.coefficients), [len(r) for r in rows])
        return np.concatenate(rows), weights

    def _begin(self, params: Any) -> list[list[Task | None]]:
        job = self.scheme.rounds + 1
        if job > self.rounds:
            raise ValueError(f"all {self.rounds} rounds are done")
        if (job <= self.jobs) != (params is not None):
            raise ValueError(f"round {job} of {self.jobs} jobs takes {'' if job <= self.jobs else 'no '}parameters")
        if params is not None:
            self.pending[job] = params
        return self.scheme.assign(self.jobs)

    def _decoded(self, message: Callable[[Message], Any]) -> list[tuple[int, Any]]:
        """All jobs that are decodable after the round; UndecodableError where one is late."""
        done = []
        for job in sorted(self.pending):
            if job > self.scheme.rounds - self.scheme.delay and not self.scheme.decodable(job):
                continue
            weights = self.scheme.decode(job)
            parts = [(weight, message(key)) for key, weight in weights.items()]
            done.append((job, jax.tree.map(_weighted_sum([w for w, _ in parts]), *(tree for _, tree in parts))))
        for job, _ in done:
            del self.pending[job]
        return done


class Emulation(Master):
    """Runs a scheme's rounds in this process under a given pattern of stragglers.

    Only messages that decoding uses are computed, so that replicas cost nothing. Where the scheme cannot do without a
    straggler, the round waits for all: ``waited`` (list of bool) says in which rounds.

    Args:
      compute: (params, job, rows, weights) -> weighted sum of the rows' gradients, see `Master.rows`.
      scheme: a fresh one.
      jobs: J.
      batch_size: rows of a job's batch.
      stragglers: bool [n, R], R >= jobs + scheme.delay.

    Raises ValueError for a pattern of another shape, and as `Master`.

    >>> from jaxskip.coding import GC
    >>> late = np.array([[True, False], [False, False]])
    >>> run = Emulation(lambda w, job, rows, weights: w * (weights @ rows), GC(2, 1), 2, 4, late)
    >>> [(job, float(g)) for _ in range(2) for job, g in run.step(np.float32(10.0))]
    [(1, 60.0), (2, 60.0)]
    """

    def __init__(self, compute: Compute, scheme: Scheme, jobs: int, batch_size: int, stragglers: np.ndarray):
        super().__init__(scheme, jobs, batch_size)
        stragglers = np.asarray(stragglers)
        if stragglers.dtype != bool or stragglers.shape[:1] != (scheme.n,) or stragglers.shape[1:] < (self.rounds,):
            raise ValueError(f"a pattern of {stragglers.dtype} {list(stragglers.shape)}; {scheme} and {jobs} jobs take "
                             f"bool [{scheme.n}, >= {self.rounds}]")  # fmt: skip
        self.compute, self.stragglers = compute, stragglers
        self.waited: list[bool] = []
        self._tasks: dict[int, list[list[Task | None]]] = {}

    def step(self, params: Any = None) -> list[tuple[int, Any]]:
        """Runs the next round, see `Master`."""
        tasks = self._begin(params)
        number = self.scheme.rounds + 1
        mask = ~self.stragglers[:, number - 1]
        self.waited.append(not self.scheme.allows(mask))
        self.scheme.report(mask | self.waited[-1])
        self._tasks[number] = tasks
        self._tasks.pop(number - self.scheme.delay - 1, None)
        computed: dict[Message, Any] = {}

        def message(key):
            if key not in computed:
                task = self._tasks[key.round][key.worker][key.slot]
                assert task is not None
                computed[key] = self.compute(self.pending[task.job], task.job, *self.rows(task))
            return computed[key]

        return self._decoded(message)


def train_interleaved(
    master: Master,
    models: list[Any],
    params_of: Callable[[Any], Any],
    apply: Callable[[Any, Any, int], Any],
) -> list[Any]:
    """Trains M networks in turn: job t is a step of network (t - 1) mod M, so that gradients may come T rounds late.

    Args:
      master: fresh; its ``compute`` finds a job's batch by the job's number.
      models: states of the networks; M >= scheme.delay + 1.
      params_of: state -> parameters.
      apply: (state, decoded gradient, job) -> next state; an Optax update, for example.

    Returns the states after all jobs. Raises ValueError where M is too small: a step would start before the one before
    it had its gradient. Source: arXiv 2211.13802.

    >>> from jaxskip.coding import MSGC
    >>> nobody = np.zeros((2, 5), bool)
    >>> master = Emulation(lambda w, job, rows, weights: weights @ (w - rows), MSGC(2, 1, 2, 1), 4, 6, nobody)
    >>> ends = train_interleaved(master, [np.float32(0), np.float32(9)], lambda w: w, lambda w, g, job: w - 0.1 * g)
    >>> [round(float(w), 4) for w in ends]
    [2.1, 3.54]
    """
    models = list(models)
    if len(models) <= master.scheme.delay:
        raise ValueError(f"{len(models)} networks under a delay of {master.scheme.delay} rounds; it takes "
                         f"{master.scheme.delay + 1} at least")  # fmt: skip
    for number in range(1, master.rounds + 1):
        params = params_of(models[(number - 1) % len(models)]) if number <= master.jobs else None
        for job, gradient in master.step(params):
            models[(job - 1) % len(models)] = apply(models[(job - 1) % len(models)], gradient, job)
    return models


def _weighted_sum(weights: list[float]):
    def leaf(*parts):
        # Decoding cancels large terms in a cyclic code: added in float64, rounded once.
        total = sum(w * np.asarray(x, np.float64) for w, x in zip(weights, parts, strict=True))
        return np.asarray(total, parts[0].dtype)

    return leaf


def _check_precision(params: Any, code: GradientCode) -> None:
    coarse = {str(x.dtype) for x in jax.tree.leaves(params) if jnp.finfo(x.dtype).eps > jnp.finfo(code.dtype).eps}
    if coarse:
        raise ValueError(f"gradients in {sorted(coarse)} lose their digits in a cyclic code made for {code.dtype}: use "
                         "the fractional repetition code, or parameters of that precision")  # fmt: skip
