"""PyTorch's fused AdamW on the parameters of the JAX rows."""

import functools
import json
import statistics

import jax
import torch

from experiments.benchmarks.jax_optimizers import shapes
from experiments.benchmarks.measuring import Program, emit, in_turns, milliseconds


def measure(task: str) -> None:
    """Measure the PyTorch rows of a task, an event a line."""
    asked = json.loads(task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    emit(framework="torch", device=name, **_copy_rate(device, asked["copy_mb"]))
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(0.02 * torch.randn(x.shape, device=device)) for x in jax.tree.leaves(shapes(asked["model"]))
    ]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    in_turns(
        asked,
        asked["model"],
        [Program(row, "update", functools.partial(_build, params)) for row in asked["names"]],
        lambda out: _synchronize(),
        lambda program, optimizer: _facts(params, optimizer),
        turns=asked["turns"],
    )


def _build(params):
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, fused=True)

    def call():
        optimizer.step()
        return optimizer

    return call, None


def _facts(params, optimizer) -> dict:
    state = sum(x.nbytes for of_one in optimizer.state.values() for x in of_one.values())
    size = sum(p.nbytes for p in params)
    # Gradients read, parameters and state read and written.
    return {"state_mb": state / 2**20, "least_mb": (3 * size + 2 * state) / 2**20, "bound": "elementwise"}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _copy_rate(device: str, mb: int) -> dict[str, float]:
    """TB/s, read and written, of copying an array."""
    x = torch.ones(mb, 2**18, device=device)
    times = milliseconds(x.clone, lambda out: _synchronize(), 5)
    return {"copy_mb": mb, "copy_tbps": 2 * x.nbytes / statistics.median(times) / 1e9}
