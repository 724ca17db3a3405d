"""Gradients of every operand, against torch autograd through the reference in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import reference
from elbo_ext.ops import WITH_LOG_PROB
from samples import (
    CORE,
    DTYPES,
    FORMS,
    LAYOUTS,
    NOISE_ERROR,
    OVER_CLASSES,
    SAMPLES,
    Maker,
    Sample,
    classes_shape,
    computed_in,
    devices,
    differentiable,
    elements_shape,
    in_float64,
    joint_shape,
    parametrize,
    rounding,
    run,
    tolerance_of,
)

Arguments = dict[str, Any]
Upstream = Callable[[str, Tensor], Tensor]  # the gradient that flows into an output, by name


# ---- the truth ----


def random_upstream(name: str, output: Tensor) -> Tensor:
    """Not ones: a kernel that forgets the upstream gradient, or mixes up its rows, must be seen."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype).to(output.device)


def constant_upstream(value: float) -> Upstream:
    return lambda name, output: torch.full_like(output, value)


def with_gradients(sample: Sample, arguments: Arguments, names: list[str], upstream: Upstream) -> dict[str, Tensor]:
    """The kernels' gradients of the named arguments."""
    arguments = {k: v.detach().requires_grad_() if k in names else v for k, v in arguments.items()}
    results = {name: result for name, result in run(sample, arguments).items() if result.requires_grad}
    flowing = [upstream(name, result) for name, result in results.items()]
    gradients = torch.autograd.grad(list(results.values()), [arguments[name] for name in names], flowing)
    return dict(zip(names, gradients, strict=True))


def own_shape(sample: Sample, arguments: Arguments, name: str) -> torch.Size:
    """The shape of the elements that an argument takes part in."""
    if name == "noise":
        return arguments[name].shape
    if sample.function in OVER_CLASSES:
        without = OVER_CLASSES[sample.function]
        return (elements_shape if name in without else classes_shape)(sample.function, arguments)
    if arguments.get("likelihood") == "categorical":
        return arguments[name].shape
    if sample.function != "elbo_loss":
        return joint_shape({k: v for k, v in arguments.items() if k != "noise"})
    likelihood = joint_shape({k: v for k, v in arguments.items() if k in ("x", "recon", "weight") or "recon_" in k})
    if name in ("kl", "beta"):
        return likelihood[: arguments.get("batch_dims", 1)]
    if name == "x":  # elbo_loss counts the sample axes by the rank of x
        return likelihood[len(likelihood) - arguments["x"].dim() :]
    if name in ("recon", "weight") or name.startswith("recon_"):
        return likelihood
    return joint_shape({k: v for k, v in arguments.items() if k in ("mu", *FORMS) or k.startswith("prior_")})


def sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    return t.sum_to_size(shape) if t.numel() else t.new_zeros(shape)


def true_gradients(
    sample: Sample, arguments: Arguments, names: list[str], upstream: Upstream, dtypes: dict[str, torch.dtype]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By name: the gradient, the sum of the absolute contributions of all elements to it, and that sum if every element
    contributed as much as the average one. In float64; ``dtypes`` are those of the kernels' outputs."""
    wide = in_float64(arguments)
    full = {
        k: v.expand(own_shape(sample, wide, k)).clone().requires_grad_() if k in names else v for k, v in wide.items()
    }
    results = {name: result for name, result in run(sample, full, reference).items() if result.requires_grad}
    flowing = [upstream(name, result.detach().to(dtypes[name])).double() for name, result in results.items()]
    gradients = torch.autograd.grad(list(results.values()), [full[name] for name in names], flowing)
    truth = {}
    for name, gradient in zip(names, gradients, strict=True):
        shape = wide[name].shape
        average = gradient.abs().mean() if gradient.numel() else gradient.new_zeros(())
        truth[name] = sum_to(gradient, shape), sum_to(gradient.abs(), shape), sum_to(average.expand_as(gradient), shape)
    return truth


def compare(
    sample: Sample,
    arguments: Arguments,
    actual: dict[str, Tensor],
    truth: dict[str, tuple[Tensor, Tensor, Tensor]],
) -> None:
    dtype = computed_in(arguments)
    tolerance = tolerance_of(sample.function, dtype)
    atol = tolerance.gradient_atol
    if sample.function.startswith("rsample") and "noise" not in arguments:
        # A sample's derivative by its scale is the noise; ln q's may be its square, with twice the relative error.
        atol += NOISE_ERROR[dtype] * (2 if sample.function == "rsample_with_log_prob" else 1)
    for name, gradient in actual.items():
        operand, (exact, size, average_size) = arguments[name], truth[name]
        what = f"gradient of {name}, {operand.dtype}"
        assert gradient.shape == operand.shape and gradient.dtype == operand.dtype and gradient.device == operand.device
        gradient = gradient.detach().cpu().double()
        assert bool(gradient.isfinite().all()), what
        # Gradients made in the forward pass are stored, then multiplied by the upstream gradient: rounded twice.
        limit = tolerance.gradient_rtol * size + atol * average_size + 2 * rounding(exact, operand.dtype)
        ratio = ((gradient - exact).abs() / limit).nan_to_num()
        assert bool((ratio <= 1).all()), f"{what}: {ratio.max().item():.2f} times the allowed error"


def check_gradients(
    sample: Sample, arguments: Arguments, names: list[str], upstream: Upstream = random_upstream
) -> dict[str, Tensor]:
    """Compares the gradients with the truth and returns them."""
    actual = with_gradients(sample, arguments, names, upstream)
    dtypes = {name: result.dtype for name, result in run(sample, arguments).items()}
    compare(sample, arguments, actual, true_gradients(sample, arguments, names, upstream, dtypes))
    return actual


# ---- every sample ----


@pytest.mark.parametrize("device", devices())
@parametrize()
def test_gradients(sample: Sample, device: str) -> None:
    for dtype in DTYPES:
        arguments = sample.make(dtype, device)
        check_gradients(sample, arguments, differentiable(arguments))


# Where the truth is 0: weights of zero, nothing to draw, nothing to differentiate.
def without_gradient(sample: Sample, names: list[str]) -> set[str]:
    if sample.id.endswith("-weight-zeros"):
        return set(names) - {"weight", "kl"}
    if sample.id.endswith("-classes-1"):  # which is certain
        return {"logits", "prior_logits"} & set(names)
    return set(names) if sample.id == "rsample-num_samples-0" else set()


@parametrize([sample for sample in SAMPLES if "empty" not in sample.id])
def test_gradients_are_not_silently_zero(sample: Sample) -> None:
    """A comparison of zero with zero proves nothing, so the truth of every sample has to be something else."""
    arguments = sample.make(torch.float32)
    names = differentiable(arguments)
    actual = with_gradients(sample, arguments, names, random_upstream)
    for name in names:
        zero = name in without_gradient(sample, names)
        assert bool((actual[name] == 0).all()) == zero, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["gaussian", "bernoulli", "kl", "rsample_kl", "log_prob", "elbo"])
def test_gradients_as_a_whole(function: str, dtype: torch.dtype) -> None:
    """Relative L2 error, direction and signed bias over thousands of elements.

    Rounding to nearest leaves 0.42 half units in the last place (root mean square), 0.59 if done twice, and no bias;
    truncating in a conversion to bfloat16 would double the one and show in the other.
    """
    sample = next(s for s in SAMPLES if s.id == f"{function}-row-8193")
    arguments = sample.make(dtype)
    names = [name for name in differentiable(arguments) if arguments[name].shape[-1] == 8193]
    actual = with_gradients(sample, arguments, names, random_upstream)
    dtypes = {name: result.dtype for name, result in run(sample, arguments).items()}
    truth = true_gradients(sample, arguments, names, random_upstream, dtypes)
    half_unit = torch.finfo(dtype).eps / 2
    for name in names:
        exact, got = truth[name][0].flatten(), actual[name].double().flatten()
        # In float32 and float64 the few roundings of the formula add to the one of the result, and where it holds the
        # square of the noise, twice the rounding of that.
        allowed = half_unit * (0.65 if half_unit > 1e-4 else 6 if function == "log_prob" else 3)
        assert (got - exact).norm() <= allowed * exact.norm(), name
        assert (got / got.norm() - exact / exact.norm()).norm() <= allowed, name  # the angle between the two
        # In half precision 4.5 standard errors of a mean of 8193 independent errors, and what the float32 formula adds.
        bias = 4.5 / 8193**0.5 * allowed + 1e-7 if half_unit > 1e-4 else half_unit
        assert abs((got - exact).dot(exact.sign())) <= bias * exact.abs().sum(), name


@pytest.mark.parametrize("device", devices())
def test_many_samples(device: str) -> None:
    """100,000 equal contributions: a sum of them in float32, one after the other, is off by 5e-4."""
    count = 100_000
    mu, logvar = (torch.full((1, 3), value, device=device, requires_grad=True) for value in (0.2, -0.3))
    z = elbo_ext.rsample(mu, logvar, num_samples=count)
    _, log_q, _ = elbo_ext.rsample_with_log_prob(mu, logvar, num_samples=count)
    of_mu, of_logvar = torch.autograd.grad(z.mean(0).sum() - log_q.mean(), (mu, logvar))
    torch.testing.assert_close(of_mu, torch.ones_like(of_mu), rtol=1e-6, atol=0)
    bound = 5 / (2 * count**0.5)  # of logvar: 1/2, and sigma/2 times the mean of the noise
    torch.testing.assert_close(of_logvar, torch.full_like(of_logvar, 0.5), rtol=0, atol=bound)
    of_logvar = torch.autograd.grad(-elbo_ext.rsample_with_log_prob(mu, logvar, num_samples=count)[1].mean(), logvar)[0]
    torch.testing.assert_close(of_logvar, torch.full_like(of_logvar, 0.5), rtol=1e-6, atol=0)


# ---- parts of the gradients ----


@parametrize(CORE)
def test_each_gradient_alone(sample: Sample) -> None:
    """An operand that needs no gradient must not disturb the place of the others'."""
    arguments = sample.make(torch.float32)
    for name in differentiable(arguments):
        check_gradients(sample, arguments, [name])


@parametrize([sample for sample in CORE if sample.function == "elbo_loss"])
def test_each_elbo_field_alone(sample: Sample) -> None:
    """The gradient of one or two of loss, log_likelihood and kl. The others then get none at all, not zeros."""
    arguments = sample.make(torch.float32)
    names = differentiable(arguments)
    for wanted in (
        ["loss"],
        ["log_likelihood"],
        ["kl"],
        ["loss", "kl"],
        ["kl", "log_likelihood"],
        ["log_likelihood", "loss"],
    ):
        leaves = {k: v.detach().requires_grad_() if k in names else v for k, v in arguments.items()}
        results = run(sample, leaves)
        used = [name for name in wanted if results[name].requires_grad]
        flowing = [random_upstream(name, results[name]) for name in used]
        actual = torch.autograd.grad(
            [results[name] for name in used], [leaves[name] for name in names], flowing, materialize_grads=True
        )

        def only_wanted(name: str, output: Tensor, wanted: list[str] = wanted) -> Tensor:
            return random_upstream(name, output) if name in wanted else torch.zeros_like(output)

        truth = true_gradients(sample, arguments, names, only_wanted, {k: v.dtype for k, v in results.items()})
        compare(sample, arguments, dict(zip(names, actual, strict=True)), truth)


@pytest.mark.parametrize("value", [0.0, 1.0, 65536.0, 1 / 3, -2.5])
@parametrize([sample for sample in CORE if sample.make(torch.float32).get("reduction") in ("sum", "mean")])
def test_upstream_gradients(sample: Sample, value: float) -> None:
    """GradScaler's 65536 and anything else that may come, where the gradients were made before it was known."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = sample.make(dtype)
        if dtype == torch.float16 and value == 65536.0:
            # The gradients of the others overflow, as they should; those of a mean over many elements need the scale.
            continue
        names = differentiable(arguments)
        gradients = check_gradients(sample, arguments, names, constant_upstream(value))
        if value == 0.0:
            assert all(bool((g == 0).all()) for g in gradients.values())


def test_float16_gradients_below_its_range_survive_scaling() -> None:
    """Gradients of 1e-8 are 0 in float16. A GradScaler multiplies the loss by 65536 to see them, which only helps if
    they are not rounded before."""
    x = torch.full((4096, 16), 0.5, dtype=torch.float16)
    recon = torch.full((4096, 16), 0.25, dtype=torch.float16, requires_grad=True)
    loss = elbo_ext.elbo_loss(recon, x, kl=torch.zeros(4096), recon_std=32.0).loss
    (gradient,) = torch.autograd.grad(loss, recon, torch.tensor(65536.0))
    exact = -(0.5 - 0.25) / 32.0**2 / 4096 * 65536  # 2^-8
    assert torch.equal(gradient, torch.full_like(gradient, exact))


# ---- more than one backward pass ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize(CORE)
def test_backward_twice(sample: Sample, dtype: torch.dtype) -> None:
    """The second pass gives the same gradients, even though the first one's have been given away and overwritten (the
    upstream ones with them: the gradient of mu can be that of z, as it is in torch)."""
    arguments = sample.make(dtype)
    names = differentiable(arguments)
    leaves = {k: v.detach().requires_grad_() if k in names else v for k, v in arguments.items()}
    results = {name: result for name, result in run(sample, leaves).items() if result.requires_grad}
    flowing = [constant_upstream(-4.0)(name, result) for name, result in results.items()]  # an exact factor
    inputs = [leaves[name] for name in names]
    first = torch.autograd.grad(list(results.values()), inputs, [g.clone() for g in flowing], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(float("nan"))
    second = torch.autograd.grad(list(results.values()), inputs, flowing, retain_graph=True)
    third = torch.autograd.grad(list(results.values()), inputs, flowing)
    for name, a, b, c in zip(names, kept, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c), name


def test_gradients_accumulate() -> None:
    """Two losses of the same leaves, and one leaf used twice in a loss."""
    m = Maker(torch.float64, "cpu", 0)
    x, mean, logvar = m.normal(6, 5), m.normal(6, 5).requires_grad_(), m.scale("logvar", 5).requires_grad_()
    elbo_ext.gaussian_log_prob(x, mean, logvar, reduction="mean").backward()
    elbo_ext.gaussian_kl(mean, logvar, reduction="sum").backward()
    total = reference.gaussian_log_prob(x, mean, logvar, reduction="mean") + reference.gaussian_kl(mean, logvar).sum()
    for leaf, exact in zip((mean, logvar), torch.autograd.grad(total, (mean, logvar)), strict=True):
        torch.testing.assert_close(leaf.grad, exact, rtol=1e-14, atol=1e-14)

    # KL(q || q): both gradients meet in one leaf and cancel.
    value = elbo_ext.gaussian_kl(mean, logvar, mean, logvar, reduction="sum")
    assert value == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, (mean, logvar)))
    # d/dt of ln N(t; t, exp(t)) = -t/2 + const
    t = m.normal(7).requires_grad_()
    (slope,) = torch.autograd.grad(elbo_ext.gaussian_log_prob(t, t, t, reduction="sum"), t)
    assert torch.equal(slope, torch.full_like(slope, -0.5))


# ---- weights of zero ----


def poisoned(t: Tensor, hole: Tensor, poison: float) -> Tensor:
    return torch.where(hole, torch.full_like(t, poison), t)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 6e4])
@pytest.mark.parametrize("kind", ["mask", "float", "row-mask"])
@pytest.mark.parametrize("function", ["gaussian", "gaussian-std", "bernoulli", "kl", "elbo", "elbo-bernoulli"])
def test_zero_weight_leaves_an_element_out(function: str, kind: str, poison: float, reduction: str) -> None:
    """Whatever stands at an element of weight zero (padding, NaN for a missing pixel): its gradients are exactly 0,
    and nothing of it reaches the value, a shared scale or the other elements."""
    for dtype in DTYPES:
        m = Maker(dtype, "cpu", 0)
        weight = m.mask(6, 1) if kind == "row-mask" else m.mask(6, 37)
        hole = ~weight.expand(6, 37)
        if kind == "float":
            weight = weight * m.unit(6, 37) + weight  # in [1, 2), or 0

        x, mean, logvar = m.unit(6, 37), m.normal(6, 37), m.scale("logvar", 37)
        operands, common = {
            "gaussian": ({"x": x, "mean": mean}, {"logvar": logvar}),
            "gaussian-std": ({"x": x, "mean": mean, "std": logvar.exp().expand(6, 37)}, {}),
            "bernoulli": ({"x": x, "logits": mean}, {}),
            "kl": ({"mu": x, "logvar": mean}, {"prior_logvar": logvar}),
            "elbo": ({"recon": mean, "x": x}, {"recon_logvar": logvar, "kl": m.unit(6)}),
            "elbo-bernoulli": ({"recon": mean, "x": x}, {"kl": m.unit(6)}),
        }[function]
        options: Arguments = {"weight": weight, "reduction": reduction}
        if function == "elbo-bernoulli":
            options["likelihood"] = "bernoulli"
        name = {"bernoulli": "bernoulli_log_prob", "kl": "gaussian_kl"}.get(function, "gaussian_log_prob")
        sample = Sample("", "elbo_loss" if function.startswith("elbo") else name, lambda m: {}, "")

        clean = {**operands, **common, **options}
        names = differentiable(clean)
        values = run(sample, clean)
        gradients = with_gradients(sample, clean, names, random_upstream)
        for victim in operands:
            dirty = {**clean, victim: poisoned(clean[victim], hole, poison)}
            # Not always the same bits: a register with an infinite scale takes another way to the same numbers.
            for key, value in run(sample, dirty).items():
                torch.testing.assert_close(value, values[key], rtol=16 * torch.finfo(value.dtype).eps, atol=0.0)
            for key, gradient in with_gradients(sample, dirty, names, random_upstream).items():
                if key in operands:
                    assert bool((gradient[hole] == 0).all()), (dtype, victim, key)
                if key == "weight":  # the weight's own gradient is the term, whatever that is
                    gradient, expected = gradient[~hole], gradients[key][~hole]
                else:
                    expected = gradients[key]
                eps = torch.finfo(gradient.dtype).eps
                torch.testing.assert_close(gradient, expected, rtol=16 * eps, atol=16 * eps)


@pytest.mark.parametrize("victim", ["mu", "logvar", "prior_mu", "prior_std", "noise"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -6e4])
@pytest.mark.parametrize("function", ["rsample_kl", *WITH_LOG_PROB, "elbo_loss"])
def test_zero_weight_of_the_kl_leaves_an_element_out(function: str, poison: float, victim: str) -> None:
    """The same for kl_weight, as at the padded steps of a sequence; and a learned weight has no gradient there."""
    m = Maker(torch.float64, "cpu", 0)
    weight = (m.unit(4, 5) + 0.5) * m.mask(4, 5)
    hole = weight == 0
    clean = {"mu": m.normal(4, 5), "logvar": m.scale("logvar", 4, 5), "prior_mu": m.normal(4, 5)}
    clean |= {"prior_std": m.scale("std", 4, 5), "noise": m.normal(3, 4, 5), "kl_weight": weight}
    options: Arguments = {"num_samples": 3}
    if function == "elbo_loss":
        del clean["noise"]
        options = {"recon": m.normal(4, 5), "x": m.normal(4, 5), "reduction": "none"}
        if victim == "noise":
            pytest.skip("no argument of this function")
    elif function != "rsample_kl":
        options["gradient"] = function

    def results(arguments: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Of the KL, or of ln q and ln p."""
        leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
        of = elbo_ext.rsample_with_log_prob if "gradient" in options else getattr(elbo_ext, function)
        values = list(of(**leaves, **options))[1 if function != "elbo_loss" else 2 :]
        total = sum((t * (i + 1)).sum() for i, t in enumerate(values))
        return values, list(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))

    values, gradients = results(clean)
    dirty = {**clean, victim: poisoned(clean[victim], hole, poison)}
    dirty_values, dirty_gradients = results(dirty)
    torch.testing.assert_close(dirty_values, values)
    for name, expected, gradient in zip(clean, gradients, dirty_gradients, strict=True):
        if gradient is None or expected is None:
            assert gradient is expected is None
            continue
        if name == "kl_weight":
            assert gradient.isfinite().all() or poison == -6e4  # a finite term is the gradient
            gradient, expected = gradient[~hole], expected[~hole]
        else:
            assert bool((gradient[..., hole] == 0).all())
        torch.testing.assert_close(gradient, expected)


# ---- memory ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_lie_in_memory_as_torch_would_put_them(name: str, device: str) -> None:
    """Like empty_like: the operand's own strides where it is dense, so that an optimizer meets what it expects."""
    for reduction in ("none", "mean"):
        m = Maker(torch.float32, device, 0)
        x, mean, logvar = (LAYOUTS[name](m.normal(3, 4, 5, 17)).detach().requires_grad_() for _ in range(3))
        likelihood = elbo_ext.gaussian_log_prob(x, mean, logvar, reduction=reduction)
        z, kl = elbo_ext.rsample_kl(mean, logvar, reduction=reduction)
        for output in (likelihood, z, kl):
            leaves = (mean, logvar) if output is not likelihood else (x, mean, logvar)
            for leaf, gradient in zip(
                leaves, torch.autograd.grad(output.sum(), leaves, retain_graph=True), strict=True
            ):
                assert gradient.stride() == torch.empty_like(leaf).stride()


def test_a_kl_without_gradient_has_none() -> None:
    """As in torch: the field of a kl that needs no gradient needs none either, whatever recon does."""
    recon, x, kl = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.rand(4)
    for reduction in ("none", "sum", "mean"):
        elbo = elbo_ext.elbo_loss(recon, x, kl=kl, reduction=reduction)
        assert not elbo.kl.requires_grad and elbo.loss.requires_grad and elbo.log_likelihood.requires_grad
        assert elbo_ext.elbo_loss(recon, x, kl=kl.clone().requires_grad_(), reduction=reduction).kl.requires_grad
