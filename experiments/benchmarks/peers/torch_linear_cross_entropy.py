"""PyTorch's linear + cross-entropy: plain, torch.compile, Liger's kernel and Apple's (the paper's own).

Of Apple's presets the package on PyPI (25.1.1) has ``cce`` only; the repository apple/ml-cross-entropy has all.
"""

import functools
import json
import statistics
import time

import torch
import torch.nn.functional as F

from experiments.benchmarks.jax_linear_cross_entropy import compared
from experiments.benchmarks.measuring import OUT_OF_TIME, Program, emit, in_turns, milliseconds

_APPLE = ("cce", "cce_kahan_full_c", "cce_exact")


def measure(task: str) -> None:
    """Measure the PyTorch rows of a task, an event a line."""
    asked = json.loads(task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 256
    emit(framework="torch", device=_device_name(device), size=size, tflops=_product_rate(device, size) / 1e12)
    losses = {}
    for row in asked["names"]:
        try:
            losses[row] = _losses(row)
        except ImportError as error:
            emit(shape="", row=row, kind="", missing=f"not installed ({error})")
    for shape, wanted in asked["shapes"].items():
        names = [name for name in asked["names"] if name in wanted["rows"] and name in losses]
        if time.time() > asked["deadline"]:
            for name in names:
                emit(shape=shape, row=name, kind="", missing=OUT_OF_TIME)
            continue
        tokens, vocabulary, width = wanted["size"]
        e, c, labels = zipf_inputs(tokens, vocabulary, width, device, asked["shuffle"])
        programs = [
            Program(row, kind, functools.partial(_build, loss, kind, e, c, labels))
            for row in names
            for kind, loss in losses[row].items()
            if not (wanted["brief"] and kind == "cce_kahan_full_c")
        ]
        facts = functools.partial(_facts, None, None)
        if not wanted["brief"]:
            chosen = compared(tokens, vocabulary)
            facts = functools.partial(_facts, chosen, exact_gradients(e, c, labels, *chosen))
        torch.compiler.reset()  # or the next shape is compiled for any shape
        in_turns(asked, shape, programs, lambda out: _synchronize(), facts)
        del e, c, labels, programs, facts
        if device == "cuda":
            torch.cuda.empty_cache()


def _losses(row: str) -> dict:
    """kind -> mean loss of (embeddings, classifier, labels); "forward" is timed alone, the others with gradients."""

    def plain(e, c, labels):
        return F.cross_entropy((e @ c.T).float(), labels)

    if row == "torch":
        return {"forward": plain, "exact": plain}
    if row == "torch_compile":
        compiled = torch.compile(plain)
        return {"forward": compiled, "exact": compiled}
    if row == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return {"exact": liger_fused_linear_cross_entropy}  # its forward pass makes the gradients
    from cut_cross_entropy import linear_cross_entropy

    presets = {name: functools.partial(linear_cross_entropy, impl=name) for name in _APPLE}
    return {"forward": presets["cce"], **presets}


def _build(loss, kind, e, c, labels):
    """(call, peak MB beyond the inputs) after compilation and tuning."""

    def forward():
        with torch.no_grad():
            return loss(e, c, labels)

    def both():
        value = loss(e, c, labels)
        return value.detach(), torch.autograd.grad(value, (e, c))

    call = forward if kind == "forward" else both
    call()
    if not e.is_cuda:
        return call, None
    _synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    _synchronize()
    return call, (torch.cuda.max_memory_allocated() - before) / 2**20


def zipf_inputs(tokens: int, vocabulary: int, width: int, device: str, shuffle: bool):
    """As the JAX rows' inputs, from PyTorch's own random numbers."""
    g = torch.Generator(device).manual_seed(0)
    c = torch.randn(vocabulary, width, device=device, generator=g) / width**0.5
    frequency = 1 / torch.arange(1, vocabulary + 1, device=device, dtype=torch.float32)
    ids = torch.multinomial(frequency, tokens * 5, replacement=True, generator=g).view(tokens, 5)
    if shuffle:
        ids = torch.randperm(vocabulary, device=device, generator=g)[ids]
    e = 8 * c[ids[:, 0]] + 6 * c[ids[:, 1:]].sum(1) + torch.randn(tokens, width, device=device, generator=g)
    labels = ids[:, 0].contiguous()
    return e.bfloat16().requires_grad_(), c.bfloat16().requires_grad_(), labels


@torch.no_grad()
def exact_gradients(e, c, labels, tokens, frequent, others):
    """Gradients of the mean loss in float32: of some tokens' embeddings and of two choices of classifier rows."""
    wide, count = c.float(), e.shape[0]
    lse = torch.cat([torch.logsumexp(part.float() @ wide.T, -1) for part in e.split(512)])
    dz = torch.exp(e[tokens].float() @ wide.T - lse[tokens, None]) - F.one_hot(labels[tokens], c.shape[0])
    gradients = [dz @ wide / count]
    for entries in (frequent, others):
        dz = torch.exp(e.float() @ wide[entries].T - lse[:, None])
        dz -= (labels[:, None] == torch.tensor(entries, device=e.device)).float()
        gradients.append(dz.T @ e.float() / count)
    return gradients


@torch.no_grad()
def _facts(chosen, exact, program, out):
    """The loss and, where there is something to compare with, the gradients' errors in roundings to bfloat16."""
    if program.kind == "forward":
        return {"loss": out.item()}
    loss, (de, dc) = out
    if exact is None:
        return {"loss": loss.item()}
    errors = [
        (torch.norm(gradient[index].float() - reference) / torch.norm(reference.bfloat16().float() - reference)).item()
        for gradient, index, reference in zip((de, dc, dc), chosen, exact, strict=True)
    ]
    return {"loss": loss.item(), "error": errors}


def _product_rate(device: str, size: int) -> float:
    """FLOP/s of a square bf16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = milliseconds(lambda: a @ b, lambda out: _synchronize(), 5)
    return 2 * size**3 / (1e-3 * statistics.median(times))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
