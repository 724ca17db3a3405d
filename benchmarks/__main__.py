"""The command line: measure, print, write; or compare two runs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import elbo_ext

from . import BenchmarkError, compare, goals, rows, suite, tables, training
from .contenders import CONTENDERS

OUT = "benchmark-results"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BenchmarkError(message[:1].lower() + message[1:])


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = _Parser(
        prog="python -m benchmarks",
        description="Measure elbo_ext next to hand-written PyTorch, torch.distributions, torch.compile and a copy of "
        "the same bytes; print tables; write results.json, results.csv, summary.md and figures. benchmarks/NOTES.md "
        "explains the method.",
        epilog="exit codes: 0 all is well; 1 --compare found something slower; 2 an option, a file or the device "
        "cannot be used, or a contender computes something else than the reference (one sentence says what); 130 Ctrl-C, "
        "after which the cases that were done are written.",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, forward + backward, about a minute")
    parser.add_argument(
        "--cases",
        metavar="NAMES",
        type=_cases,
        default=[],
        help=f"only these cases, comma-separated, * and ? allowed: {', '.join(case.name for case in suite.ALL_CASES)}",
    )
    parser.add_argument(
        "--contenders",
        metavar="NAMES",
        type=_contenders,
        default=CONTENDERS,
        help=f"only these, comma-separated: {', '.join(CONTENDERS)}; without the compiled ones it is quick",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        help=f"how long the contenders of a case take turns (default: {suite.SECONDS:g}, "
        f"with --quick {suite.QUICK_SECONDS:g})",
    )
    parser.add_argument("--out", metavar="FOLDER", default=OUT, help="where the results go (default: %(default)s)")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="measure nothing: print what is slower in NEW than in OLD, two results.json",
    )
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _cases(text: str) -> list[str]:
    names = _names(text)
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no cases")
    return names


def _contenders(text: str) -> list[str]:
    names = _names(text)
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no contenders; there are {', '.join(CONTENDERS)}")
    return names


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e6:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number above 0")
        return value

    return parse


def _device(name: str) -> torch.device:
    """The device of that name, tried; raises BenchmarkError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device {name!r} is not a device to measure; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BenchmarkError(
                f"--device {name!r} cannot be used: this PyTorch ({torch.__version__}) sees no CUDA GPU"
            )
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise BenchmarkError(f"--device {name!r} does not exist: PyTorch sees {count}, counted from 0")
        torch.cuda.set_device(device.index or 0)  # which takes no device without a number
    try:
        elbo_ext.rsample_kl(torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device))
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BenchmarkError(f"--device {name!r} cannot be used: {reason}") from None
    return device


def _writable(path: str) -> Path:
    """The folder of that name, created; found out before the clock runs rather than after."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BenchmarkError(f"--out {path!r} cannot be written: {error.strerror or error}") from None
    return folder


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise BenchmarkError(f"--out {str(folder)!r} cannot be written: {error.strerror or error}") from None


def _measure(options: argparse.Namespace) -> None:
    try:
        import tqdm

        from . import plots
    except ImportError as error:
        raise BenchmarkError(f"the benchmarks need {error.name}: pip install 'elbo_ext[bench]'") from None
    device = _device(options.device)
    processors = os.cpu_count() or 1
    if options.threads and options.threads > processors:
        raise BenchmarkError(f"--threads {options.threads} is more than this machine's {processors} processors")
    threads = options.threads or torch.get_num_threads()
    groups = suite.plan(device, threads, quick=options.quick, patterns=options.cases, contenders=options.contenders)
    if not groups:
        raise BenchmarkError("none of the --contenders takes part in these --cases")
    folder = _writable(options.out)
    seconds = options.seconds or (suite.QUICK_SECONDS if options.quick else suite.SECONDS)
    machine = rows.machine(device)
    title = (
        f"{machine['device_name']}, {threads} of {machine['cores']} CPU cores, {machine['instruction_set']}, "
        f"torch {machine['torch']}, elbo_ext {machine['elbo_ext']}, {machine['date']}"
    )
    print(title, flush=True)
    torch.manual_seed(0)
    measured: list[rows.Row] = []
    total = sum(len(group.contenders) for group in groups)
    interrupted = False
    with tqdm.tqdm(total=total, unit="row", dynamic_ncols=True, mininterval=0.5) as bar:
        try:
            for row in suite.run(groups, device, machine, seconds, bar.set_description_str):
                measured.append(row)
                bar.update()
        except KeyboardInterrupt:  # the groups before it are as good as ever
            if not measured:
                raise
            interrupted = True
        bar.set_description_str("measured")

    summary = _summary(measured, title)
    print(f"\n{summary}", end="")
    files = {
        "results.json": rows.to_json(measured).encode(),
        "results.csv": rows.to_csv(measured).encode(),
        "summary.md": summary.encode(),
    }
    _write(folder, files)  # the numbers are safe before the figures are drawn
    figures = plots.all(measured, title)
    _write(folder, figures)
    print(f"\nWrote {', '.join([*files, *figures])} to {options.out}.")
    if interrupted:
        raise KeyboardInterrupt(f"{len(measured)} of {total} rows were")


_MULTIPLES = "The others' times are multiples of ours."


def _summary(measured: list[rows.Row], title: str) -> str:
    """The tables, in Markdown."""
    steps = [row for row in measured if row.work == training.WORK]
    works = [row for row in measured if row.work != training.WORK]
    times, peaks = [], []
    if works:
        what = "Medians of forward + backward, unless it says forward."
        times = ["## Time", f"{what} {_MULTIPLES}", tables.speed(works)]
        peaks = ["## Peak memory beyond inputs, gradients and z", tables.memory(works)]
    if steps:
        what = "Medians of forward, backward and Adam."
        times += ["## Time of whole training steps", f"{what} {_MULTIPLES}", tables.speed(steps)]
        peaks += ["## Peak memory of training steps beyond parameters, gradients and Adam", tables.memory(steps)]
    parts = [
        f"Measured on {title}.",
        *times,
        *_device_part(measured),
        "\n".join(f"- {note}" for note in tables.notes(measured)),
        *peaks,
    ]
    reached = goals.report(measured)
    if reached:
        parts += ["## Goals", reached]
    return "\n\n".join(part for part in parts if part) + "\n"


def _device_part(measured: list[rows.Row]) -> list[str]:
    table = tables.device_speed(measured)
    if not table:
        return []
    return [
        "## Time on the device alone",
        "Replays of a CUDA graph, without Python and launches; the others' times are multiples of ours.",
        table,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code (see --help)."""
    try:
        options = build_parser().parse_args(argv)
        if options.compare:
            return compare.main(*options.compare)
        _measure(options)
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"benchmarks: interrupted, {str(interrupt) or 'nothing was'} written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
