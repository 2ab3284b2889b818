import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, perpgrad_stablemax
from experiments.claims import Report
from experiments.perpgrad_stablemax import Config, Recipe

SMOKE = perpgrad_stablemax.PRESETS["smoke"]


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    flags = ["--preset", "smoke", "--runs", str(tmp_path), "--recipes", "perp_adamw", "perp_sgd", "--tasks", "parity"]
    cli.run(perpgrad_stablemax.main, Config, perpgrad_stablemax.PRESETS, args=flags)
    (folder,) = (tmp_path / "perpgrad_stablemax").iterdir()
    report = Report.load(folder)
    rows = next(iter(report.tables.values())).rows
    assert [row[:3] for row in rows] == [["parity", "perp_adamw", 6], ["parity", "perp_sgd", 6]]
    assert (folder / "curves_parity.png").read_bytes().startswith(b"\x89PNG")
    (claim,) = report.claims
    assert "StableMax" in claim.statement and claim.holds


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(tmp_path):
    config = dataclasses.replace(SMOKE, recipes=("adamw",), epochs=3)
    first, second = (perpgrad_stablemax.train(Recipe(), "add", config, tmp_path / "add-adamw") for _ in range(2))
    assert first == second and first[0][-1]["step"] == 3
    assert first[0][-1]["loss"] < first[0][0]["loss"]


@pytest.mark.parametrize("task", ["add", "subtract", "multiply"])
def test_the_test_set_is_the_complement(task):
    train, test, classes = perpgrad_stablemax.dataset(task, SMOKE, 0)
    pairs = {tuple(pair) for s in (train, test) for pair in s["x"].tolist()}
    assert classes == 11 and len(pairs) == len(train["x"]) + len(test["x"]) == 121
    assert len(train["x"]) == round(0.4 * 121)
    a, b = train["x"].T.astype(int)
    wanted = {"add": a + b, "subtract": a - b, "multiply": a * b}[task] % 11
    np.testing.assert_array_equal(train["label"], wanted)
    other = perpgrad_stablemax.dataset(task, SMOKE, 1)[0]
    assert not np.array_equal(other["x"], train["x"])


def test_parity_is_that_of_three_bits_and_the_transformer_starts_at_one():
    """Trap 7: the two data sets of the authors differ."""
    train, test, classes = perpgrad_stablemax.dataset("parity", SMOKE, 0)
    assert train["x"].shape == test["x"].shape == (1000, 43) and classes == 2
    np.testing.assert_array_equal(train["label"], train["x"][:, :3].sum(1) % 2)
    pairs = perpgrad_stablemax.dataset("add", dataclasses.replace(SMOKE, model="transformer"), 0)[0]["x"]
    assert pairs.min() == 1 and pairs.max() == 10


def test_the_mlp_is_that_of_one_hot_pairs():
    """Reading two rows of the first matrix is its product with the concatenated one-hot vectors."""
    init, apply = perpgrad_stablemax.make_model("add", 11, SMOKE)
    params = init(jax.random.key(0))
    assert {name: w.shape for name, w in params.items()} == {"layer1": (22, 24), "layer2": (24, 24), "layer3": (24, 11)}
    assert all(float(jnp.abs(w).max()) <= len(w) ** -0.5 for w in params.values())
    x = jnp.array([[3, 7], [0, 10]])
    one_hot = jnp.concatenate([jax.nn.one_hot(x[:, 0], 11), jax.nn.one_hot(x[:, 1], 11)], 1)
    hidden = jax.nn.relu(jax.nn.relu(one_hot @ params["layer1"]) @ params["layer2"])
    np.testing.assert_allclose(apply(params, x), hidden @ params["layer3"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_transformer_reads_both_numbers():
    init, apply = perpgrad_stablemax.make_model("add", 11, dataclasses.replace(SMOKE, model="transformer"))
    params = jax.jit(init)(jax.random.key(0))
    logits = jax.jit(apply)(params, jnp.array([[1, 2], [3, 2], [1, 4], [2, 1]]))
    assert logits.shape == (4, 11)
    assert all(float(jnp.abs(logits[0] - other).max()) > 1e-3 for other in logits[1:])


def test_perp_comes_before_the_optimizer_and_alpha_divides_the_rate():
    w, g = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])
    recipe = Recipe(optimizer="sgd", learning_rate=1.0, perp="leaf")
    updates = {}
    for name, changes in {"rescaled": {}, "paper": {"rescale": False}, "alpha": {"logit_scale": 2.0}}.items():
        tx = perpgrad_stablemax.make_optimizer(dataclasses.replace(recipe, **changes))
        updates[name] = tx.update(g, tx.init(w), w)[0]
    np.testing.assert_allclose(updates["rescaled"], [[0, -5]], atol=1e-6)
    np.testing.assert_allclose(updates["paper"], [[0, -4]], atol=1e-6)
    np.testing.assert_allclose(updates["alpha"], [[0, -1.25]], atol=1e-6)


def test_the_presets_are_the_authors_settings():
    """Section 3 of the method's card."""
    paper = perpgrad_stablemax.PRESETS["paper"]
    assert (paper.modulus, paper.width, paper.train_fraction, paper.epochs) == (113, 200, 0.4, 500)
    stable, sgd = paper.stablemax, paper.perp_sgd
    assert (stable.loss, stable.learning_rate, stable.b2, stable.eps) == ("stablemax", 0.01, 0.999, 1e-25)
    assert (stable.weight_decay, stable.epochs) == (0.0, 100_000)
    assert (sgd.learning_rate, sgd.momentum, sgd.dtype, sgd.loss) == (10.0, 0.8, "float64", "stablemax")
    assert (paper.adamw.learning_rate, paper.adamw.b2, paper.adamw.eps) == (0.005, 0.99, 1e-25)
    assert dataclasses.replace(paper.perp_adamw, perp="none") == paper.adamw
    sweep = [paper.softmax16, paper.softmax32, paper.softmax64]
    assert [r.softmax_dtype for r in sweep] == ["float16", "float32", "float64"]
    assert all((r.learning_rate, r.epochs) == (5e-4, 20_000) for r in sweep)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"recipes": ()}, "recipes"), ({"train_fraction": 1.0}, "train_fraction is 1.0"),
     ({"model": "transformer", "tasks": ("parity",)}, "parity")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)
