import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, gradient_filter
from experiments import cut_cross_entropy as cce
from experiments.claims import Report

SMOKE = cce.PRESETS["smoke"]


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_pictures(tmp_path):
    cli.run(cce.main, cce.Config, cce.PRESETS, args=["--preset", "smoke", "--runs", str(tmp_path)])
    (folder,) = (tmp_path / "cut_cross_entropy").iterdir()
    report = Report.load(folder)
    training = {row[0]: row for row in report.tables["training"].rows}
    assert set(training) == {"optax", "kahan_full_c", "cce"}
    # In 16 steps rounding has hardly drifted, and the bare filter has.
    assert training["kahan_full_c"][2] < 0.02 < training["cce"][2]
    assert (folder / "training.png").exists() and (folder / "blocks.png").exists()
    (agreement,) = [claim for claim in report.claims if "are those of the materialised" in claim.statement]
    assert agreement.holds and 0 < float(agreement.measured.split("dE ")[1].split(",")[0]) < 1e-5
    assert [row[0] for row in report.tables["memory"].rows] == ["tiny"]


def operands(tokens=40, width=8, vocabulary=30):
    keys = jax.random.split(jax.random.key(0), 3)
    e = 2 * jax.random.normal(keys[0], (tokens, width))
    return e, jax.random.normal(keys[1], (width, vocabulary)), jax.random.randint(keys[2], (tokens,), 0, vocabulary)


def logit_gradients(name, eps):
    """(gradient [N, V] of the logits: that of the classifier, for one-hot embeddings; softmax; labels; prior [V])."""
    how = cce.FILTERS[name]
    z = 3 * jax.random.normal(jax.random.key(1), (6, 20))
    labels = jnp.argmin(z, axis=1)  # the least likely entry: below the threshold
    dc = jax.grad(cce.filtered_cross_entropy(how, eps), 1)(jnp.eye(6), z, labels)
    prior = np.minimum(np.asarray(jax.nn.softmax(z.mean(0))), cap(eps, 20))
    return np.asarray(dc) * 6, np.asarray(jax.nn.softmax(z)), np.asarray(labels), prior


def cap(eps, entries):
    return min(max(1 / entries, eps / 4), eps / 2)


def spread_by_hand(p, out, prior, eps):
    """What stands for the probabilities of one token where ``out``."""
    multiple = min(p[out].sum() / prior[out].sum(), (p[out].max() - p[out].mean()) / cap(eps, p.size))
    return multiple * prior[out] + p[out].mean() - multiple * prior[out].mean()


@pytest.mark.parametrize("name", list(cce.FILTERS))
def test_without_a_threshold_the_emulated_loss_is_optaxs(name):
    with jax.default_matmul_precision("highest"):
        ours = jax.value_and_grad(cce.filtered_cross_entropy(cce.FILTERS[name], 0.0), (0, 1))(*operands())
        theirs = jax.value_and_grad(cce.materialised_cross_entropy, (0, 1))(*operands())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # float32, another order of operations


@pytest.mark.parametrize(("name", "spread"), [("kahan", True), ("cce", False)])
def test_entries_below_the_threshold_are_left_out_but_never_the_labels(name, spread):
    eps = 0.05
    dz, p, labels, prior = logit_gradients(name, eps)
    hit = labels[:, None] == np.arange(20)[None, :]
    left_out = (p < eps) & ~hit
    assert left_out.any(1).all() and (p[hit] < eps).all()
    np.testing.assert_allclose(dz[hit], p[hit] - 1, atol=1e-6)
    np.testing.assert_allclose(dz[~hit & ~left_out], p[~hit & ~left_out], atol=1e-6)
    for row, out, q in zip(dz, left_out, p, strict=True):
        np.testing.assert_allclose(row[out], spread_by_hand(q, out, prior, eps) if spread else 0, atol=1e-7)
    sums = np.abs(dz.sum(1))
    assert sums.max() < 1e-6 if spread else sums.min() > 1e-3


def test_the_classifiers_gradient_is_exact_where_only_the_embeddings_are_filtered():
    exact = jax.grad(cce.materialised_cross_entropy, (0, 1))(*operands())
    ours = jax.grad(cce.filtered_cross_entropy(cce.FILTERS["kahan_full_c"], 0.02), (0, 1))(*operands())
    np.testing.assert_allclose(ours[1], exact[1], rtol=1e-4, atol=1e-6)
    assert np.abs(ours[0] - exact[0]).max() > 1e-4


def test_rows_with_a_gradient_are_remembered():
    tx = cce.record_touched_rows(4)
    state = tx.init({"head": jnp.zeros((3, 4))})
    updates = {"head": jnp.zeros((3, 4)).at[1, 2].set(1e-30)}
    same, state = tx.update(updates, state)
    _, state = tx.update({"head": jnp.zeros((3, 4)).at[0, 0].set(-1)}, state)
    assert same is updates and state.touched.tolist() == [True, False, True, False]


def test_two_equal_runs_lie_within_the_derived_tolerance_in_99_of_100_cases():
    within = 0
    for *groups, pair in np.random.default_rng(0).normal(6.0, 0.01, (2000, 4, 2)):  # 3 seeds, and a pair to judge
        within += abs(pair[0] - pair[1]) <= cce.derived_tolerance(groups)[0]
    assert within / 2000 == pytest.approx(0.99, abs=0.007)  # three standard errors
    assert cce.derived_tolerance([[1.0, 1.0], [2.0, 2.0]]) == (0.0, 0.0)


def test_a_block_counts_when_any_of_its_entries_does():
    large = np.zeros((130, 300), bool)
    large[129, 299] = large[0, 127] = True
    assert gradient_filter.block_any(large).tolist() == [[True, False, False], [False, False, True]]


def test_sorting_gathers_what_is_kept():
    e, c, labels = jnp.ones((128, 1)), jnp.full((1, 512), -20.0).at[0, ::128].set(5.0), jnp.zeros(128, int)
    (entries, left_out, by_id, *_), blocks = gradient_filter.blocks_kept((e, c, labels), 1e-3)
    assert {order: kept.mean() for order, kept in blocks.items()}["average logit"] == 0.25
    assert (entries, by_id) == (4 / 512, 1.0) and gradient_filter.sorting_gathers("model", blocks).holds
    assert left_out == 0  # 508 entries of e**-25 / 4


def test_the_error_of_a_threshold_is_what_the_left_out_entries_would_have_given():
    e, c, labels = operands()
    table, claim = gradient_filter.embedding_errors("model", (e, c, labels), 0.1)
    p = np.asarray(jax.nn.softmax(e @ c))
    c_over_n = np.asarray(c).T / 40
    exact = (p - np.eye(30)[labels]) @ c_over_n
    rounding = np.linalg.norm(np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32) - exact)
    for threshold, kept, left_out, dropped, spread in table.rows:
        out = (p < threshold) & (np.eye(30)[labels] == 0)
        prior = np.minimum(np.asarray(jax.nn.softmax(e.mean(0) @ c)), cap(threshold, 30))
        changed = np.zeros_like(p)
        for row, q, left in zip(changed, p, out, strict=True):
            row[left] = q[left] - spread_by_hand(q, left, prior, threshold) if left.any() else 0
        assert kept == pytest.approx((~out).sum(1).mean(), abs=0.05)
        assert left_out == pytest.approx(np.where(out, p, 0).sum(1).mean(), abs=5e-5)
        # Rounding to bfloat16 differs where the last bit of float32 does.
        for error, lost in ((dropped, np.where(out, p, 0)), (spread, changed)):
            assert error == pytest.approx(np.linalg.norm(lost @ c_over_n) / rounding, rel=0.02, abs=1e-3)
    assert [row[0] for row in table.rows] == [0.1, 0.1 / 4, 0.1 / 16, 0.1 / 64]
    assert claim.measured == table.rows[0][-1] and claim.holds == (claim.measured <= 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": ("exact",)}, "must hold optax"),
        ({"seeds": 0}, "at least 1"),
        ({"tolerance": None, "losses": ("optax", "kahan")}, "two of"),
        ({"warmup": 16}, "shorter than the run"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)


def test_missing_data_is_the_users_to_put_right(tmp_path):
    config = dataclasses.replace(SMOKE, data=str(tmp_path / "nowhere"))
    with pytest.raises(cli.UserError, match="nowhere"):
        cce.main(config, cli.Run(tmp_path / "run", False, "smoke"))
