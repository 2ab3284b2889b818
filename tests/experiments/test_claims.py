"""Reports keep what was measured, also through JSON and back."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import claims
from experiments.claims import Claim, Report, Table

HELD = Claim("loss falls", expected="<= 0.5", measured=0.25, holds=True, source="arXiv 2305.14342, section 3")
FAILED = Claim("accuracy rises | stays", expected=">= 0.9", measured=math.nan, holds=False, source="ours")


def _figure():
    figure = matplotlib.figure.Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2], [3, 4])
    return figure


def _report(**changes):
    report = Report(
        claims=(HELD, FAILED),
        tables={"losses": Table(("optimizer", "loss"), [("sgd", np.float32(0.5)), ("sophia", jnp.float32(jnp.inf))])},
        figures={"curve": _figure()},
        notes=("one seed only",),
        experiment="fake",
        preset="smoke",
        config={"steps": 3, "data": pathlib.Path("corpus"), "mesh": (1, 2)},
        duration=1.5,
    )
    return dataclasses.replace(report, **changes)


def test_write_and_load_give_the_report_back(tmp_path):
    report = _report()
    report.write(tmp_path / "run")
    loaded = Report.load(tmp_path / "run")
    assert loaded.to_dict() == report.to_dict()
    assert loaded.claims[0] == HELD
    assert math.isnan(loaded.claims[1].measured) and not loaded.claims[1].holds
    assert loaded.tables["losses"].rows == [["sgd", 0.5], ["sophia", math.inf]]
    assert loaded.config == {"steps": 3, "data": "corpus", "mesh": [1, 2]}
    assert loaded.figures == {"curve": tmp_path / "run" / "curve.png"}
    assert loaded.figures["curve"].read_bytes().startswith(b"\x89PNG")


def test_written_json_is_strict(tmp_path):
    _report().write(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["claims"][1]["measured"] == "NaN"
    assert data["tables"]["losses"]["rows"][1][1] == "Infinity"


def test_rewriting_a_loaded_report_changes_nothing(tmp_path):
    _report().write(tmp_path / "one")
    Report.load(tmp_path / "one").write(tmp_path / "two")
    Report.load(tmp_path / "two").write(tmp_path / "two")
    for name in ("report.json", "report.md", "curve.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["curve.png", "report.json", "report.md"]


def test_versions_and_devices_are_those_of_this_process():
    report = Report(claims=(HELD,))
    assert report.versions["jax"] == jax.__version__
    assert report.versions["numpy"] == np.__version__
    assert set(report.versions) == {"python", "jaxskip", "jax", "jaxlib", "flax", "optax", "numpy"}
    assert (report.devices["platform"], report.devices["count"]) == (jax.devices()[0].platform, jax.device_count())


@pytest.mark.parametrize("holds", [np.bool_(True), jnp.array(True), np.array(True)])
def test_claim_takes_array_verdicts(holds):
    assert Claim("s", 1, 1, holds, "ours").holds is True


@pytest.mark.parametrize("holds", ["yes", 1, None, np.array([True, False])])
def test_claim_refuses_other_verdicts(holds):
    with pytest.raises(TypeError, match="must be a bool"):
        Claim("s", 1, 1, holds, "ours")


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match="has 1 cells, the header"):
        Table(("a", "b"), [(1, 2), (3,)])


def test_figure_names_are_file_names():
    with pytest.raises(ValueError, match="becomes a file name"):
        Report(claims=(), figures={"../x": _figure()})


def test_unknown_values_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not set"):
        _report(config={"bad": {1, 2}}).write(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_load_names_the_file_that_is_no_report(tmp_path):
    for text in ("{", "[]", "{}", '{"claims": 3}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=r"report\.json is not a report of this version"):
            Report.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / "elsewhere")


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    claims.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        claims.write_atomic(path, "new \ud800")  # a lone surrogate cannot be encoded
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_printed_report_shows_failures(capsys):
    claims.print_report(_report())
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 2 claims hold" in lines
    assert "  holds   loss falls" in lines
    assert "  FAILED  accuracy rises | stays" in lines
    assert "          expected >= 0.9; measured nan (ours)" in lines
    assert "| sophia    |  inf |" in lines


def test_markdown_report_keeps_everything(tmp_path):
    _report().write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    for part in ("1 of 2 hold", "FAILED", "accuracy rises \\| stays", "## losses", "![curve](curve.png)", "- one seed"):
        assert part in text
    assert "| mesh  | 1, 2   |" in text


def test_results_number_the_machines_and_keep_failures():
    here = _report(experiment="one")
    same = _report(experiment="two", claims=(HELD,))
    devices = {"platform": "tpu", "kind": "TPU v5e", "count": 4, "host": "Linux x86_64, 96 CPUs"}
    text = claims.results_markdown([here, same, dataclasses.replace(here, experiment="three", devices=devices)])
    summary = [line for line in text.splitlines() if line.startswith("| [")]
    assert [line.split("|")[2].strip() for line in summary] == ["1 of 2", "1 of 1", "1 of 2"]
    assert [line.split("|")[5].strip() for line in summary] == ["1", "1", "2"]
    assert "2. 4 x TPU v5e (tpu), Linux x86_64, 96 CPUs; python" in text
    assert text.count("| FAILED") == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text().filter(lambda t: "N" not in t),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
).filter(lambda value: value not in ("Infinity", "-Infinity"))


@settings(deadline=None, max_examples=25)
@given(json_values)
def test_json_values_survive(value):
    text = json.dumps(claims.to_json({"value": value}), allow_nan=False)
    assert claims.from_json(json.loads(text)) == {"value": value}


cells = st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab|\n ", max_size=9)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(cells, cells), max_size=5))
def test_table_lines_up(rows):
    lines = claims.format_table(("first", "second"), rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert len({len(line) for line in lines}) == 1
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}
