"""What the kernels return, against the reference in float64 at the same numbers: value, dtype, shape, memory layout."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import arguments, formulas, likelihoods, reference
from samples import (
    CORE,
    DTYPES,
    FLOORS,
    FORMS,
    LAYOUTS,
    NOISE_ERROR,
    OVER_CLASSES,
    Maker,
    Sample,
    Tolerance,
    classes_shape,
    computed_in,
    devices,
    elements_shape,
    in_float64,
    parametrize,
    rounding,
    run,
    tolerance_of,
)

Arguments = dict[str, Any]

REDUCE: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "sum": torch.sum, "mean": torch.mean}


# ---- how far a value may be off ----


def renamed(arguments: Arguments, **names: str) -> Arguments:
    """The arguments that ``names`` mentions, ``new="old"``, under their new names."""
    return {new: arguments[old] for new, old in names.items() if old in arguments}


def error_of_examples(term: Callable[..., Tensor], arguments: Arguments, tolerance: Tolerance) -> Tensor:
    """What the tolerance allows for a term's sum over the elements of each example."""
    weight, dims = arguments.get("weight"), arguments.get("batch_dims", 1)
    operands = {name: v for name, v in arguments.items() if name not in ("weight", "batch_dims", "reduction")}
    error = (
        tolerance.value_rtol * term(**operands, batch_dims=len(elements_shape(term.__name__, operands))).abs()
        + tolerance.value_atol
    )
    if weight is not None:
        error = error * weight.double().abs()
    return error.flatten(dims).sum(-1) if error.dim() > dims else error


def error_of_elbo(arguments: Arguments, tolerance: Tolerance) -> dict[str, Tensor]:
    dims = arguments.get("batch_dims", 1)
    chosen = likelihoods.by_name(arguments.get("likelihood", "gaussian"))
    names = {"x": "x", chosen.recon: "recon", "weight": "weight", "batch_dims": "batch_dims"}
    if "logvar" in chosen.likelihood.forms:
        names |= {form: "recon_" + form for form in (*FORMS, *FLOORS)}
    term = getattr(reference, chosen.likelihood.name + "_log_prob")
    examples = error_of_examples(term, {**renamed(arguments, **names), **chosen.parameters}, tolerance)
    if "kl" in arguments:
        kl = tolerance.value_rtol * arguments["kl"].abs()
    else:
        names = [prefix + name for prefix in ("", "prior_") for name in ("mu", *FORMS, *FLOORS)]
        latent_dims = dims - max(arguments["recon"].dim() - arguments["x"].dim(), 0)
        names = {name: name for name in names} | {"weight": "kl_weight"}
        posterior = {**renamed(arguments, **names), "batch_dims": latent_dims}
        kl = error_of_examples(reference.gaussian_kl, posterior, tolerance)
    beta = torch.as_tensor(arguments.get("beta", 1.0), dtype=torch.float64).abs()
    reduce = REDUCE[arguments.get("reduction", "mean")]
    kl = kl.expand(examples.shape)
    return {"loss": reduce(examples + beta * kl), "log_likelihood": reduce(examples), "kl": reduce(kl)}


def standard_deviation(arguments: Arguments, prefix: str = "") -> Tensor:
    """sigma, 1 if no scale is given."""
    form = next((form for form in FORMS if prefix + form in arguments), "logvar")
    floor = next((floor for floor in FLOORS if prefix + floor in arguments), None)
    scale = torch.as_tensor(arguments.get(prefix + form, 0.0), dtype=torch.float64)
    if floor is None:
        return formulas.standard_deviation(scale, form)
    return formulas.standard_deviation(scale, f"{form}+{floor}", arguments[prefix + floor])


def errors_of_log_probs(
    arguments: Arguments, z: Tensor, error_of_z: Tensor, noise_error: float, tolerance: Tolerance
) -> dict[str, Tensor]:
    """What the tolerance allows for ln q and ln p of each sample: for their parts, and for the noise they are made of."""
    dims = arguments.get("batch_dims", 1) + (arguments.get("num_samples") is not None)

    def standardized(prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        sigma = standard_deviation(arguments, prefix)
        difference = z - arguments.get(prefix + "mu", 0.0)
        parts = ((difference / sigma).square() + 2 * sigma.log().abs() + formulas.LOG_TWO_PI) / 2
        return difference / sigma, sigma, tolerance.value_rtol * parts + tolerance.value_atol

    eps, _, log_q = standardized("")
    u, prior_sigma, log_p = standardized("prior_")
    weight = arguments.get("kl_weight", torch.ones(())).double()
    errors = {"log_q": log_q + eps.abs() * noise_error, "log_p": log_p + (u / prior_sigma).abs() * error_of_z}
    errors = {name: error * weight for name, error in errors.items()}
    return {name: error.reshape(*z.shape[:dims], math.prod(z.shape[dims:])).sum(-1) for name, error in errors.items()}


def allowed_errors(
    sample: Sample, arguments: Arguments, truth: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The allowed error of each output if computed in ``dtype``, without the rounding to the dtype it is stored in.

    Arguments and truth are in float64.
    """
    tolerance = tolerance_of(sample.function, dtype)
    reduce = REDUCE[arguments.get("reduction", "none")]
    if sample.function == "elbo_loss":
        return error_of_elbo(arguments, tolerance)
    if sample.function == "categorical_rsample_kl":  # z is one-hot: right or wrong
        of_kl = {name: v for name, v in arguments.items() if name not in ("noise", "num_samples")}
        return {"z": torch.zeros(()), "kl": reduce(error_of_examples(reference.categorical_kl, of_kl, tolerance))}
    if "z" not in truth:
        return {"value": reduce(error_of_examples(getattr(reference, sample.function), arguments, tolerance))}
    mu, sigma = arguments["mu"], standard_deviation(arguments)
    noise_error = 0.0 if "noise" in arguments else NOISE_ERROR[dtype]
    errors = {"z": tolerance.value_rtol * (mu.abs() + (truth["z"] - mu).abs()) + sigma * noise_error}
    if "log_q" in truth:
        errors |= errors_of_log_probs(arguments, truth["z"], errors["z"], noise_error, tolerance)
    if "kl" in truth:
        posterior = {name: v for name, v in arguments.items() if name not in ("noise", "num_samples", "kl_weight")}
        posterior |= renamed(arguments, weight="kl_weight")
        errors["kl"] = reduce(error_of_examples(reference.gaussian_kl, posterior, tolerance))
    return errors


# ---- every sample ----


@pytest.mark.parametrize("device", devices())
@parametrize()
def test_values(sample: Sample, device: str) -> None:
    for dtype in DTYPES:
        arguments = sample.make(dtype, device)
        wide = in_float64(arguments)
        truth = run(sample, wide, reference)
        allowed = allowed_errors(sample, wide, truth, computed_in(arguments))
        for name, actual in run(sample, arguments).items():
            assert actual.shape == truth[name].shape, f"{name}, {dtype}"
            assert actual.device.type == device, f"{name}, {dtype}"
            # NaN is right where the truth is NaN (the mean of no example), and nowhere else.
            assert torch.equal(actual.cpu().isnan(), truth[name].isnan()), f"{name}, {dtype}"
            limit = allowed[name] + rounding(truth[name], actual.dtype)
            ratio = ((actual.cpu().double() - truth[name]).abs() / limit).nan_to_num()
            assert bool((ratio <= 1).all()), f"{name}, {dtype}: {ratio.max().item():.2f} times the allowed error"


@parametrize()
def test_shapes_and_dtypes(sample: Sample) -> None:
    """As documented, said without the reference: z is what mu and the scale promote to, all else at least float32."""
    for dtype in DTYPES:
        arguments = sample.make(dtype)
        elbo = sample.function == "elbo_loss"
        others = ("mu", *FORMS, "prior_mu", *("prior_" + form for form in FORMS)) if elbo else ()
        operands = {name: v for name, v in arguments.items() if name not in ("noise", "kl", "beta", *others)}
        classes = elbo and arguments.get("likelihood") == "categorical"
        shape = arguments["x"].shape if classes else elements_shape(sample.function, operands)
        reduced = arguments.get("reduction", "mean" if elbo else "none") != "none"
        batch = () if reduced else tuple(shape[: arguments.get("batch_dims", 1)])
        for name, result in run(sample, arguments).items():
            if name == "z" and sample.function in OVER_CLASSES:
                samples = arguments.get("num_samples")
                whole = classes_shape(sample.function, arguments)
                assert tuple(result.shape) == (*(() if samples is None else (samples,)), *whole)
                assert result.dtype == arguments["logits"].dtype
            elif name == "z":
                samples = arguments.get("num_samples")
                scale = next(arguments[form] for form in FORMS if form in arguments)
                promoted = torch.result_type(arguments["mu"], scale if isinstance(scale, Tensor) else arguments["mu"])
                assert tuple(result.shape) == (*(() if samples is None else (samples,)), *shape)
                assert result.dtype == promoted
            else:
                k = arguments.get("num_samples") if name in ("log_q", "log_p") else None
                assert tuple(result.shape) == (*(() if k is None else (k,)), *batch), name
                assert result.dtype == computed_in(arguments), name


# ---- memory ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", LAYOUTS)
def test_sample_keeps_the_layout_of_mu(name: str, device: str) -> None:
    """A dense permuted mu (channels_last) gives a z of the same strides; what is not dense gives what torch would."""
    for dtype in DTYPES:
        m = Maker(dtype, device, 0)
        mu = LAYOUTS[name](m.normal(3, 4, 5, 17))
        like = torch.empty_like(mu).stride()
        if name in ("channels_last", "transposed", "reversed"):
            assert like == mu.stride()
        assert elbo_ext.rsample(mu, 0.0).stride() == like
        assert elbo_ext.rsample_kl(mu, m.scale("logvar", 4, 1, 1))[0].stride() == like
        # The sample's own shape where it has one more axis, or mu is smaller than the scale.
        assert elbo_ext.rsample(mu, 0.0, num_samples=2).is_contiguous()
        assert elbo_ext.rsample(mu, m.scale("logvar", 2, 3, 4, 5, 17)).is_contiguous()


def test_inputs_are_not_written_to() -> None:
    """Operands are read in place, so a kernel that writes to the wrong place would change them."""
    for function in ("gaussian_log_prob", "bernoulli_log_prob", "gaussian_kl", "rsample", "rsample_kl", "elbo_loss"):
        for sample in (s for s in CORE if s.function == function):
            arguments = sample.make(torch.float32)
            before = {name: v.clone() for name, v in arguments.items() if isinstance(v, Tensor)}
            for v in arguments.values():
                if isinstance(v, Tensor) and v.is_floating_point():
                    v.requires_grad_()
            results = run(sample, arguments)
            sum(result.sum() for result in results.values()).backward()
            for name, v in before.items():
                assert torch.equal(arguments[name], v), (sample.id, name)


@parametrize(CORE)
def test_a_minus_sign_beside_the_memory(sample: Sample) -> None:
    """Parts of conjugates: torch negates them when they are read, which the kernels do themselves."""
    arguments = sample.make(torch.float64)
    negated = {
        name: torch.complex(v, -v).conj().imag if isinstance(v, Tensor) and v.dtype == torch.float64 else v
        for name, v in arguments.items()
    }
    assert all(v.is_neg() for v in negated.values() if isinstance(v, Tensor) and v.dtype == torch.float64)
    expected = run(sample, arguments)
    for name, result in run(sample, negated).items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-12, equal_nan=True)


# ---- more than 2^31 elements ----


def test_numbers_of_elements_beyond_32_bits() -> None:
    """A boolean weight with 2^31 + 2^24 elements of its own, nearly all of them False, picks terms from both ends."""
    rows, cols = 2**15 + 2**8, 2**16
    x = torch.arange(rows, dtype=torch.float32).div(1000).unsqueeze(1)
    mean = torch.arange(cols, dtype=torch.float32).div(-3000)
    weight = torch.zeros(rows, cols, dtype=torch.bool)
    picked = [(0, 0), (12_345, 678), (2**15 - 1, cols - 1), (2**15, 0), (2**15 + 7, 4321), (rows - 1, cols - 1)]
    for i, j in picked:
        weight[i, j] = True
    assert sum(i * cols + j >= 2**31 for i, j in picked) == 3
    i, j = (torch.tensor(index) for index in zip(*picked, strict=True))
    terms = -0.5 * ((x[i, 0].double() - mean[j].double()) ** 2 + math.log(2 * math.pi))
    total = elbo_ext.gaussian_log_prob(x, mean, weight=weight, reduction="sum")
    assert total.item() == pytest.approx(terms.sum().item(), rel=2e-7)

    # One sum per column, along strides of 65536: the last three of every second column.
    by_column = elbo_ext.gaussian_log_prob(x.t(), mean[-5::2].unsqueeze(1), weight=weight.t()[-5::2])
    assert by_column[:2].tolist() == [0.0, 0.0]
    assert by_column[2].item() == pytest.approx(terms[j == cols - 1].sum().item(), rel=2e-7)


def test_offsets_beyond_32_bits() -> None:
    """Few elements, far apart: rows 2^30 elements apart, in memory that nobody touches in between."""
    step = 2**30 + 1000
    memory = torch.empty(2 * step + 3000, dtype=torch.bfloat16)
    m = Maker(torch.bfloat16, "cpu", 0)

    def far(values: Tensor, stride: int = 1) -> Tensor:
        return memory.as_strided(values.shape, (step, stride)).copy_(values)

    for stride, n in ((1, 1500), (2, 700), (1, 5)):
        near = m.normal(3, n), m.normal(3, n), m.scale("logvar", 3, n)
        for place in range(3):  # one operand at a time lies far apart, as there is one memory
            operands = [t.detach() for t in near]
            operands[place] = far(near[place], stride)
            for leaf in (*near, *operands):
                leaf.requires_grad_()
            values = elbo_ext.gaussian_log_prob(*operands)
            expected = elbo_ext.gaussian_log_prob(*near)
            assert torch.equal(values, expected)
            for a, b in zip(
                torch.autograd.grad(values.sum(), operands), torch.autograd.grad(expected.sum(), near), strict=True
            ):
                assert torch.equal(a, b)
            torch.manual_seed(0)
            z = elbo_ext.rsample(operands[1], operands[2], num_samples=2)
            torch.manual_seed(0)
            assert torch.equal(z, elbo_ext.rsample(near[1], near[2], num_samples=2))
            memory = memory.detach()


def test_samples_beyond_32_bits() -> None:
    """The noise of the elements beyond 2^31, written where it belongs: 4 GiB of bfloat16, from a mean of one number."""
    size = 2**31 + 5000
    mu = torch.full((), 0.5, dtype=torch.bfloat16).expand(size)
    torch.manual_seed(4)
    seed = int(elbo_ext.ops.draw_seed(torch.device("cpu")))
    torch.manual_seed(4)
    z = elbo_ext.rsample(mu, std=2.0)
    for first in (0, 2**31 - 3000, size - 1001):
        exact = 0.5 + 2.0 * torch.from_numpy(reference.normal_noise(seed, 1001, offset=first))
        error = (z[first : first + 1001].double() - exact).abs()
        assert bool((error <= 3e-6 + rounding(exact, torch.bfloat16)).all()), first


# ---- dtypes of tensors without dimensions ----


@pytest.mark.parametrize("device", devices())
def test_a_number_in_a_tensor_does_not_promote(device: str) -> None:
    """As in torch: of a learned float32 scale, say, or of one that NumPy made, with bfloat16 and float32 data."""
    mu = torch.linspace(-1, 1, 20, dtype=torch.bfloat16, device=device).reshape(4, 5)
    log_std = torch.tensor(0.25, device=device)
    z = elbo_ext.rsample(mu, log_std=log_std, noise=torch.zeros(4, 5, device=device))
    assert z.dtype == torch.bfloat16 == reference.rsample(mu.cpu(), log_std=log_std.cpu()).dtype
    assert torch.equal(z, mu)
    x, std = mu.float(), torch.tensor(np.float64(0.1), device=device, requires_grad=True)
    value = elbo_ext.gaussian_log_prob(x, 0.0, std=std)
    exact = reference.gaussian_log_prob(x.double().cpu(), torch.zeros((), dtype=torch.float64), std=std.detach().cpu())
    assert (
        value.dtype
        == torch.float32
        == reference.gaussian_log_prob(x.cpu(), torch.zeros(()), std=std.detach().cpu()).dtype
    )
    torch.testing.assert_close(value.double().cpu(), exact, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), std)
    assert gradient.dtype == torch.float64  # its operand's
    slope = ((x.double() / 0.1).square() - 1).sum() / 0.1
    torch.testing.assert_close(gradient.cpu(), slope.cpu(), rtol=1e-6, atol=1e-6)
    # Without any tensor that has dimensions they decide themselves.
    zero = torch.zeros((), device=device)
    assert elbo_ext.gaussian_log_prob(zero, 0.0, std=std, batch_dims=0).dtype == torch.float64
    assert elbo_ext.elbo_loss(x, x, kl=torch.zeros((), dtype=torch.float64, device=device)).loss.dtype == torch.float32


# ---- a weight's own gradient ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", [(4, 6), (6,), (4, 1)])
def test_the_weight_of_a_term_that_is_not_finite(shape: tuple[int, ...], device: str) -> None:
    """Where it is zero its gradient is zero, too, and a learned mask survives data that are missing."""
    x = torch.linspace(-1, 1, 24, device=device).reshape(4, 6)
    hole = x.clone()
    hole[:, 2], hole[1] = math.nan, math.inf
    weight = torch.ones(shape, device=device)
    weight[..., 2 if shape[-1] == 6 else 0] = 0.0
    if len(shape) == 2:
        weight[1] = 0.0
    hole = torch.where((weight == 0).expand(4, 6), hole, x)
    for reduction in ("none", "sum"):
        gradients = []
        for module, place in ((elbo_ext, device), (reference, "cpu")):
            leaf = weight.to(place).requires_grad_()
            value = module.gaussian_log_prob(
                hole.to(place), torch.zeros((), device=place), weight=leaf, reduction=reduction
            )
            gradients.append(torch.autograd.grad(value.sum(), leaf)[0].cpu())
        assert bool(gradients[0].isfinite().all())
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", arguments.DATA_DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", sorted(likelihoods.LIKELIHOODS.keys() - {"categorical"})
)  # whose x is a number of a class
def test_data_as_it_comes(name: str, dtype: torch.dtype) -> None:
    """Data of an integer type gives what the same numbers in float give, bit for bit, in any layout."""
    x = torch.arange(60).reshape(4, 15).remainder(7).to(dtype)
    parameters = {
        input: torch.full((15,), 0.4, requires_grad=True)
        for input in likelihoods.LIKELIHOODS[name].inputs
        if input not in ("x", *likelihoods.LIKELIHOODS[name].numbers)
    }
    function = getattr(elbo_ext, f"{name}_log_prob")
    for data in (x, x.t().contiguous().t(), x[:, ::1], x[0].expand(4, 15)):
        results = []
        for given in (data, data.float()):
            value = function(given, **parameters)
            results.append((value, *torch.autograd.grad(value.sum(), list(parameters.values()))))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
