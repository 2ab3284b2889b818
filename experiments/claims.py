"""What an experiment hands back: claims that hold or fail, tables, figures, and where they were measured.

A report is a folder: ``report.json`` (everything, for programs), ``report.md`` (the same for people) and one PNG a
figure. JSON knows no NaN and no infinity, so these are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` there
and become floats again in `Report.load`.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jaxskip

REPORT_FILE = "report.json"
_NON_FINITE = {"NaN", "Infinity", "-Infinity"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence that the experiment puts to the test.

    ``expected`` is the bound in words or as a number (``"<= 0.5 x SGD"``), ``measured`` what came out, ``holds`` the
    verdict (a bool, or a NumPy or JAX scalar of that type), ``source`` who says so (paper and section, or "ours").
    """

    statement: str
    expected: Any
    measured: Any
    holds: bool
    source: str

    def __post_init__(self):
        holds = _plain(self.holds)
        if not isinstance(holds, bool):
            raise TypeError(f"Claim.holds must be a bool, got {self.holds!r} for {self.statement!r}")
        object.__setattr__(self, "holds", holds)


@dataclasses.dataclass(frozen=True)
class Table:
    """Column names and rows of cells (numbers, strings, bools or None)."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"table row {tuple(row)} has {len(row)} cells, the header {tuple(self.header)} has "
                                 f"{len(self.header)}")  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version(), "jaxskip": jaxskip.__version__}
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """The devices that JAX computes on (this starts JAX) and the host around them."""
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of one run.

    An experiment gives ``claims`` and what belongs to them; `experiments.cli` fills in ``experiment``, ``preset``,
    ``config`` and ``duration`` (seconds; of a resumed run, the last session only). ``figures`` maps a name (letters,
    digits, ``_`` and ``-``: it becomes the file name) to a matplotlib figure or to the path of a PNG.

    >>> report = Report(claims=[Claim("2 + 2 is 4", expected=4, measured=2 + 2, holds=2 + 2 == 4, source="arithmetic")])
    >>> report.held
    1
    """

    claims: Sequence[Claim]
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    experiment: str = ""
    preset: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    duration: float = 0.0
    created: str = dataclasses.field(default_factory=lambda: utc_now().isoformat(timespec="seconds"))
    versions: Mapping[str, str] = dataclasses.field(default_factory=package_versions)
    devices: Mapping[str, Any] = dataclasses.field(default_factory=machine)

    def __post_init__(self):
        for name in self.figures:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"figure name {name!r} becomes a file name: use letters, digits, '_' and '-' only")

    @property
    def held(self) -> int:
        """How many claims hold."""
        return sum(claim.holds for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a figure is the name of its PNG."""
        return to_json(_shallow(self) | {"figures": {name: f"{name}.png" for name in self.figures}})

    def write(self, directory: str | os.PathLike) -> None:
        """Writes the PNGs, ``report.md`` and, last because it marks a finished run, ``report.json``.

        Raises OSError where the folder cannot be written.
        """
        directory = pathlib.Path(directory)
        content = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in self.figures.items():
            target = directory / f"{name}.png"
            if hasattr(figure, "savefig"):
                figure.savefig(target, dpi=150, bbox_inches="tight")
            elif pathlib.Path(figure).resolve() != target.resolve():
                shutil.copyfile(figure, target)
        write_atomic(directory / "report.md", report_markdown(self))
        write_atomic(directory / REPORT_FILE, content + "\n")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Report":
        """The report that `write` left in ``directory``.

        Raises FileNotFoundError without ``report.json`` and ValueError where that file has other contents.
        """
        path = pathlib.Path(directory) / REPORT_FILE
        text = path.read_text(encoding="utf-8")
        try:
            data = from_json(json.loads(text))
            if data.keys() != {field.name for field in dataclasses.fields(cls)}:
                raise ValueError(f"its keys are {sorted(data)}")
            data["claims"] = tuple(Claim(**claim) for claim in data["claims"])
            data["tables"] = {name: Table(**table) for name, table in data["tables"].items()}
            data["figures"] = {name: path.parent / file for name, file in data["figures"].items()}
            return cls(**data)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a report of this version of jaxskip: {error}") from error


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a file that is afterwards either whole or, if this raises OSError, as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> Any:
    """Plain JSON values from dataclasses, mappings, sequences, paths, NumPy and JAX arrays and scalars.

    Raises TypeError for anything else.
    """
    value = _plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(_shallow(value))
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    raise TypeError(
        f"a report holds numbers, strings, bools, None, paths, dataclasses, mappings and sequences of these, "
        f"not {type(value).__name__}: {value!r}"
    )


def from_json(value: Any) -> Any:
    """Undoes what `to_json` does to NaN and infinities."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NON_FINITE else value


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns also line up as plain text; columns of numbers are flushed right."""
    cells = [[_cell(value).replace("|", "\\|") for value in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(row):
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def print_report(report: Report) -> None:
    """Tables and claims on the terminal; a claim that fails says FAILED."""
    print(f"\n{_headline(report)}\n{_setting(report)}")
    for name, table in report.tables.items():
        print(f"\n{name}\n{format_table(table.header, table.rows)}")
    print(f"\n{report.held} of {len(report.claims)} claims hold")
    for claim in report.claims:
        print(f"  {_verdict(claim):<6}  {claim.statement}")
        print(f"          expected {_cell(claim.expected)}; measured {_cell(claim.measured)} ({claim.source})")
    for note in report.notes:
        print(f"note: {note}")


def report_markdown(report: Report) -> str:
    """The text of ``report.md``."""
    parts = [f"# {_headline(report)}", _setting(report)]
    parts += ["## Claims", f"{report.held} of {len(report.claims)} hold.", _claims_table(report)]
    for name, table in report.tables.items():
        parts += [f"## {name}", format_table(table.header, table.rows)]
    for name in report.figures:
        parts += [f"## {name}", f"![{name}]({name}.png)"]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    if report.config:
        parts += ["## Configuration", format_table(("field", "value"), list(to_json(report.config).items()))]
    return "\n\n".join(parts) + "\n"


def results_markdown(reports: Sequence[Report]) -> str:
    """The text of ``RESULTS.md``: a summary, then the claims of each report, in the order given."""
    settings = list(dict.fromkeys(_setting(report) for report in reports))
    summary = [
        (
            f"[{report.experiment}](#{report.experiment})",
            f"{report.held} of {len(report.claims)}",
            round(report.duration),
            report.created[:10],
            settings.index(_setting(report)) + 1,
        )
        for report in reports
    ]
    parts = [
        "# Results",
        "Written by `python -m experiments.catalog --write-results` from the newest `default` run of each system; "
        "do not edit by hand. A claim that failed stays in the list.",
        format_table(("experiment", "claims that hold", "seconds", "day (UTC)", "machine"), summary),
        "\n".join(f"{number}. {setting}" for number, setting in enumerate(settings, start=1)),
    ]
    for report in reports:
        parts += [f"## {report.experiment}", _claims_table(report), *(f"- {note}" for note in report.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(value: Any) -> Any:
    """NumPy and JAX arrays and scalars as Python values."""
    return value.tolist() if hasattr(value, "tolist") else value


def _shallow(instance: Any) -> dict[str, Any]:
    # dataclasses.asdict would deep-copy matplotlib figures and device arrays.
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _is_number(value: Any) -> bool:
    value = _plain(value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    value = _plain(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return str(value).replace("\n", " ")


def _verdict(claim: Claim) -> str:
    return "holds" if claim.holds else "FAILED"


def _claims_table(report: Report) -> str:
    rows = [(_verdict(c), c.statement, _cell(c.expected), _cell(c.measured), c.source) for c in report.claims]
    return format_table(("verdict", "claim", "expected", "measured", "source"), rows)


def _headline(report: Report) -> str:
    title = " ".join(filter(None, (report.experiment, report.preset, "report")))
    return f"{title}, {report.created}, {report.duration:.1f} s"


def _setting(report: Report) -> str:
    device = report.devices
    packages = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"{device['count']} x {device['kind']} ({device['platform']}), {device['host']}; {packages}"
