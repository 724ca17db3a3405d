"""The table: a row for each function in :data:`STANDARD`; before it the cases of one function alone, by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from elbo_ext import likelihoods

from .classes import CATEGORICAL
from .layouts import channels_last, reversed_dims, stepped, transposed, unaligned, windows
from .maker import Maker, number
from .sample import Sample
from .standard import FLOORS, FORMS, REDUCTIONS, SCALE_SHAPES, Case, standard

_X = dict[str, Any]

# ---- what is tried with one function alone ----


def _gaussian(id: str, build: Callable[[Maker], _X], note: str, core: bool = False) -> Sample:
    return Sample("gaussian-" + id, "gaussian_log_prob", build, note, core)


def _bernoulli(id: str, build: Callable[[Maker], _X], note: str, core: bool = False) -> Sample:
    return Sample("bernoulli-" + id, "bernoulli_log_prob", build, note, core)


def _kl(id: str, build: Callable[[Maker], _X], note: str, core: bool = False) -> Sample:
    return Sample("kl-" + id, "gaussian_kl", build, note, core)


def _rsample(id: str, build: Callable[[Maker], _X], note: str, core: bool = False) -> Sample:
    return Sample("rsample-" + id, "rsample", build, note, core)


def _rsample_kl(id: str, build: Callable[[Maker], _X], note: str, core: bool = False) -> Sample:
    return Sample("rsample_kl-" + id, "rsample_kl", build, note, core)


def _log_prob(id: str, build: Callable[[Maker], _X], note: str, core: bool = False) -> Sample:
    return Sample("log_prob-" + id, "rsample_with_log_prob", build, note, core)


def _elbo(id: str, build: Callable[[Maker], _X], note: str, core: bool = False) -> Sample:
    return Sample("elbo-" + id, "elbo_loss", build, note, core)


GAUSSIAN = [
    *(
        _gaussian(
            f"{form}+{floor}-{extent}",
            lambda m, form=form, floor=floor, shape=shape: {
                "x": m.normal(4, 3, 2, 5),
                "mean": m.normal(4, 3, 2, 5),
                form: number(form) if shape is None else m.scale(form, *shape),
                floor: 0.25,
            },
            "a floor under the scale, in each extent",
            core=extent == "element",
        )
        for form in FORMS
        for floor in FLOORS
        for extent, shape in SCALE_SHAPES.items()
        if extent in ("number", "channel", "element")
    ),
    _gaussian("plain", lambda m: dict(x=m.normal(4, 6), mean=m.normal(4, 6)), "sigma = 1 by default", core=True),
    # -- broadcasting
    _gaussian(
        "x-over-samples",
        lambda m: dict(x=m.normal(4, 6), mean=m.normal(3, 4, 6), logvar=m.scale("logvar", 6), batch_dims=2),
        "x [B, D] against K = 3 means: its gradient is summed over K",
        core=True,
    ),
    _gaussian(
        "mean-vector", lambda m: dict(x=m.normal(5, 9), mean=m.normal(9), logvar=m.scale("logvar", 5, 9)), "mean [D]"
    ),
    _gaussian(
        "mean-number",
        lambda m: dict(x=m.normal(5, 9), mean=0.25, var=m.scale("var", 9)),
        "a constant operand",
        core=True,
    ),
    _gaussian(
        "x-column", lambda m: dict(x=m.normal(5, 1), mean=m.normal(9), logvar=m.scale("logvar", 5, 9)), "x [B, 1]"
    ),
    _gaussian(
        "x-smallest",
        lambda m: dict(x=m.normal(), mean=m.normal(2, 3), std=m.scale("std", 4, 1, 3)),
        "x [], scale [4, 1, 3]",
    ),
    # -- mixed dtypes
    _gaussian(
        "mixed-x-float32",
        lambda m: dict(
            x=m.normal(4, 70, dtype=torch.float32),
            mean=m.normal(4, 70),
            logvar=m.scale("logvar", 70, dtype=torch.float32),
        ),
        "float32 data, a decoder under autocast",
        core=True,
    ),
    _gaussian(
        "mixed-all",
        lambda m: dict(
            x=m.normal(4, 9, dtype=torch.bfloat16),
            mean=m.normal(4, 9),
            std=m.scale("std", 4, 9, dtype=torch.float16),
            weight=m.unit(9, dtype=torch.float32),
        ),
        "four dtypes in one call",
    ),
    _gaussian(
        "mixed-float64-scale",
        lambda m: dict(x=m.normal(4, 9), mean=m.normal(4, 9), logvar=m.scale("logvar", dtype=torch.float64)),
        "one float64 operand makes the result float64",
    ),
    # -- layouts
    _gaussian(
        "layout-windows",
        lambda m: dict(x=windows(m.normal(9, 40)), mean=m.normal(9, 40), var=m.scale("var", 9, 1)),
        "rows overlap in memory",
    ),
    _gaussian(
        "layout-mixed",
        lambda m: dict(
            x=channels_last(m.normal(2, 3, 8, 9)),
            mean=reversed_dims(m.normal(2, 3, 8, 9)),
            logvar=stepped(m.scale("logvar", 2, 3, 8, 9)),
            weight=unaligned(m.mask(3, 8, 9)),
        ),
        "each operand in a layout of its own",
    ),
    # -- sizes
    _gaussian(
        "per-example-scale-long",
        lambda m: dict(x=0.2 * m.normal(5, 9000), mean=0.2 * m.normal(9000), var=m.scale("var", 5, 1)),
        "scale uniform along rows of two blocks",
    ),
    *(
        _gaussian(
            f"scale-repeats-{name}-{reduction}",
            lambda m, shape=shape, own=own, reduction=reduction: dict(
                x=m.normal(*shape),
                mean=m.normal(*shape),
                logvar=m.scale("logvar", *own),
                weight=m.unit(*own),
                reduction=reduction,
            ),
            "scale and weight repeat over stretches longer than a staged tile: tiles end where those do",
        )
        for name, shape, own in (
            ("example", (7, 1500), (7, 1)),
            ("channel", (2, 3, 17, 16), (3, 1, 1)),
            ("nested", (3, 5, 300), (3, 1, 1)),
        )
        for reduction in ("none", "mean")
    ),
    *(
        _gaussian(
            f"scale-of-{name}-{reduction}",
            lambda m, shape=shape, own=own, reduction=reduction: dict(
                x=m.normal(*shape[-2:]), mean=m.normal(*shape), logvar=m.scale("logvar", *own), reduction=reduction
            ),
            "one scale for each run of elements, or for each element of a part that repeats, as x does",
        )
        for name, shape, own in (
            ("example", (40, 128), (40, 1)),
            ("channel", (5, 6, 128), (6, 1)),
            ("sample", (9, 4, 24), (9, 1, 1)),
            ("element", (9, 4, 24), (4, 24)),
            ("pixel", (50, 4, 24), (24,)),
        )
        for reduction in REDUCTIONS
    ),
    *(
        _gaussian(
            f"rows-repeat-{cols}",
            lambda m, cols=cols: dict(
                x=m.normal(50, cols), mean=m.normal(9, 50, cols), std=m.scale("std", 50, cols), batch_dims=2
            ),
            "K samples against one x: stretches of rows that lie together, and end within a tile",
        )
        for cols in (1, 24, 100)
    ),
    _gaussian(
        "scale-of-large-channels",
        lambda m: dict(x=m.normal(20, 3, 18_000), mean=m.normal(20, 3, 18_000), logvar=m.scale("logvar", 3, 1)),
        "values of examples, whose channels are worth being summed apart",
    ),
    _gaussian(
        "scale-of-two-channels",
        lambda m: dict(
            x=m.normal(4200, 2, 64), mean=m.normal(4200, 2, 64), logvar=m.scale("logvar", 2, 1), reduction="mean"
        ),
        "few sums of very many rows",
    ),
    # -- empty, 0-dim, 1-dim
    _gaussian(
        "empty-batch-sum", lambda m: dict(x=m.normal(0, 4), mean=m.normal(4), reduction="sum"), "an empty sum is 0"
    ),
    _gaussian(
        "empty-batch-mean",
        lambda m: dict(x=m.normal(0, 4), mean=m.normal(4), reduction="mean"),
        "an empty mean is NaN, as torch's",
    ),
    _gaussian(
        "empty-event-mean",
        lambda m: dict(x=m.normal(3, 0), mean=m.normal(0), logvar=m.scale("logvar", 3, 1), reduction="mean"),
        "and mean 0",
    ),
    _gaussian(
        "empty-elementwise", lambda m: dict(x=m.normal(3, 0), mean=m.normal(3, 0), batch_dims=2), "no element to return"
    ),
]

DISCRETIZED_GAUSSIAN = [
    Sample(
        f"discretized_gaussian-{form}+{floor}-{extent}",
        "discretized_gaussian_log_prob",
        lambda m, form=form, floor=floor, extent=extent: {
            "x": m.levels(4, 3, 2, 5),
            "mean": m.normal(4, 3, 2, 5),
            form: m.scale(form, *SCALE_SHAPES[extent]),
            floor: 0.25,
            "low": 0.0,
            "high": 1.0,
            "bins": 8,
        },
        "a floor under the scale",
        core=form == "rho" and extent == "element",
    )
    for form in FORMS
    for floor in FLOORS
    for extent in ("channel", "element")
]


BERNOULLI = [
    _bernoulli("bits", lambda m: dict(x=m.bits(4, 6), logits=3 * m.normal(4, 6)), "binary data", core=True),
    _bernoulli("pixels", lambda m: dict(x=m.unit(4, 3, 6), logits=3 * m.normal(4, 3, 6)), "data between 0 and 1"),
    _bernoulli("x-scalar", lambda m: dict(x=m.unit(), logits=m.normal(4, 6), reduction="mean"), "one x for all"),
    _bernoulli(
        "logits-vector",
        lambda m: dict(x=m.bits(40, 9), logits=m.normal(9), reduction="sum"),
        "one distribution, many examples",
    ),
    _bernoulli(
        "weight",
        lambda m: dict(x=m.unit(4, 6), logits=m.normal(4, 6), weight=m.holes(4, 6), reduction="mean"),
        "weights",
        core=True,
    ),
    _bernoulli("mask", lambda m: dict(x=m.unit(4, 6), logits=m.normal(4, 6), weight=m.mask(6)), "a mask"),
    _bernoulli("elementwise", lambda m: dict(x=m.unit(4, 6), logits=m.normal(4, 6), batch_dims=2), "no sum"),
    _bernoulli(
        "mixed",
        lambda m: dict(x=m.unit(4, 60, dtype=torch.float32), logits=m.normal(4, 60)),
        "float32 x, half logits",
        core=True,
    ),
    _bernoulli("empty-batch", lambda m: dict(x=m.unit(0, 4), logits=m.normal(0, 4), reduction="sum"), "no example"),
]

COUNTS = [
    *(
        Sample(
            f"{prefix}-{form}-{theta_form}",
            function,
            lambda m, form=form, theta_form=theta_form, more=more: {
                "x": m.counts(5, 70),
                form: m.scale(form, 5, 70) if form == "mean" else m.normal(5, 70),
                theta_form: m.scale(theta_form, 70),
                **{name: m.normal(5, 70) for name in more},
            },
            "the mean and the dispersion in each form, one dispersion for a gene",
            core=form == "logits",
        )
        for prefix, function, more in (
            ("negative_binomial", "negative_binomial_log_prob", ()),
            ("zinb", "zero_inflated_negative_binomial_log_prob", ("gate_logits",)),
        )
        for form in ("mean", "log_mean", "logits")
        for theta_form in ("theta", "log_theta")
    ),
    *(
        Sample(
            f"poisson-{dtype}".replace("torch.", ""),
            "poisson_log_prob",
            lambda m, dtype=dtype: dict(x=m.counts(5, 70, dtype=dtype), rate=m.positive(70)),
            "counts as they come, without a cast",
        )
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
    ),
    Sample(
        "poisson-number",
        "poisson_log_prob",
        lambda m: dict(x=m.counts(5, 70, dtype=torch.float32), rate=2.5, weight=m.unit(5, 70)),
        "one rate for all; counts above 0 that have a gradient",
    ),
    Sample(
        "poisson-zeros",
        "poisson_log_prob",
        lambda m: dict(x=0 * m.counts(5, 70), log_rate=m.normal(5, 70)),
        "no count at all",
    ),
    Sample(
        "student_t-log_df",
        "student_t_log_prob",
        lambda m: dict(x=m.normal(5, 9), log_df=m.normal(9), scale=m.scale("scale", 5, 1)),
        "degrees of freedom by their logarithm, mean 0",
        core=True,
    ),
]

KL = [
    *(
        _kl(
            f"{form}+{floor}-{prior}",
            lambda m, form=form, floor=floor, of_prior=of_prior: {
                "mu": m.normal(4, 5),
                form: m.scale(form, 4, 5),
                floor: 0.25,
                **{f"prior_{name}": v if name in FLOORS else m.scale(name, 4, 5) for name, v in of_prior(form, floor)},
            },
            "a floor, above which the numbers as given are compared if the prior has the same, else their logarithms",
            core=prior == "same",
        )
        for form in FORMS
        for floor in FLOORS
        for prior, of_prior in {
            "unit": lambda form, floor: (),
            "same": lambda form, floor: ((form, None), (floor, 0.25)),
            "lower": lambda form, floor: ((form, None), (floor, 0.125)),
            "none": lambda form, floor: ((form, None),),
            "other": lambda form, floor: (("std", None), ("min_std" if floor == "min_var" else "min_var", 0.5)),
        }.items()
    ),
    *(
        _kl(
            f"{form}-prior_{prior_form}",
            lambda m, form=form, prior_form=prior_form: {
                "mu": m.normal(4, 5),
                form: m.scale(form, 4, 5),
                "prior_mu": m.normal(4, 5),
                "prior_" + prior_form: m.scale(prior_form, 4, 5),
            },
            "equal forms compare the numbers as given, mixed forms their logarithms",
            core=form == "logvar" or form == prior_form,
        )
        for form in FORMS
        for prior_form in FORMS
    ),
    *(
        _kl(
            f"prior-{form}-{extent}",
            lambda m, form=form, shape=shape: {
                "mu": m.normal(4, 3, 2, 5),
                form: m.scale(form, 3, 1, 1),
                "prior_mu": m.normal(5),
                "prior_" + form: number(form) if shape is None else m.scale(form, *shape),
            },
            "the prior's scale in each extent",
        )
        for form in ("logvar", "std")
        for extent, shape in SCALE_SHAPES.items()
    ),
    _kl(
        "prior-mean-number",
        lambda m: dict(mu=m.normal(4, 5), logvar=m.scale("logvar", 4, 5), prior_mu=0.5),
        "constant prior mean",
        core=True,
    ),
    _kl(
        "prior-mean-only",
        lambda m: dict(mu=m.normal(4, 5), std=m.scale("std", 4, 5), prior_mu=m.normal(5)),
        "learned prior mean, sigma 1",
    ),
    _kl(
        "prior-scale-only",
        lambda m: dict(mu=m.normal(4, 5), logvar=m.scale("logvar", 4, 5), prior_var=m.scale("var", 5)),
        "learned prior scale",
    ),
    _kl(
        "prior-larger",
        lambda m: dict(
            mu=m.normal(5),
            logvar=m.scale("logvar", 5),
            prior_mu=m.normal(3, 4, 5),
            prior_logvar=m.scale("logvar", 4, 1),
            batch_dims=2,
        ),
        "one posterior, many priors: the posterior's gradients are sums",
        core=True,
    ),
    _kl(
        "weight",
        lambda m: dict(mu=m.normal(4, 6), logvar=m.scale("logvar", 4, 6), weight=m.holes(4, 6)),
        "weights, some of them zero",
        core=True,
    ),
    _kl(
        "time-mask",
        lambda m: dict(
            mu=m.normal(4, 3, 7), log_std=m.scale("log_std", 4, 3, 7), weight=m.mask(4, 1, 7), reduction="sum"
        ),
        "a mask over time",
    ),
    _kl(
        "mixed",
        lambda m: dict(mu=m.normal(4, 6), logvar=m.scale("logvar", 4, 6, dtype=torch.float32), prior_mu=m.normal(6)),
        "mixed dtypes",
        core=True,
    ),
    _kl(
        "rows-700x20",
        lambda m: dict(mu=m.normal(700, 20), logvar=m.scale("logvar", 700, 20), reduction="mean"),
        "a usual latent space",
    ),
    _kl("empty-batch", lambda m: dict(mu=m.normal(0, 4), logvar=m.scale("logvar", 0, 4)), "no example"),
    _kl("0-dim", lambda m: dict(mu=m.normal(), logvar=m.scale("logvar"), batch_dims=0, reduction="mean"), "one number"),
]

RSAMPLE = [
    *(
        _rsample(
            f"{form}+{floor}",
            lambda m, form=form, floor=floor: {"mu": m.normal(4, 7), form: m.scale(form, 4, 7), floor: 0.25},
            "a floor under sigma",
            core=form == "rho",
        )
        for form in FORMS
        for floor in FLOORS
    ),
    *(
        _rsample(
            f"num_samples-{k}",
            lambda m, k=k: dict(mu=m.normal(4, 7), logvar=m.scale("logvar", 4, 7), num_samples=k),
            "a leading axis of samples",
            core=k == 3,
        )
        for k in (0, 1, 2, 3)
    ),
    _rsample(
        "num_samples-many",
        lambda m: dict(mu=m.normal(4, 8), std=m.scale("std", 4, 1), num_samples=300),
        "many samples of few elements",
    ),
    _rsample(
        "scale-larger",
        lambda m: dict(mu=m.normal(7), std=m.scale("std", 4, 7)),
        "mu is broadcast, its gradient summed",
        core=True,
    ),
    _rsample(
        "num_samples-broadcast",
        lambda m: dict(mu=m.normal(4, 1), logvar=m.scale("logvar", 7), num_samples=5),
        "both are broadcast",
    ),
    _rsample(
        "noise",
        lambda m: dict(mu=m.normal(4, 7), logvar=m.scale("logvar", 7), noise=m.normal(4, 7)),
        "explicit noise",
        core=True,
    ),
    _rsample(
        "noise-num_samples",
        lambda m: dict(mu=m.normal(4, 7), var=m.scale("var", 4, 7), num_samples=3, noise=m.normal(3, 4, 7)),
        "explicit noise of K samples",
        core=True,
    ),
    _rsample(
        "noise-strided",
        lambda m: dict(mu=m.normal(4, 7), log_std=m.scale("log_std", 4, 1), noise=stepped(transposed(m.normal(4, 7)))),
        "noise with steps",
    ),
    _rsample(
        "mixed",
        lambda m: dict(mu=m.normal(4, 70), logvar=m.scale("logvar", 4, 70, dtype=torch.float32)),
        "half mu, float32 scale: z is float32",
        core=True,
    ),
    _rsample(
        "mixed-noise",
        lambda m: dict(mu=m.normal(4, 70), logvar=m.scale("logvar", 70), noise=m.normal(4, 70, dtype=torch.float32)),
        "float32 noise",
    ),
    _rsample(
        "layout-samples",
        lambda m: dict(
            mu=channels_last(m.normal(2, 3, 4, 5)), logvar=channels_last(m.scale("logvar", 2, 3, 4, 5)), num_samples=2
        ),
        "channels_last mu, K samples",
    ),
    *(
        _rsample(
            f"size-{n}",
            lambda m, n=n: dict(mu=m.normal(n), logvar=m.scale("logvar", n), num_samples=2),
            "sizes around the seams",
        )
        for n in (1, 2, 3, 5, 63, 64, 65, 127, 129, 1023, 1025, 8191, 8193)
    ),
    _rsample("empty", lambda m: dict(mu=m.normal(0, 4), logvar=m.scale("logvar", 4)), "nothing to draw", core=True),
    _rsample(
        "empty-broadcast",
        lambda m: dict(mu=m.normal(0, 3, 1), std=m.scale("std", 0, 3, 5)),
        "nothing, in the joint shape",
    ),
    _rsample("0-dim", lambda m: dict(mu=m.normal(), logvar=m.scale("logvar")), "one number"),
]

RSAMPLE_KL = [
    *(
        _rsample_kl(
            f"{form}+{floor}",
            lambda m, form=form, floor=floor: {
                "mu": m.normal(4, 7),
                form: m.scale(form, 7),
                floor: 0.25,
                "prior_" + form: m.scale(form, 4, 7),
                "prior_" + floor: 0.25,
            },
            "floors under both scales",
            core=form == "rho",
        )
        for form in FORMS
        for floor in FLOORS
    ),
    *(
        _rsample_kl(
            form,
            lambda m, form=form: {"mu": m.normal(4, 7), form: m.scale(form, 4, 7)},
            "sample and KL to the unit prior",
            core=True,
        )
        for form in FORMS
    ),
    _rsample_kl(
        "mu-scalar",
        lambda m: dict(mu=m.normal(), std=m.scale("std", 4, 90), prior_mu=m.normal(90), prior_std=m.scale("std")),
        "one mean for all",
    ),
    _rsample_kl(
        "num_samples-many",
        lambda m: dict(
            mu=m.normal(4, 8),
            logvar=m.scale("logvar", 8),
            prior_mu=m.normal(4, 8),
            prior_logvar=m.scale("logvar"),
            num_samples=300,
        ),
        "the gradients of many samples add up to that of one KL",
    ),
    *(
        _rsample_kl(
            f"scale-of-{name}",
            lambda m, own=own, prior=prior: dict(
                mu=m.normal(40, 32), std=m.scale("std", *own), prior_mu=m.normal(32), prior_std=m.scale("std", *prior)
            ),
            "scales of an example, and of a part that repeats",
        )
        for name, own, prior in (("example", (40, 1), (32,)), ("element", (32,), (40, 1)))
    ),
    *(
        _rsample_kl(
            f"{form}-prior_{prior_form}",
            lambda m, form=form, prior_form=prior_form: {
                "mu": m.normal(4, 7),
                form: m.scale(form, 7),
                "prior_mu": m.normal(7),
                "prior_" + prior_form: m.scale(prior_form, 4, 1),
                "reduction": "mean",
            },
            "a learned prior in its own form",
        )
        for form in FORMS
        for prior_form in FORMS
    ),
    _rsample_kl(
        "prior-larger",
        lambda m: dict(mu=m.normal(5), logvar=m.scale("logvar", 5), prior_mu=m.normal(4, 5), prior_logvar=0.3),
        "z takes the joint shape of posterior and prior",
        core=True,
    ),
    _rsample_kl(
        "noise",
        lambda m: dict(
            mu=m.normal(4, 5), std=m.scale("std", 5), prior_std=m.scale("std"), num_samples=2, noise=m.normal(2, 4, 5)
        ),
        "explicit noise",
        core=True,
    ),
    _rsample_kl(
        "number",
        lambda m: dict(mu=m.normal(4, 5), var=0.5, prior_mu=0.1, prior_var=2.0, reduction="sum"),
        "all scales numbers",
    ),
    _rsample_kl(
        "mixed",
        lambda m: dict(mu=m.normal(4, 70), logvar=m.scale("logvar", 4, 70, dtype=torch.float32)),
        "mixed dtypes",
    ),
    _rsample_kl(
        "rows-700x20",
        lambda m: dict(mu=m.normal(700, 20), logvar=m.scale("logvar", 700, 20), reduction="mean"),
        "a usual latent space",
    ),
    _rsample_kl(
        "kl_weight",
        lambda m: dict(
            mu=m.normal(4, 6), logvar=m.scale("logvar", 6), prior_mu=m.normal(4, 1), kl_weight=m.holes(4, 6)
        ),
        "weights of the KL, some of them zero",
        core=True,
    ),
    _rsample_kl("empty", lambda m: dict(mu=m.normal(0, 4), logvar=m.scale("logvar", 0, 4)), "no example"),
    _rsample_kl("0-dim", lambda m: dict(mu=m.normal(), logvar=m.scale("logvar"), batch_dims=0), "one number"),
]

LOG_PROB_GRADIENTS = ("pathwise", "sticking_the_landing", "score")

LOG_PROB = [
    *(
        _log_prob(
            f"{form}+{floor}-{gradient}",
            lambda m, form=form, floor=floor, gradient=gradient: {
                "mu": m.normal(4, 7),
                form: m.scale(form, 4, 7),
                floor: 0.25,
                "prior_logvar": m.scale("logvar", 7),
                "prior_" + floor: 0.125,
                "num_samples": 2,
                "gradient": gradient,
            },
            "floors under both scales",
            core=form == "rho",
        )
        for form in FORMS
        for floor in FLOORS
        for gradient in LOG_PROB_GRADIENTS
    ),
    *(
        _log_prob(
            f"{form}-{gradient}",
            lambda m, form=form, gradient=gradient: {
                "mu": m.normal(4, 7),
                form: m.scale(form, 4, 7),
                "num_samples": 2,
                "gradient": gradient,
            },
            "every form of the scale, every dependence of ln q; the unit prior",
            core=True,
        )
        for form in FORMS
        for gradient in LOG_PROB_GRADIENTS
    ),
    *(
        _log_prob(
            f"{form}-prior_{prior_form}-{gradient}",
            lambda m, form=form, prior_form=prior_form, gradient=gradient: {
                "mu": m.normal(4, 7),
                form: m.scale(form, 7),
                "prior_mu": m.normal(7),
                "prior_" + prior_form: m.scale(prior_form, 4, 1),
                "gradient": gradient,
            },
            "a learned prior in its own form",
            core=form == prior_form == "logvar",
        )
        for form in FORMS
        for prior_form in FORMS
        for gradient in LOG_PROB_GRADIENTS
    ),
    *(
        _log_prob(
            f"{extent}-prior-{prior_extent}",
            lambda m, shape=shape, prior_shape=prior_shape: dict(
                mu=m.normal(4, 3, 2, 5),
                logvar=number("logvar") if shape is None else m.scale("logvar", *shape),
                prior_mu=0.3 if prior_shape is None else m.normal(*prior_shape),
                prior_logvar=number("logvar") if prior_shape is None else m.scale("logvar", *prior_shape),
                num_samples=3,
                gradient="sticking_the_landing",
            ),
            "gradients of shared operands add up over elements and samples",
        )
        for extent, shape in SCALE_SHAPES.items()
        for prior_extent, prior_shape in SCALE_SHAPES.items()
    ),
    *(
        _log_prob(
            f"batch_dims-{dims}-samples-{k}",
            lambda m, dims=dims, k=k: dict(
                mu=m.normal(2, 3, 5), logvar=m.scale("logvar", 2, 3, 5), num_samples=k, batch_dims=dims
            ),
            "one number for each sample and example",
            core=dims == 1 and k != 3,
        )
        for dims in range(4)
        for k in (None, 1, 3)
    ),
    *(
        _log_prob(
            f"num_samples-many-{gradient}",
            lambda m, gradient=gradient: dict(
                mu=m.normal(4, 8),
                logvar=m.scale("logvar", 4, 8),
                prior_mu=m.normal(8),
                num_samples=300,
                gradient=gradient,
            ),
            "many samples of few elements",
        )
        for gradient in LOG_PROB_GRADIENTS
    ),
    _log_prob(
        "num_samples-rows",
        lambda m: dict(mu=m.normal(30, 64), std=m.scale("std", 30, 1), prior_std=m.scale("std", 30, 1), num_samples=4),
        "a scale for each example, an upstream gradient for each sample of it",
    ),
    _log_prob(
        "prior-larger",
        lambda m: dict(
            mu=m.normal(5), logvar=m.scale("logvar", 5), prior_mu=m.normal(4, 5), prior_logvar=0.3, num_samples=2
        ),
        "z takes the joint shape of posterior and prior",
        core=True,
    ),
    *(
        _log_prob(
            f"noise-{gradient}",
            lambda m, gradient=gradient: dict(
                mu=m.normal(4, 5),
                std=m.scale("std", 5),
                prior_std=m.scale("std"),
                num_samples=2,
                noise=m.normal(2, 4, 5),
                gradient=gradient,
            ),
            "explicit noise, which has no gradient if z is a constant",
            core=True,
        )
        for gradient in LOG_PROB_GRADIENTS[:2]
    ),
    *(
        _log_prob(
            f"kl_weight-{gradient}",
            lambda m, gradient=gradient: dict(
                mu=m.normal(4, 6),
                logvar=m.scale("logvar", 6),
                prior_mu=m.normal(4, 1),
                num_samples=2,
                kl_weight=m.holes(4, 6),
                gradient=gradient,
            ),
            "weights of ln q and ln p, some of them zero",
            core=gradient == "pathwise",
        )
        for gradient in LOG_PROB_GRADIENTS
    ),
    _log_prob(
        "kl_weight-mask",
        lambda m: dict(
            mu=m.normal(4, 3, 6), std=m.scale("std", 6), prior_std=2.0, kl_weight=m.mask(4, 3, 1), batch_dims=2
        ),
        "a mask of steps",
    ),
    _log_prob(
        "number",
        lambda m: dict(mu=m.normal(4, 5), var=0.5, prior_mu=0.1, prior_var=2.0),
        "all scales numbers",
    ),
    _log_prob(
        "mixed",
        lambda m: dict(mu=m.normal(4, 70), logvar=m.scale("logvar", 4, 70, dtype=torch.float32)),
        "mixed dtypes",
    ),
    _log_prob(
        "rows-700x20",
        lambda m: dict(mu=m.normal(700, 20), logvar=m.scale("logvar", 700, 20)),
        "a usual latent space",
    ),
    _log_prob("empty", lambda m: dict(mu=m.normal(0, 4), logvar=m.scale("logvar", 0, 4)), "no example"),
    _log_prob("empty-latent", lambda m: dict(mu=m.normal(3, 0), logvar=m.scale("logvar", 3, 0)), "no dimension"),
    _log_prob(
        "empty-samples", lambda m: dict(mu=m.normal(3, 2), logvar=m.scale("logvar", 3, 2), num_samples=0), "no sample"
    ),
    _log_prob("0-dim", lambda m: dict(mu=m.normal(), logvar=m.scale("logvar"), batch_dims=0), "one number"),
]


ELBO = [
    *(
        _elbo(
            f"{form}+{floor}",
            lambda m, form=form, floor=floor: {
                "recon": m.normal(4, 6),
                "x": m.normal(4, 6),
                "recon_" + form: m.scale(form, 6),
                "recon_" + floor: 0.25,
                "mu": m.normal(4, 3),
                form: m.scale(form, 4, 3),
                floor: 0.125,
                "prior_" + form: m.scale(form, 3),
                "prior_" + floor: 0.5,
            },
            "floors of all three scales",
            core=form == "rho",
        )
        for form in FORMS
        for floor in FLOORS
    ),
    *(
        _elbo(
            f"{likelihood}-{source}-{reduction}",
            lambda m, likelihood=likelihood, source=source, reduction=reduction: dict(
                recon=m.normal(4, 6),
                x=m.unit(4, 6),
                **(_latent(m) if source == "mu" else {"kl": m.unit(4)}),
                likelihood=likelihood,
                beta=0.7,
                reduction=reduction,
            ),
            "reduced: gradients are made in the forward pass",
            core=True,
        )
        for likelihood in ("gaussian", "bernoulli")
        for source in ("mu", "kl")
        for reduction in REDUCTIONS
    ),
    *(
        _elbo(
            f"{form}-prior_{prior_form}",
            lambda m, form=form, prior_form=prior_form: {
                "recon": m.normal(4, 6),
                "x": m.normal(4, 6),
                "mu": m.normal(4, 3),
                form: m.scale(form, 4, 3),
                "prior_mu": m.normal(3),
                "prior_" + prior_form: m.scale(prior_form, 3),
            },
            "the posterior's and the prior's forms",
        )
        for form, prior_form in zip(FORMS, ("logvar", "std", "var", "rho", "log_std"), strict=True)
    ),
    *(
        _elbo(
            f"samples-{likelihood}-{reduction}",
            lambda m, likelihood=likelihood, reduction=reduction: dict(
                recon=m.normal(5, 4, 6),
                x=m.unit(4, 6),
                **_latent(m),
                likelihood=likelihood,
                batch_dims=2,
                reduction=reduction,
            ),
            "K = 5 reconstructions of each example",
            core=reduction != "sum",
        )
        for likelihood in ("gaussian", "bernoulli")
        for reduction in REDUCTIONS
    ),
    _elbo(
        "samples-kl",
        lambda m: dict(
            recon=m.normal(5, 4, 6), x=m.normal(4, 6), kl=m.unit(4), recon_var=m.scale("var", 6), batch_dims=2
        ),
        "the KL broadcasts over K",
    ),
    _elbo(
        "beta-tensor",
        lambda m: dict(recon=m.normal(4, 6), x=m.normal(4, 6), **_latent(m), beta=m.unit()),
        "a learned or scheduled beta",
        core=True,
    ),
    _elbo(
        "beta-vector",
        lambda m: dict(recon=m.normal(4, 6), x=m.normal(4, 6), kl=m.unit(4), beta=m.unit(4), reduction="sum"),
        "one beta per example",
    ),
    _elbo(
        "beta-zero",
        lambda m: dict(recon=m.normal(4, 6), x=m.normal(4, 6), kl=m.unit(4), beta=0),
        "the KL counts for nothing",
    ),
    _elbo("kl-scalar", lambda m: dict(recon=m.normal(4, 6), x=m.normal(4, 6), kl=m.unit()), "one KL for all examples"),
    _elbo(
        "kl-ones",
        lambda m: dict(recon=m.normal(4, 3, 6), x=m.normal(4, 3, 6), kl=m.unit(4, 1), batch_dims=2),
        "kl [4, 1] for a batch [4, 3]",
    ),
    _elbo(
        "weight",
        lambda m: dict(recon=m.normal(4, 6), x=m.normal(4, 6), **_latent(m), weight=m.holes(4, 6)),
        "weights of the likelihood alone",
        core=True,
    ),
    _elbo(
        "mask",
        lambda m: dict(
            recon=m.normal(4, 6),
            x=m.unit(4, 6),
            **_latent(m),
            likelihood="bernoulli",
            weight=m.mask(6),
            reduction="sum",
        ),
        "a mask",
        core=True,
    ),
    _elbo(
        "kl_weight",
        lambda m: dict(
            recon=m.normal(5, 4, 6), x=m.normal(4, 6), **_latent(m), kl_weight=m.mask(4, 1), beta=0.5, batch_dims=2
        ),
        "a mask of the KL alone",
        core=True,
    ),
    _elbo(
        "mixed",
        lambda m: dict(
            recon=m.normal(4, 60),
            x=m.normal(4, 60, dtype=torch.float32),
            **_latent(m),
            recon_logvar=m.scale("logvar", dtype=torch.float32),
        ),
        "float32 data, a model under autocast, one learned float32 scale",
        core=True,
    ),
    _elbo(
        "laplace",
        lambda m: dict(
            recon=m.normal(4, 6), x=m.normal(4, 6), **_latent(m), likelihood=likelihoods.Laplace(log_scale=0.3)
        ),
        "a likelihood with a parameter",
        core=True,
    ),
    *(
        _elbo(
            likelihood.name,
            lambda m, likelihood=likelihood: dict(
                recon=m.normal(4, 6),
                x=m.levels(4, 6),
                **_latent(m),
                likelihood=likelihood(low=0.0, high=1.0, bins=8),
            ),
            "a likelihood with numbers",
            core=True,
        )
        for likelihood in (likelihoods.DiscretizedLogistic, likelihoods.DiscretizedGaussian)
    ),
    _elbo(
        "discretized_gaussian-rho+min_var",
        lambda m: dict(
            recon=m.normal(4, 6),
            x=m.levels(4, 6),
            **_latent(m),
            likelihood="discretized_gaussian",
            recon_rho=m.scale("rho", 6),
            recon_min_var=0.25,
        ),
        "the other likelihood with a Gaussian's scale",
        core=True,
    ),
    _elbo(
        "continuous_bernoulli",
        lambda m: dict(recon=m.normal(4, 6), x=m.unit(4, 6), **_latent(m), likelihood="continuous_bernoulli"),
        "a likelihood of one parameter",
        core=True,
    ),
    _elbo(
        "x-channel",
        lambda m: dict(recon=m.normal(4, 3, 5, 5), x=m.unit(1, 3, 1, 1), **_latent(m)),
        "x is one image of one colour for all",
    ),
    _elbo(
        "batch_dims-0", lambda m: dict(recon=m.normal(4, 6), x=m.normal(4, 6), kl=m.unit(), batch_dims=0), "one example"
    ),
    _elbo(
        "elementwise",
        lambda m: dict(recon=m.normal(4, 6), x=m.normal(4, 6), kl=m.unit(4, 6), batch_dims=2, reduction="none"),
        "no sum",
    ),
    _elbo(
        "empty-batch",
        lambda m: dict(
            recon=m.normal(0, 6), x=m.normal(0, 6), mu=m.normal(0, 3), logvar=m.scale("logvar", 0, 3), reduction="sum"
        ),
        "no example",
        core=True,
    ),
    _elbo(
        "empty-batch-mean",
        lambda m: dict(recon=m.normal(0, 6), x=m.normal(0, 6), kl=m.unit(0)),
        "an empty mean is NaN, as torch's",
    ),
]


# ---- the table ----


def _latent(m: Maker) -> _X:
    return dict(mu=m.normal(4, 3), logvar=m.scale("logvar", 4, 3))


def _gaussian_row(c: Case) -> _X:
    return dict(x=c.normal(), mean=c.normal(beside=True), **c.scale())


def _pixel_row(c: Case, spread: int = 1) -> _X:
    """Bins so wide that some are narrow beside the scale and some are not; outermost ones among them. The derivative by a
    logistic scale is small, the difference of numbers of size 1, where the mean is about as far from x as the scale is large;
    ``spread`` is what keeps most away from there."""
    x, mean = c.levels(), c.draw(lambda *shape, dtype: spread * c.m.normal(*shape, dtype=dtype), beside=True)
    return dict(x=x, mean=mean, **c.scale(), low=0.0, high=1.0, bins=8)


def _latent_row(c: Case) -> _X:
    return dict(mu=c.normal(), **c.scale())


def _two_samples(c: Case) -> _X:
    return dict(_latent_row(c), num_samples=2)


def _elbo_row(c: Case) -> _X:
    return dict(recon=c.normal(), x=c.normal(), kl=c.m.unit(*c.shape[: c.batch_dims]), **c.scale("recon_"))


# The first letters of the forms of a scale: patterns of the cases that try it in each extent.
FORMS_IN = "[lsvr]*-"

STANDARD = [
    *standard(
        "gaussian",
        "gaussian_log_prob",
        _gaussian_row,
        batch_dims=lambda c: _gaussian_row(replace(c, extent=(3, 1))),
    ),
    *standard(
        "bernoulli",
        "bernoulli_log_prob",
        lambda c: dict(x=c.unit(beside=True), logits=c.normal()),
        core=("x-over-samples",),
        rows=2,
        layout=lambda c: dict(x=c.unit(beside=True), logits=c.normal(), weight=c.unit()),
        row=lambda c: dict(x=c.unit(), logits=2 * c.normal()),
    ),
    *standard("laplace", "laplace_log_prob", _gaussian_row, rows=2, forms_of_scale=("log_scale", "scale")),
    *standard(
        "poisson",
        "poisson_log_prob",
        lambda c: dict(x=c.draw(c.m.counts), **c.scale()),
        rows=2,
        forms_of_scale=("log_rate", "rate"),
        without=("layout-all-*", "*-number"),  # nothing would have a gradient
    ),
    *standard(
        "negative_binomial",
        "negative_binomial_log_prob",
        lambda c: dict(x=c.draw(c.m.counts), mean=c.draw(c.m.positive, beside=True), **c.scale()),
        rows=2,
        forms_of_scale=("theta", "log_theta"),
        size_of_parts=4.0,  # derivatives of gamma functions by a dispersion of 1/4 and less
    ),
    *standard(
        "zinb",
        "zero_inflated_negative_binomial_log_prob",
        lambda c: dict(x=c.draw(c.m.counts), mean=c.draw(c.m.positive), gate_logits=c.normal(beside=True), **c.scale()),
        rows=2,
        forms_of_scale=("theta", "log_theta"),
        size_of_parts=4.0,  # as above
        without=("layout-all-*", "row-*[3-9]", "sum-*", "rows-*"),
    ),
    *standard(
        "student_t",
        "student_t_log_prob",
        lambda c: dict(x=c.normal(), df=c.draw(c.m.positive), mean=c.normal(beside=True), **c.scale()),
        rows=2,
        forms_of_scale=("log_scale", "scale"),
        size_of_parts=6.0,  # derivatives of gamma functions by df
        without=("layout-all-*", "row-*[3-9]", "sum-*", "rows-*"),
    ),
    *standard(
        "continuous_bernoulli",
        "continuous_bernoulli_log_prob",
        lambda c: dict(x=c.unit(beside=True), logits=c.normal()),
        rows=2,
        size_of_parts=2.0,  # a x next to ln((e^a - 1) / a)
        row=lambda c: dict(x=c.unit(), logits=5 * c.normal()),
    ),
    *standard(
        "discretized_logistic",
        "discretized_logistic_log_prob",
        lambda c: _pixel_row(c, spread=4),
        rows=2,
        forms_of_scale=("log_scale", "scale"),
        row=lambda c: dict(x=(7 * c.unit()).round(), mean=3 * c.normal(), **c.scale(), low=None, high=None, width=1.0),
    ),
    *standard(
        "discretized_gaussian",
        "discretized_gaussian_log_prob",
        _pixel_row,
        rows=2,
        size_of_parts=2.0,  # the densities at the two ends of a bin, times the ends
        row=lambda c: dict(x=(7 * c.unit()).round(), mean=3 * c.normal(), **c.scale(), low=None, high=None, width=1.0),
    ),
    *standard(
        "kl",
        "gaussian_kl",
        _latent_row,
        core=(FORMS_IN + "channel", FORMS_IN + "element", "batch_dims-*-sum", "layout-transposed"),
        rows=2,
        layout=lambda c: dict(_latent_row(c), prior_mu=c.m.normal(4, 1, 1)),
        row=lambda c: dict(_latent_row(replace(c, form="std")), prior_std=c.m.scale("std", *c.shape[1:])),
    ),
    *standard(
        "rsample",
        "rsample",
        lambda c: dict(mu=c.normal(), **c.scale(beside=True)),
        core=(FORMS_IN + "number", FORMS_IN + "element", "layout-channels_last"),
        rows=2,
    ),
    *standard(
        "rsample_kl",
        "rsample_kl",
        _latent_row,
        core=(FORMS_IN + "scalar", "batch_dims-1-*"),
        without=("sum-*",),
        rows=2,
        forms=_two_samples,
        batch_dims=_two_samples,
        layout=lambda c: dict(_latent_row(c), batch_dims=2),
        row=_two_samples,
    ),
    *standard(
        "log_prob",
        "rsample_with_log_prob",
        _latent_row,
        core=(),
        rows=2,
        layout=lambda c: dict(_two_samples(c), prior_mu=c.normal(), batch_dims=2),
        row=lambda c: dict(_two_samples(c), gradient="sticking_the_landing"),
    ),
    *standard(
        "elbo",
        "elbo_loss",
        _elbo_row,
        core=("recon_log_std-scalar", "recon_log_std-channel", "layout-channels_last"),
        # The batch is that of recon, x and kl together; the likelihood by itself has these cases.
        without=("broadcast-*", "*-over-samples", "crossed", "weight-widening", "layout-all-*", "sum-*", "rows-*"),
        rows=4,
        layout=lambda c: _elbo_row(replace(c, extent=(4, 1, 1))),
        row=lambda c: dict(recon=c.normal(), x=c.normal(), **_latent(c.m), **c.scale("recon_")),
    ),
]
BY_HAND = [
    *CATEGORICAL,
    *GAUSSIAN,
    *DISCRETIZED_GAUSSIAN,
    *BERNOULLI,
    *COUNTS,
    *KL,
    *RSAMPLE,
    *RSAMPLE_KL,
    *LOG_PROB,
    *ELBO,
]
# A case of the standard set that is written by hand as well is the one written by hand.
SAMPLES = [*BY_HAND, *(sample for sample in STANDARD if sample.id not in {by_hand.id for by_hand in BY_HAND})]
assert len({sample.id for sample in SAMPLES}) == len(SAMPLES)
CORE = [sample for sample in SAMPLES if sample.core]


def parametrize(samples: list[Sample] = SAMPLES) -> Any:
    """``@parametrize()`` gives a test the parameter ``sample``."""
    return pytest.mark.parametrize("sample", samples, ids=lambda sample: sample.id)
