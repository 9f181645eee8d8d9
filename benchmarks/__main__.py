"""Run the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import tempfile
import time
from importlib import import_module
from pathlib import Path

from benchmarks.context import Context
from benchmarks.ggml import VARIABLE, libraries
from benchmarks.report import Section, as_markdown, as_text, machine, summary

#: module of each benchmark, by name
BENCHMARKS = {
    "formats": "formats",
    "optimum": "optimum",
    "kernels": "kernels",
    "speed": "speed",
    "entropy": "entropy",
    "coded": "coded",
    "lossless": "lossless",
    "scm": "scm",
    "convert": "convert",
    "small": "small",
    "sources": "sources",
    "startup": "startup",
    "verify": "verify",
    "load": "loading",
}
RESULTS = Path(__file__).with_name("RESULTS.md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure qformat; see benchmarks/README.md."
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=BENCHMARKS,
        metavar="NAME",
        help=f"one of {', '.join(BENCHMARKS)}; may be repeated",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small inputs and few rounds, to check that everything runs"
    )
    parser.add_argument("--full", action="store_true", help="also convert 4 GB")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--workdir", type=Path, help="where to put about 2 GB of temporary files, on a real disk")
    parser.add_argument(
        "--ggml",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help=f"a libggml-base.so to compare with; may be repeated; {VARIABLE} is another way to name them",
    )
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.quick):
        parser.error("--write is for a whole run: without --only and --quick")
    return arguments


def _write(sections: list[Section], command: str) -> None:
    parts = [
        "# Results",
        "",
        f"Written by `{command}`; what each row means and how to repeat it is in README.md. Rates are medians of",
        "interleaved runs, and ratios are what counts: other machines give other rates.",
        "",
        *(f"* {line}" for line in machine()),
        "",
        summary(sections),
        "",
    ]
    RESULTS.write_text("\n".join(parts) + "\n" + "\n".join(map(as_markdown, sections)), encoding="utf-8")


def main() -> None:
    """Run the benchmarks that the command line selects."""
    arguments = _arguments()
    start = time.perf_counter()
    print("\n".join(machine()), end="\n\n", flush=True)
    sections: list[Section] = []
    builds = libraries(arguments.ggml)
    with tempfile.TemporaryDirectory(prefix="qformat-bench-", dir=arguments.workdir) as directory:
        context = Context(Path(directory), quick=arguments.quick, full=arguments.full, ggml=builds)
        wanted = [module for name, module in BENCHMARKS.items() if not arguments.only or name in arguments.only]
        for module in ["yardsticks", *wanted]:
            found = import_module(f"benchmarks.{module}").run(context)
            for section in [found] if isinstance(found, Section) else found:
                sections.append(section)
                print(as_text(section), flush=True)
    print(summary(sections))
    if arguments.quick:
        print("These are figures of small inputs: repeat without --quick.")
    print(f"Took {time.perf_counter() - start:.0f} s.")
    if arguments.write:
        _write(sections, "python -m benchmarks --write" + (" --full" if arguments.full else ""))


if __name__ == "__main__":
    main()
