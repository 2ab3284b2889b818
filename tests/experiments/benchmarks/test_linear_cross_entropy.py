"""The benchmark's inputs, its yardstick and its verdicts; the times themselves are nobody's test."""

import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.benchmarks import jax_linear_cross_entropy as child
from experiments.benchmarks import linear_cross_entropy as benchmark
from experiments.claims import Report


@pytest.mark.slow
def test_the_smoke_preset_measures_what_is_there_and_names_what_is_not(tmp_path):
    args = ["--preset", "smoke", "--run-dir", str(tmp_path / "run")]
    cli.run(benchmark.main, benchmark.Config, benchmark.PRESETS, args=args)
    report = Report.load(tmp_path / "run")
    rows = [row[0] for row in next(iter(report.tables.values())).rows]
    torch = [] if any("torch is not installed" in note for note in report.notes) else ["torch"]
    assert rows == ["chunked", "xla", *torch, "one product"]
    assert any(note.startswith("mosaic_gpu: left out, ") for note in report.notes)
    assert all((tmp_path / "run" / f"linear_cross_entropy_{name}.png").exists() for name in ("time", "memory"))
    events = json.loads((tmp_path / "run" / "measured.json").read_text())
    losses = {
        e["row"]: e["loss"] for e in events if e.get("shape") == "tiny" and e.get("kind") == "exact" and "loss" in e
    }
    assert losses["chunked"] == pytest.approx(losses["xla"], rel=1e-5)  # float32 sums of the same bf16 products
    errors = [x for e in events for x in e.get("error", ())]
    assert len(errors) == 3 * len(losses) and max(errors) < 5  # in roundings to bf16; PyTorch's logits are bf16


def test_inputs_are_zipfs_and_the_label_stands_out():
    e, c, labels = child.zipf_inputs(jax.random.key(0), 2000, 300, 64)
    assert (e.shape, c.shape, labels.shape) == ((2000, 64), (300, 64), (2000,))
    assert (e.dtype, c.dtype, labels.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.int32)
    counts = np.bincount(np.asarray(labels), minlength=300)
    harmonic = sum(1 / n for n in range(1, 301))
    assert counts[0] == pytest.approx(2000 / harmonic, rel=0.2)  # 318 expected, standard deviation 16
    shuffled = child.zipf_inputs(jax.random.key(0), 2000, 300, 64, shuffle=True)[2]
    assert sorted(np.bincount(np.asarray(shuffled), minlength=300)) == sorted(counts)
    assert np.argmax(np.bincount(np.asarray(shuffled))) != 0
    # The label's logit is 8 times its row's squared norm, about 1, and at most 24 more where rivals are the same row.
    logits = jnp.einsum("nd,nd->n", e.astype(jnp.float32), c[labels].astype(jnp.float32))
    assert 6 < float(jnp.median(logits)) < 14


def test_the_yardstick_is_the_gradient_of_the_materialised_loss():
    e, c, labels = child.zipf_inputs(jax.random.key(1), 96, 200, 32)
    tokens, frequent, others = map(jnp.array, child.compared(96, 200))
    exact = child.exact_gradients(e, c, labels, tokens, frequent, others)
    with jax.default_matmul_precision("highest"):
        wide = (e.astype(jnp.float32), c.astype(jnp.float32), labels)
        de, dc = jax.grad(child._loss("xla"), (0, 1))(*wide)
    for ours, theirs in zip(exact, (de[tokens], dc[frequent], dc[others]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)  # float32 sums in another order
    # Rounded to bf16 the gradient has, by definition, the error 1; left as it is, none.
    program = child.Program("xla", "exact", lambda: None)
    chosen = (jnp.arange(64), jnp.arange(64), jnp.arange(64))
    rounded = child._facts(chosen, exact, program, (0.0, [x.astype(jnp.bfloat16) for x in (exact[0], exact[1])]))
    assert rounded["error"][:2] == pytest.approx([1, 1])


@pytest.mark.peer
def test_the_pytorch_yardstick_is_its_own_gradient():
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.peers import torch_linear_cross_entropy as peers

    e, c, labels = peers.zipf_inputs(96, 200, 32, "cpu", shuffle=True)
    chosen = child.compared(96, 200)
    exact = peers.exact_gradients(e, c, labels, *chosen)
    wide = [x.detach().float().requires_grad_() for x in (e, c)]
    de, dc = torch.autograd.grad(peers._losses("torch")["exact"](*wide, labels), wide)
    for ours, theirs, index in zip(exact, (de, dc, dc), chosen, strict=True):
        torch.testing.assert_close(ours, theirs[index], rtol=1e-4, atol=1e-7)  # float32 sums in another order


def test_compared_rows_exist_and_do_not_repeat():
    for tokens, vocabulary in ((256, 1000), (8192, 256_000), (10, 64)):
        rows, frequent, others = child.compared(tokens, vocabulary)
        assert max(rows) < tokens and max([*frequent, *others]) < vocabulary
        assert len({*frequent, *others}) == len(frequent) + len(others)


def test_a_row_that_cannot_run_says_why():
    assert child.unavailable("chunked") is None
    assert "Hopper" in child.unavailable("mosaic_gpu")


def test_a_peer_that_fails_or_is_late_or_done_leaves_the_others_alone(capsys):
    def fails():
        raise RuntimeError("no\nmemory")

    works = child.Program("xla", "forward", lambda: (lambda: 3.0, 1.5))
    programs = [child.Program("liger", "exact", fails), works, child.Program("torch", "exact", fails)]
    task = {"done": [["gpt2", "torch", "exact"]], "deadline": float("inf"), "repeats": 1}
    child.in_turns(task, "gpt2", programs, lambda out: None, lambda program, out: {"loss": out})
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["row"], event.get("missing")) for event in events] == [
        ("liger", "RuntimeError: no memory"),
        ("xla", None),
        ("xla", None),
    ]
    assert events[1]["mb"] == 1.5 and events[1]["loss"] == 3.0
    child.in_turns(task | {"deadline": 0}, "gpt2", [works], lambda out: None, lambda program, out: {})
    assert json.loads(capsys.readouterr().out)["missing"] == child.OUT_OF_TIME


def results(tmp_path, device="NVIDIA H200", **times):
    found = benchmark.Results(tmp_path / "measured.json")
    found.add({"framework": "jax", "device": device, "size": 8192, "tflops": 700.0})
    for name, (ms, mb, *error) in times.items():
        row, kind = name.split("__")
        extra = {"error": error} if error else {}
        found.add({"shape": "gemma", "row": row, "kind": kind, "times": [ms, ms], "mb": mb, **extra})
    return found


OURS = {
    "mosaic_gpu__forward": (14.0, 1.0),
    "mosaic_gpu__kahan": (30.0, 1190.0, 1.3, 1.2, 9.0),
    "mosaic_gpu__exact": (66.0, 1400.0, 1.1, 1.0, 1.0),
}
PEERS = {"xla__forward": (15.2, 8000.0), "torch__exact": (65.0, 24_000.0), "apple__cce": (29.0, 1164.0)}
GEMMA = benchmark.Config(shapes=("gemma",), sweep=())


def test_claims_hold_and_fail_by_what_was_measured(tmp_path):
    claims = {c.statement: c for c in benchmark.report(GEMMA, results(tmp_path, **OURS, **PEERS)).claims}
    verdicts = {statement.split(":")[0] + statement.split(":")[1][:24]: c.holds for statement, c in claims.items()}
    assert verdicts == {
        "gemma, forward at most 15 ms with at m": True,
        "gemma, forward + backward, kahan at most 32 ms with at m": True,
        "gemma, forward + backward, exact at most 65 ms with at m": False,
        "gemma never slower than the f": False,
        "gemma the filter takes no mor": True,
    }
    (peers,) = [c for c in claims.values() if "never slower" in c.statement]
    assert peers.measured == "forward 0.921 of xla forward; forward + backward 1.034 of apple cce"


def test_goals_of_an_h200_are_no_claims_elsewhere(tmp_path):
    report = benchmark.report(GEMMA, results(tmp_path, device="cpu", **OURS))
    assert [c.statement[:17] for c in report.claims] == ["gemma: the filter"]


def test_the_table_sets_the_forward_pass_beside_each_gradient(tmp_path):
    (table, _) = benchmark.report(GEMMA, results(tmp_path, **OURS, **PEERS)).tables.values()
    rows = {(row[0], row[1]): row for row in table.rows}
    assert rows["mosaic_gpu", "kahan"][2:6] == [*rows["mosaic_gpu", "exact"][2:3], 30.0, 1.0, 1190.0]
    assert rows["xla", None][2:4] == [15.2, None] and rows["torch", "exact"][2] is None
    product = 2 * 8192 * 256_000 * 2304 / 790e12 * 1e3
    assert rows["one product", None][2] == pytest.approx(product, abs=1e-3)
    assert rows["mosaic_gpu", "kahan"][7:9] == [round(14 / product, 2), round(30 / product, 2)]
    assert all(len(row) == len(table.header) for row in table.rows)


def test_a_killed_run_keeps_its_figures_and_tries_again_what_failed(tmp_path):
    found = results(tmp_path, **OURS)
    found.add({"shape": "gemma", "row": "liger", "kind": "exact", "missing": "RuntimeError: no memory"})
    assert found.missing() == ["gemma liger exact: left out, RuntimeError: no memory"]
    again = benchmark.Results(tmp_path / "measured.json")
    assert again.programs() == found.programs() and again.missing() == []
    again.add({"shape": "gemma", "row": "mosaic_gpu", "kind": "forward", "times": [20.0]})
    entry = again.programs()["gemma", "mosaic_gpu", "forward"]
    assert entry["times"] == [14.0, 14.0, 20.0] and entry["ms"] == statistics.median(entry["times"])
    assert entry["mb"] == 1.0


def test_a_missing_framework_is_named_row_by_row(tmp_path):
    events = benchmark._in_a_process("no_such_framework", ["torch", "liger"], GEMMA, results(tmp_path), 0.0)
    assert [(e["row"], e["missing"]) for e in events] == [
        ("torch", "no_such_framework is not installed"),
        ("liger", "no_such_framework is not installed"),
    ]
