"""python -m elbo_ext.demo bound: what theory says about the bound, measured, one figure per statement."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch

from ..command_line import (
    EXIT_CODES,
    OutputFolder,
    Parser,
    add_run_options,
    as_json,
    check_run_options,
    count_of_threads,
    say,
    versions,
)
from ..data import load_images, split

FIGURES = {
    "bound_over_counts": "bound_over_k.png",
    "gradient_variance": "gradient_variance.png",
    "gap_over_training": "gap_over_training.png",
    "amortization": "amortization_gap.png",
    "collapse": "collapse.png",
}
NUMBERS = "bound.json"


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = Parser(
        prog="python -m elbo_ext.demo bound",
        description="Measure what theory says about the ELBO, on a linear Gaussian model, where the truth is known, "
        "and on a VAE of binarized digits: the bound over K, the variance of its gradient, its gap, what amortization "
        "costs, and posterior collapse. Prints a table of the statements, and whether they hold; writes one figure "
        f"per statement and {NUMBERS}.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--quick", action="store_true", help="a reduced run, about a tenth of the work")
    add_run_options(
        parser,
        threads="1, as the networks are small",
        seed="the models, the data, the split, the weights, the batches and the noise",
        out="elbo_bound_out",
    )
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the experiments, write the files and print the table; returns bound.json's content."""
    started = time.perf_counter()
    device = check_run_options(options)
    from . import models, plots
    from .experiments.amortization import amortization
    from .experiments.bound_over_counts import bound_over_counts
    from .experiments.collapse import collapse
    from .experiments.gap_over_training import gap_over_training
    from .experiments.gradient_variance import gradient_variance

    size = models.QUICK if options.quick else models.FULL
    train_data, test_data = ((part > 0.5).float().to(device) for part in split(load_images(), 64, options.seed))
    output = OutputFolder(options.out, (*FIGURES.values(), NUMBERS))
    torch.set_num_threads(options.threads or 1)
    say(
        f"Linear Gaussian model in float64; Bernoulli VAE on {len(train_data):,} training and {len(test_data):,} "
        f"test digits, binarized; {device}, {count_of_threads()}, seed {options.seed}."
    )

    seed = options.seed
    digits = models.train_digits(train_data, test_data, size, seed)
    findings = {
        "bound_over_counts": bound_over_counts(digits, size, seed),
        "gradient_variance": gradient_variance(size, seed, device),
        "gap_over_training": gap_over_training(digits, size, seed),
        "amortization": amortization(digits, size, seed),
        "collapse": collapse(train_data, test_data, size, seed),
    }
    figures = {FIGURES[name]: getattr(plots, name)(finding) for name, finding in findings.items()}
    checks = {name: check for finding in findings.values() for name, check in finding.checks.items()}
    results: dict[str, Any] = {
        "unit": "nats, per example",
        **{name: finding.numbers for name, finding in findings.items()},
        "statements": {name: dataclasses.asdict(check) for name, check in checks.items()},
        "checks": {name: check.holds for name, check in checks.items()},
        "size": dataclasses.asdict(size),
        "options": vars(options),
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    output.write({**figures, NUMBERS: as_json(results)})
    say(table(findings))
    say(f"Wrote {', '.join((*FIGURES.values(), NUMBERS))} to {options.out} after {results['seconds']:.0f} s.")
    return results


def table(findings: dict[str, Any]) -> str:
    """The statements as text: what was measured below each, and whether it holds at its end."""
    width = 104
    rule = "-" * (width + 7)
    lines = [rule, f"{'nats per example':<{width}}{'holds':>7}", rule]
    for letter, finding in zip("abcde", findings.values(), strict=False):
        for check in finding.checks.values():
            lines.append(f"({letter}) {check.statement:<{width - 4}}{'yes' if check.holds else 'NO':>7}")
            lines.append(f"      {check.measured}")
        lines.append(rule)
    return "\n".join(lines)
