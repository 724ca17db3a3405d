"""python -m elbo_ext.demo by itself: train a variational autoencoder with the fused kernels, and compare.

Trains an MLP VAE on handwritten digits (or on --data) with `rsample_kl` and `elbo_loss`, measures its bound
on the held-out images, trains it again with the plain-PyTorch reference from the same seed and noise, times
the loss part of a step against a hand-written formula, and writes three figures and results.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from typing import Any

import numpy as np
import torch

import elbo_ext

from .. import reference
from .command_line import (
    EXIT_CODES,
    OutputFolder,
    Parser,
    add_model_options,
    add_run_options,
    as_json,
    check_run_options,
    count_of_threads,
    first_line,
    number,
    say,
    versions,
)
from .data import check_likelihood, load_images, split
from .vae import (
    EAGER,
    VAE,
    DemoError,
    History,
    evaluate,
    progress_bar,
    relative_differences,
    seeded,
    time_loss_part,
    time_whole_step,
    train,
)

COMPARED_EPOCHS = 5
"""The fused and the reference losses must agree over so many first epochs ..."""
COMPARED_STEPS = 500
"""... or, when epochs are long, over so many first steps: rounding errors grow as training goes on ..."""
LOSS_TOLERANCE = 1e-4
"""... to this relative difference."""
SMALL_LAYER = 8_000_000
"""Below so many multiplications in a batch's largest layer, one CPU thread is at least as fast as several,
and far faster on a busy machine."""
OUTPUT_FILES = ("learning_curves.png", "reconstructions.png", "samples.png", "results.json")


# --- the demo -----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load, train, evaluate, compare, write the files and print the table; returns results.json's content."""
    started = time.perf_counter()
    device = check_run_options(options)
    from . import plots

    images = load_images(options.data)
    check_likelihood(images, options.likelihood)
    train_data, test_data = (part.to(device) for part in split(images, options.batch_size, options.seed))
    output = OutputFolder(options.out, OUTPUT_FILES)
    pixels = train_data.shape[1]
    if options.threads:
        torch.set_num_threads(options.threads)
    elif options.batch_size * options.hidden * max(options.hidden, pixels) < SMALL_LAYER:
        torch.set_num_threads(1)

    with seeded(device, options.seed):
        model = VAE(train_data.cpu(), options.hidden, options.latent, options.likelihood).to(device)
    twin = copy.deepcopy(model)
    say(
        f"Data: {len(train_data):,} training and {len(test_data):,} test images of "
        f"{' x '.join(map(str, images.shape))} from {images.source}, values {images.scaling}.\n"
        f"Model: {options.likelihood} VAE, {options.latent} latent dimensions, "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; {device}, "
        f"{count_of_threads()}, seed {options.seed}."
    )

    def measure(data: torch.Tensor, num_samples: int, **more: Any) -> dict[str, float]:
        return evaluate(model, data, elbo_ext, num_samples=num_samples, seed=options.seed + 1, **more)

    def test_bound(record: dict[str, float]) -> None:
        measured = measure(test_data, 1)
        record |= {f"test_{name}": measured[name] for name in ("elbo", "log_likelihood", "kl")}

    few = min(100, options.iw_samples)
    untrained = {"train": measure(train_data, few), "test": measure(test_data, few)}
    training = {key: getattr(options, key) for key in ("batch_size", "learning_rate", "seed")}
    timed = {"fused": elbo_ext, "eager": EAGER}
    try:
        fused = train(
            model,
            train_data,
            elbo_ext,
            epochs=options.epochs,
            compiled=options.compile,
            after_epoch=test_bound,
            label="fused kernels",
            **training,
        )
        loss_part = time_loss_part(
            model,
            train_data[: options.batch_size],
            timed | {"reference": reference},
            compiled=tuple(timed) if options.compile else (),
            slow=("reference",),
        )
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise DemoError(f"--compile: torch.compile failed: {first_line(error)}") from None
    whole_step = time_whole_step(model, train_data[: options.batch_size], timed, options.learning_rate)
    compared_epochs = options.epochs if options.compare_epochs is None else options.compare_epochs
    plain = train(
        twin,
        train_data,
        reference,
        epochs=min(options.epochs, compared_epochs),
        label="reference    ",
        **training,
    )

    with progress_bar(
        total=len(test_data) * options.iw_samples, desc="test log p(x)", unit="sample", unit_scale=True
    ) as bar:
        test = measure(test_data, options.iw_samples, progress=bar.update)

    comparison, differences = compare(fused, plain, len(train_data) // options.batch_size)
    results: dict[str, Any] = {
        "unit": "nats per image",
        "train": measure(train_data, few),
        "test": test,
        "untrained": untrained,
        "fused_against_reference": comparison,
        "loss_part_of_a_step": {
            "definition": "sample, KL and likelihood, forward and backward, on fixed tensors; "
            "eager: hand-written PyTorch; reference: the tests' oracle, with NumPy's noise",
            **_with_speedup(loss_part),
        },
        "whole_training_step": _with_speedup(whole_step),
        "recon_logvar": model.recon_logvar.item() if options.likelihood == "gaussian" else None,
        "data": {
            "source": images.source,
            "scaling": images.scaling,
            "shape": list(images.shape),
            "train_images": len(train_data),
            "test_images": len(test_data),
            "low": images.low,
            "high": images.high,
        },
        "options": vars(options),
        "versions": versions(),
        "checks": {
            # Both numbers are estimates: where q(z|x) is exact they may differ by the noise of the draws.
            "log_px_not_below_elbo": test["log_px"] >= test["elbo"] - 4 * test["kl_monte_carlo_error"],
            "fused_agrees_with_reference": comparison["agrees"],
        },
    }

    with torch.no_grad(), seeded(device, options.seed):
        originals = test_data[:36]
        decoded = model.pixels(model.encode(originals)[0])
        prior = model.pixels(torch.randn(96, options.latent, device=device))
    name = f"{options.likelihood.capitalize()} VAE on {os.path.basename(images.source)}"
    look: dict[str, Any] = {"shape": images.shape, "low": images.low, "high": images.high}
    curves = plots.learning_curves(
        fused.epochs,
        plain.epochs,
        untrained["test"],
        differences,
        LOSS_TOLERANCE,
        comparison["steps"],
        f"{name}: one training, with the fused kernels and with plain PyTorch",
    )
    pairs = plots.reconstructions(
        originals.cpu().numpy(),
        decoded.cpu().numpy(),
        title=f"{name}: held-out images and their reconstructions",
        **look,
    )
    sheet = plots.samples(prior.cpu().numpy(), title=f"{name}: decoded samples from the prior", **look)

    results["seconds"] = {
        "fused_training": fused.seconds,
        "reference_training": plain.seconds,
        "total": time.perf_counter() - started,
    }
    results["history"] = {
        "fused": fused.epochs,
        "reference": plain.epochs,
        "fused_losses": fused.losses,
        "reference_losses": plain.losses,
    }
    output.write(dict(zip(OUTPUT_FILES, (curves, pairs, sheet, as_json(results)), strict=True)))
    say(table(results))
    total = results["seconds"]["total"]
    say(f"Wrote {', '.join(OUTPUT_FILES)} to {options.out} after {total:.0f} s.")
    return results


def compare(fused: History, plain: History, steps_an_epoch: int) -> tuple[dict[str, Any], np.ndarray]:
    """The two loss curves: a summary for results.json, and the relative difference of every step."""
    differences = relative_differences(fused.losses, plain.losses)
    steps = min(len(differences), COMPARED_EPOCHS * steps_an_epoch, COMPARED_STEPS)
    first = float(differences[:steps].max(initial=0))
    summary = {
        "definition": "|fused - reference| / max(|reference|, 1 nat) of the loss of a training step",
        "steps": steps,
        "epochs": steps / steps_an_epoch,
        "largest_relative_difference": first,
        "limit": LOSS_TOLERANCE,
        "agrees": first <= LOSS_TOLERANCE,
        "all_steps": len(differences),
        "largest_relative_difference_all_steps": float(differences.max(initial=0)),
    }
    return summary, differences


def _with_speedup(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {**times, "speedup": times["eager"]["median_us"] / times["fused"]["median_us"]}


# --- the command line ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    positive = number(int, 1, "a whole number of 1 or more")
    natural = number(int, 0, "a whole number of 0 or more")
    parser = Parser(
        prog="python -m elbo_ext.demo",
        description="Train a variational autoencoder on handwritten digits with the fused ELBO kernels; "
        "print its bound on held-out images and a comparison with plain PyTorch; write figures and "
        "results.json.",
        epilog="python -m elbo_ext.demo bound shows what the bound is about, python -m elbo_ext.demo counts compares "
        "likelihoods of counts; --help after either has its options. " + EXIT_CODES,
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="images [N, ...] as .npy, .npz (its one array, or x, images, arr_0 or x_train) or MNIST's "
        "idx, .npy and idx also gzipped; uint8 is divided by 255, other numbers are used as they "
        "are (default: scikit-learn's 1,797 digits of 8 x 8 pixels, divided by 16)",
    )
    parser.add_argument(
        "--likelihood",
        choices=("gaussian", "bernoulli"),
        default="gaussian",
        help="p(x|z): gaussian with one learned variance, or bernoulli for data in [0, 1] (default: %(default)s)",
    )
    add_model_options(parser, epochs=60, latent=16, hidden=256, noun="image")
    parser.add_argument(
        "--compare-epochs",
        type=natural,
        metavar="N",
        help="repeat so many epochs with the reference; 0 skips it (default: all)",
    )
    parser.add_argument(
        "--iw-samples",
        type=positive,
        default=1000,
        metavar="K",
        help="samples per test image of the importance-weighted log p(x) (default: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="run the training through torch.compile")
    add_run_options(
        parser,
        threads="1 for small layers, else PyTorch's",
        seed="the split, the weights, the batches and the noise",
        out="elbo_demo_out",
    )
    return parser


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    train, test, untrained = results["train"], results["test"], results["untrained"]
    compared, part, step = (
        results[key] for key in ("fused_against_reference", "loss_part_of_a_step", "whole_training_step")
    )
    width = 58

    def row(label: str, *cells: str) -> str:
        return f"{label:<{width}}" + "".join(f"{cell:>12}" for cell in cells)

    def nats(label: str, first: float | None, second: float) -> str:
        return row(label, *("-" if value is None else f"{value:.2f}" for value in (first, second)))

    def times(label: str, entry: dict[str, Any], suffix: str = "") -> str:
        fused, eager = entry["fused" + suffix]["median_us"], entry["eager" + suffix]["median_us"]
        return row(label, f"{fused:.0f} us", f"{eager:.0f} us", f"{eager / fused:.2f} x")

    rule = "-" * (width + 36)
    lines = [
        rule,
        row("nats per image", "train", "test"),
        rule,
        nats("ELBO before training", untrained["train"]["elbo"], untrained["test"]["elbo"]),
        nats("log-likelihood  E_q log p(x|z)", train["log_likelihood"], test["log_likelihood"]),
        nats("KL(q(z|x) || p(z))", train["kl"], test["kl"]),
        nats("ELBO = log-likelihood - KL", train["elbo"], test["elbo"]),
        nats(f"log p(x), importance-weighted, K = {test['num_samples']:,}", None, test["log_px"]),
        rule,
    ]
    if compared["steps"]:
        lines += [
            row("fused kernels against the reference, same seed and noise", "difference", "limit"),
            rule,
            row(
                f"largest relative difference of the loss, {compared['steps']:,} first steps",
                f"{compared['largest_relative_difference']:.1e}",
                f"{compared['limit']:.0e}",
            ),
            row(
                f"the same, all {compared['all_steps']:,} steps",
                f"{compared['largest_relative_difference_all_steps']:.1e}",
                "-",
            ),
            rule,
        ]
    lines += [
        row("fused kernels against hand-written eager PyTorch (median)", "fused", "eager", "speedup"),
        rule,
        times("loss part of a step (sample, KL, likelihood; both ways)", part),
    ]
    if "fused_compiled" in part:
        lines.append(times("the same, both under torch.compile", part, "_compiled"))
    lines += [times("whole training step (networks and Adam included)", step), rule]
    return "\n".join(lines)
