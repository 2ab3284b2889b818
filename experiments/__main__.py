"""``python -m experiments`` prints the catalog, and ``python -m experiments NAME ...`` runs one experiment."""

import argparse
import pathlib
import runpy
import shutil
import sys
import textwrap

from experiments.catalog import CATALOG, System, last_report


def describe(system: System, runs: pathlib.Path, width: int) -> str:
    """The catalog's entry for one system, with its last result under ``runs``, wrapped to ``width`` columns."""
    result = "none"
    try:
        if report := last_report(system.name, runs):
            result = f"{report.held} of {len(report.claims)} claims hold ({report.preset}, {report.created[:10]})"
    except ValueError as error:
        result = str(error)
    lines = [
        f"where: {system.home}; experiment: {system.experiment} ({system.state})",
        f"claim: {system.claim}",
        f"last result: {result}",
    ]
    wrapped = [textwrap.fill(line, width, initial_indent="    ", subsequent_indent="      ") for line in lines]
    return "\n".join([f"{system.name}: {system.title}, arXiv {system.paper}", *wrapped])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description="Lists all systems, or runs the experiment of one."
    )
    ready = [system.name for system in CATALOG if system.state == "ready"]
    parser.add_argument("name", nargs="?", choices=ready, metavar="NAME", help="the experiment to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="its flags")
    arguments = parser.parse_args()
    if arguments.name is None:
        width = shutil.get_terminal_size().columns
        print("\n".join(describe(system, pathlib.Path("runs"), width) for system in CATALOG))
        return
    sys.argv[1:] = arguments.args
    runpy.run_module(f"experiments.{arguments.name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
