"""Every way in which torch can differentiate: numeric checks, torch.func, forward mode, checkpointing, autocast, ...

Truths are finite differences and the reference in float64, differentiated by torch in the same way.
"""

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import elbo_ext
from elbo_ext import elbo_loss, gaussian_kl, gaussian_log_prob, reference, rsample, rsample_kl, rsample_with_log_prob
from samples import CORE, NEEDS_GPU, Maker, Sample, devices, differentiable

DOUBLE = torch.float64

# torch.func takes forward derivatives of some torch operators from a script that it compiles on first use.
# Its rule for logsigmoid, which the reference calls, resizes a buffer and warns of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning"),
]

# Both sides compute in float64; their formulas differ by some roundings in each element of sums of up to 100 elements.
assert_close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

FULL = [sample for sample in CORE if all(t.numel() for t in sample.make(DOUBLE).values() if isinstance(t, Tensor))]
# Every function, term, form and kind of broadcasting, in few elements, for what takes time with their number.
SMALL_IDS = {
    "gaussian-plain",
    "gaussian-batch_dims-2-mean",
    "gaussian-batch_dims-3-none",
    "gaussian-mean-number",
    "gaussian-0-dim",
    "bernoulli-bits",
    "bernoulli-weight",
    "kl-logvar-prior_logvar",
    "kl-logvar-prior_std",
    "kl-std-prior_std",
    "kl-var-prior_var",
    "kl-weight",
    "kl-batch_dims-1-sum",
    "rsample-num_samples-3",
    "rsample-noise",
    "rsample-scale-larger",
    "rsample_kl-log_std",
    "rsample_kl-noise",
    "rsample_kl-prior-larger",
    "log_prob-noise-pathwise",
    "log_prob-prior-larger",
    "elbo-gaussian-mu-mean",
    "elbo-gaussian-kl-sum",
    "elbo-bernoulli-mu-none",
    "elbo-beta-tensor",
    "elbo-recon_log_std-channel",
    "elbo-samples-gaussian-mean",
    "elbo-mask",
}
SMALL = [sample for sample in FULL if sample.id in SMALL_IDS]
# One of each function, for the slowest test.
SMALLEST_IDS = {
    "gaussian-0-dim",
    "gaussian-batch_dims-2-mean",
    "bernoulli-weight",
    "kl-std-prior_std",
    "rsample-noise",
    "rsample_kl-log_std",
    "log_prob-noise-pathwise",
    "elbo-gaussian-mu-mean",
    "elbo-beta-tensor",
}
# Some of each function, to be repeated on a GPU: other kernels, reached through autograd in the same ways.
ON_GPU_IDS = SMALLEST_IDS | {
    "rsample-num_samples-3",
    "log_prob-noise-sticking_the_landing",
    "log_prob-logvar-prior_logvar-score",
}


def leaves_something_out(sample: Sample) -> bool:
    """Its gradient leaves a dependence out, or is passed straight through, so that differences of values do not find it."""
    return sample.make(DOUBLE).get("gradient", "pathwise") != "pathwise" or sample.function == "categorical_rsample_kl"


# For what is compared with the reference and not with differences.
COMPARED = [
    *SMALL,
    *(s for s in FULL if s.id in ("log_prob-noise-sticking_the_landing", "log_prob-logvar-prior_logvar-score")),
]


def on_gpu(sample: Sample) -> Sample:
    def build(m: Maker) -> dict[str, Any]:
        return {name: v.cuda() if isinstance(v, Tensor) else v for name, v in sample.build(m).items()}

    return replace(sample, id=sample.id + "-cuda", build=build)


def each(samples: list[Sample]) -> Any:
    """Each of the samples, and some of them on a GPU."""
    again = [pytest.param(on_gpu(sample), marks=NEEDS_GPU) for sample in samples if sample.id in ON_GPU_IDS]
    return pytest.mark.parametrize("sample", [*samples, *again], ids=lambda sample: sample.id)


ON_DEVICES = pytest.mark.parametrize("device", devices())


def on_tensors(sample: Sample, module: ModuleType = elbo_ext) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The sample as a function of its differentiable operands alone, with the same draws in every call."""
    arguments = sample.make(DOUBLE)
    # Operands of several dtypes would hide in the rounding what is to be seen.
    arguments = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    names = differentiable(arguments)

    def function(*values: Tensor) -> Any:
        torch.manual_seed(0)
        result = getattr(module, sample.function)(**{**arguments, **dict(zip(names, values, strict=True))})
        return tuple(result) if isinstance(result, tuple) else result

    return function, tuple(arguments[name] for name in names)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


def weighted_sum(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A scalar that weights every element of every result differently, so that no gradient can be mistaken."""

    def scalar(*values: Tensor) -> Tensor:
        outputs = as_tuple(function(*values))
        return sum((t * (1.0 + k + torch.arange(t.numel()).to(t).reshape(t.shape))).sum()
                   for k, t in enumerate(outputs))  # fmt: skip

    return scalar


def both(build: Callable[[ModuleType], Any]) -> None:
    """The same thing built on the kernels and on the reference is the same."""
    assert_close(build(elbo_ext), build(reference))


def test_the_table_has_the_small_samples() -> None:
    assert {sample.id for sample in SMALL} == SMALL_IDS
    assert SMALLEST_IDS < SMALL_IDS
    assert ON_GPU_IDS <= {sample.id for sample in COMPARED}


# ---- against finite differences ----


def draws(sample: Sample) -> bool:
    return "rsample" in sample.function and "noise" not in sample.make(DOUBLE)


@each([sample for sample in FULL if not leaves_something_out(sample)])
def test_gradcheck(sample: Sample) -> None:
    """Backward, forward mode, and batches of both, along random directions."""
    function, values = on_tensors(sample)
    values = tuple(v.detach().clone().requires_grad_() for v in values)
    # torch.func.vmap would not let a function draw without being told how; that is tested below.
    batched_forward = not draws(sample)
    assert gradcheck(function, values, fast_mode=True, check_forward_ad=True, check_backward_ad=True,
                     check_batched_grad=True, check_batched_forward_grad=batched_forward)  # fmt: skip


@each([sample for sample in SMALL if sample.id in SMALLEST_IDS])
def test_gradcheck_of_every_entry(sample: Sample) -> None:
    function, values = on_tensors(sample)
    values = tuple(v.detach().clone().requires_grad_() for v in values)
    assert gradcheck(function, values, check_undefined_grad=True, check_forward_ad=True)


@each(SMALL)
def test_gradgradcheck(sample: Sample) -> None:
    """Backward and forward mode of the backward pass."""
    function, values = on_tensors(sample)
    values = tuple(v.detach().clone().requires_grad_() for v in values)
    assert gradgradcheck(function, values, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True)


# ---- torch.func ----


@each(COMPARED)
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda transform: transform.__name__)
def test_jacobians(sample: Sample, transform: Callable[..., Any]) -> None:
    if transform is not jacrev and draws(sample):
        pytest.skip("jacfwd maps over the function, and a mapped reference cannot draw")
    everything = tuple(range(len(on_tensors(sample)[1])))

    def build(module: ModuleType) -> Any:
        function, values = on_tensors(sample, module)
        return transform(weighted_sum(function) if transform is hessian else function, argnums=everything)(*values)

    both(build)


@each(COMPARED)
def test_third_derivatives(sample: Sample) -> None:
    def build(module: ModuleType) -> Any:
        function, values = on_tensors(sample, module)
        scalar = weighted_sum(function)
        direction = tuple(torch.linspace(-1, 1, v.numel()).to(v).reshape(v.shape) for v in values)
        everything = tuple(range(len(values)))

        def along(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def slope(*at: Tensor) -> Tensor:
                return sum((g * d).sum() for g, d in zip(grad(of, everything)(*at), direction, strict=True))

            return slope

        return along(along(along(scalar)))(*values)

    both(build)


@each(COMPARED)
def test_vjp_jvp_and_linearize(sample: Sample) -> None:
    def build(module: ModuleType) -> Any:
        function, values = on_tensors(sample, module)
        scalar = weighted_sum(function)
        tangents = tuple(torch.cos(torch.arange(v.numel()).to(v)).reshape(v.shape) for v in values)
        value, pull_back = vjp(scalar, *values)
        return jvp(scalar, values, tangents), pull_back(torch.full_like(value, 2.0))

    both(build)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own graph surgery
def test_linearize() -> None:
    x, mean, logvar, tangent = torch.randn(4, 3, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    both(lambda module: linearize(lambda m, s: module.gaussian_log_prob(x, m, s), mean, logvar)[1](tangent, x))


NESTED: dict[str, Callable[[ModuleType], Callable[[Tensor], Tensor]]] = {
    "gaussian_log_prob": lambda m: lambda v: m.gaussian_log_prob(v.cos(), v, v / 2, reduction="mean"),
    "bernoulli_log_prob": lambda m: lambda v: m.bernoulli_log_prob(v.sigmoid(), v, reduction="sum"),
    "gaussian_kl": lambda m: lambda v: m.gaussian_kl(v, v, reduction="sum"),
    "rsample": lambda m: lambda v: m.rsample(v, v, noise=v.sin()).pow(2).sum(),
    "rsample_kl": lambda m: lambda v: sum(t.pow(2).sum() for t in m.rsample_kl(v, v, noise=v.sin())),
    "rsample_with_log_prob": lambda m: (
        lambda v: sum(t.pow(2).sum() for t in m.rsample_with_log_prob(v, v, v.cos(), v / 2, noise=v.sin()))
    ),
    "sticking_the_landing": lambda m: (
        lambda v: sum(
            t.pow(2).sum() for t in m.rsample_with_log_prob(v, v, noise=v.sin(), gradient="sticking_the_landing")
        )
    ),
    "elbo_loss": lambda m: lambda v: m.elbo_loss(v, v.cos(), v, v, recon_logvar=v[0]).loss,
}


@ON_DEVICES
@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize(
    "transforms",
    [(jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd, jacrev)],
    ids=lambda transforms: "-".join(t.__name__ for t in transforms),
)
def test_nested_transforms(name: str, transforms: Sequence[Callable[..., Any]], device: str) -> None:
    value = torch.linspace(-1, 1, 4, dtype=DOUBLE, device=device).reshape(2, 2)

    def build(module: ModuleType) -> Any:
        function = NESTED[name](module)
        for transform in reversed(transforms):
            function = transform(function)
        return function(value), vmap(function)(torch.stack([value, 2 * value]))

    both(build)


# ---- vmap ----


MAPS = ["all", "first", "others"]


def mapped(sample: Sample, pattern: str) -> tuple[tuple[Tensor, ...], tuple[int | None, ...], list[tuple[Tensor, ...]]]:
    """Operands with an axis of three to map, where it is, and the operands of each slice.

    The axis stands first, last or in the middle, in turns.
    """
    slices = [on_tensors(sample)[1]]
    slices += [tuple(v * factor for v in slices[0]) for factor in (0.5, 0.75)]
    operands: list[Tensor] = []
    dims: list[int | None] = []
    for i, parts in enumerate(zip(*slices, strict=True)):
        if {"all": True, "first": i == 0, "others": i != 0}[pattern]:
            dims.append((0, -1, parts[0].dim() // 2)[i % 3])
            operands.append(torch.stack(parts, dims[-1]))
        else:
            dims.append(None)
            operands.append(parts[0])
    picked = [tuple(t if d is None else t.select(d, k) for t, d in zip(operands, dims, strict=True)) for k in range(3)]
    return tuple(operands), tuple(dims), picked


def maps_something(sample: Sample, pattern: str) -> bool:
    return pattern != "others" or len(on_tensors(sample)[1]) > 1


PAIRS = [(sample, pattern) for sample in FULL for pattern in MAPS if maps_something(sample, pattern)]
MAPPED = pytest.mark.parametrize(
    ("sample", "pattern"),
    [*PAIRS, *(pytest.param(on_gpu(s), p, marks=NEEDS_GPU) for s, p in PAIRS if s.id in ON_GPU_IDS)],
    ids=lambda value: value.id if isinstance(value, Sample) else value,
)


@MAPPED
def test_vmap(sample: Sample, pattern: str) -> None:
    """Each slice as the reference computes it on its own; all slices with one draw."""
    operands, dims, slices = mapped(sample, pattern)
    actual = vmap(on_tensors(sample)[0], in_dims=dims, randomness="same")(*operands)
    truth = [as_tuple(on_tensors(sample, reference)[0](*values)) for values in slices]
    assert_close(as_tuple(actual), tuple(torch.stack(parts) for parts in zip(*truth, strict=True)))


@MAPPED
def test_per_sample_gradients(sample: Sample, pattern: str) -> None:
    operands, dims, slices = mapped(sample, pattern)
    scalar = weighted_sum(on_tensors(sample)[0])
    actual = vmap(grad(scalar, tuple(range(len(dims)))), in_dims=dims, randomness="same")(*operands)
    truth = []
    for values in slices:
        leaves = [v.detach().clone().requires_grad_() for v in values]
        truth.append(torch.autograd.grad(weighted_sum(on_tensors(sample, reference)[0])(*leaves), leaves))
    assert_close(actual, tuple(torch.stack(parts) for parts in zip(*truth, strict=True)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_vmap_of_a_mask() -> None:
    x, mean = numbers(4, 3), numbers(4, 3, seed=1)
    masks = numbers(5, 4, 3, seed=2) > 0
    both(lambda module: vmap(lambda w: module.gaussian_log_prob(x, mean, weight=w))(masks))
    both(lambda module: vmap(grad(lambda m, w: module.gaussian_log_prob(x, m, weight=w, reduction="mean")), (None, 0))(
        mean, masks))  # fmt: skip


def test_vmap_of_beta_and_kl() -> None:
    recon, x, kl, betas = numbers(4, 3), numbers(4, 3, seed=1), numbers(5, 4, seed=2), numbers(5, seed=3)
    for reduction in ("none", "sum", "mean"):
        both(lambda module, r=reduction: tuple(vmap(lambda k, b: module.elbo_loss(recon, x, kl=k, beta=b, reduction=r))(
            kl, betas)))  # fmt: skip


def test_nested_vmap() -> None:
    x, mean, logvar = numbers(5, 3), numbers(4, 3, seed=1), numbers(3, seed=2)

    def build(module: ModuleType) -> Tensor:
        one = partial(module.gaussian_log_prob, batch_dims=0)
        return vmap(vmap(one, in_dims=(0, None, None)), in_dims=(None, 0, None), out_dims=1)(x, mean, logvar)

    both(build)
    assert_close(build(elbo_ext), reference.gaussian_log_prob(x[:, None], mean, logvar, batch_dims=2))


def test_vmap_in_chunks() -> None:
    mu, logvar = numbers(7, 4, 3), numbers(3, seed=1)
    actual = vmap(lambda m: gaussian_kl(m, logvar), chunk_size=3)(mu)
    assert_close(actual, reference.gaussian_kl(mu, logvar, batch_dims=2))


@pytest.mark.parametrize("num_samples", [None, 2])
def test_vmap_of_noise(num_samples: int | None) -> None:
    lead = () if num_samples is None else (num_samples,)
    mu, noise, logvar = numbers(5, 4, 3), numbers(5, *lead, 4, 3, seed=1), numbers(3, seed=2)
    for dims in ((0, 0, None), (None, 0, None), (0, None, None)):
        given = zip((mu, noise, logvar), dims, strict=True)
        at = tuple(t[0] if d is None and t is not logvar else t for t, d in given)
        both(lambda module, d=dims, a=at: vmap(
            lambda m, n, s: module.rsample_kl(m, s, noise=n, num_samples=num_samples), in_dims=d)(*a))  # fmt: skip


# -- randomness


def draw(num_samples: int | None, mu: Tensor, logvar: Tensor) -> Tensor:
    return rsample(mu, logvar, num_samples=num_samples)


def draw_beside_kl(num_samples: int | None, mu: Tensor, logvar: Tensor) -> Tensor:
    return rsample_kl(mu, logvar, num_samples=num_samples)[0]


DRAWS = pytest.mark.parametrize("function", [draw, draw_beside_kl])
SAMPLES = pytest.mark.parametrize("num_samples", [None, 3])


@ON_DEVICES
@DRAWS
@SAMPLES
def test_vmap_same_randomness(function: Callable[..., Tensor], num_samples: int | None, device: str) -> None:
    """Every slice gets the draw of a call without vmap, from one seed."""
    mu, logvar = numbers(5, 4, 3).to(device), numbers(3, seed=1).to(device)
    torch.manual_seed(0)
    z = vmap(partial(function, num_samples), in_dims=(0, None), randomness="same")(mu, logvar)
    after = torch.rand(1, device=device)
    torch.manual_seed(0)
    slices = []
    for m in mu:
        torch.manual_seed(0)
        slices.append(function(num_samples, m, logvar))
    assert torch.equal(z, torch.stack(slices))
    assert torch.equal(after, torch.rand(1, device=device))


@ON_DEVICES
@DRAWS
@SAMPLES
def test_vmap_different_randomness(function: Callable[..., Tensor], num_samples: int | None, device: str) -> None:
    """No two slices share a number, and the whole is standard normal."""
    mu, logvar = torch.zeros(5, 64, 40, dtype=DOUBLE, device=device), torch.zeros((), dtype=DOUBLE, device=device)
    torch.manual_seed(0)
    z = vmap(partial(function, num_samples), in_dims=(0, None), randomness="different")(mu, logvar)
    assert z.unique().numel() == z.numel()
    for a, b in itertools.combinations(z.reshape(5, -1), 2):
        # The standard error of a correlation of n numbers is 1 / sqrt(n), n >= 2560.
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 0.1
    assert abs(z.mean().item()) < 0.05
    assert abs(z.std().item() - 1) < 0.05
    torch.manual_seed(0)
    again = vmap(partial(function, num_samples), in_dims=(0, None), randomness="different")(mu, logvar)
    assert torch.equal(z, again)


@DRAWS
def test_vmap_randomness_where_nothing_is_mapped(function: Callable[..., Tensor]) -> None:
    """Samples of one distribution, drawn by mapping over something else."""
    mu, logvar, factors = numbers(4, 3), numbers(3, seed=1), torch.ones(5, dtype=DOUBLE)

    def scaled(factor: Tensor) -> Tensor:
        return function(None, mu, logvar) * factor

    same = vmap(scaled, randomness="same")(factors)
    different = vmap(scaled, randomness="different")(factors)
    assert bool((same == same[0]).all())
    assert different.unique().numel() == different.numel()


@DRAWS
def test_vmap_refuses_randomness_by_default(function: Callable[..., Tensor]) -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(partial(function, None), in_dims=(0, None))(numbers(5, 4, 3), numbers(3))


@ON_DEVICES
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_per_sample_gradients_with_randomness(randomness: str, device: str) -> None:
    """The backward pass makes the noise of each slice again: d(z^2/2)/dmu = z, d(z^2/2)/dlogvar = z (z - mu) / 2."""
    mu, logvar = numbers(5, 4, 3).to(device), numbers(3, seed=1).to(device)

    def half_square(m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        z = rsample(m, s)
        return z.pow(2).sum() / 2, z

    torch.manual_seed(0)
    mapped_grad = vmap(grad(half_square, (0, 1), has_aux=True), in_dims=(0, None), randomness=randomness)
    (of_mu, of_logvar), z = mapped_grad(mu, logvar)
    assert_close(of_mu, z)
    assert_close(of_logvar, (z * (z - mu) / 2).sum(1))


def test_nested_vmap_with_randomness() -> None:
    mu = torch.zeros(3, 2, 50, dtype=DOUBLE)
    torch.manual_seed(0)
    z = vmap(vmap(lambda m: rsample(m, 0.0), randomness="different"), randomness="different")(mu)
    assert z.unique().numel() == z.numel()
    outer = vmap(vmap(lambda m: rsample(m, 0.0), randomness="same"), randomness="same")(mu)
    assert bool((outer == outer[0, 0]).all())


def test_functional_call() -> None:
    """Per-sample gradients of a whole model, as for differential privacy, against a loop."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 6)).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, noise = numbers(4, 6), numbers(4, 3, seed=1)

    def loss_with(module: ModuleType) -> Callable[..., Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor, noise: Tensor) -> Tensor:
            mu, logvar = functional_call(model, parameters, (x,)).chunk(2, -1)
            z, kl = module.rsample_kl(mu, logvar, noise=noise, batch_dims=0)
            return module.elbo_loss(torch.cat([z, z]), x, kl=kl, batch_dims=0).loss

        return loss

    actual = vmap(grad(loss_with(elbo_ext)), in_dims=(None, 0, 0))(parameters, x, noise)
    truth = [grad(loss_with(reference))(parameters, a, b) for a, b in zip(x, noise, strict=True)]
    assert_close(actual, {name: torch.stack([g[name] for g in truth]) for name in parameters})


# ---- torch.autograd.functional, batches of upstream gradients, dual numbers ----


@each(COMPARED)
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian(sample: Sample, strategy: str) -> None:
    if strategy == "forward-mode" and draws(sample):
        pytest.skip("forward mode maps over the function, and a mapped reference cannot draw")

    def build(module: ModuleType) -> Any:
        function, values = on_tensors(sample, module)
        return torch.autograd.functional.jacobian(function, values, vectorize=True, strategy=strategy)

    both(build)


@each(COMPARED)
def test_vectorized_hessian(sample: Sample) -> None:
    def build(module: ModuleType) -> Any:
        function, values = on_tensors(sample, module)
        return torch.autograd.functional.hessian(weighted_sum(function), values, vectorize=True)

    both(build)


@each(COMPARED)
def test_batch_of_upstream_gradients(sample: Sample) -> None:
    def build(module: ModuleType) -> Any:
        function, values = on_tensors(sample, module)
        leaves = [v.detach().clone().requires_grad_() for v in values]
        outputs = [t for t in as_tuple(function(*leaves)) if t.requires_grad]
        upstream = [torch.stack([torch.ones_like(t), 2 * torch.ones_like(t), torch.zeros_like(t)]) for t in outputs]
        return torch.autograd.grad(outputs, leaves, upstream, is_grads_batched=True)

    both(build)


@each(COMPARED)
def test_dual_numbers(sample: Sample) -> None:
    """Reverse mode over forward mode, and forward mode through a backward pass."""

    def build(module: ModuleType) -> Any:
        function, values = on_tensors(sample, module)
        scalar = weighted_sum(function)
        leaves = [v.detach().clone().requires_grad_() for v in values]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, torch.full_like(v, 0.5)) for v in leaves]
            value = scalar(*duals)
            tangent = forward_ad.unpack_dual(value).tangent
            over_forward = torch.autograd.grad(tangent, leaves, retain_graph=True, allow_unused=True)
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            through_backward = [forward_ad.unpack_dual(g).tangent for g in gradients]
        zeros = [torch.zeros_like(v) for v in leaves]  # "unused" where the second derivative is nothing
        second = (*over_forward, *through_backward)
        return tangent, [z if g is None else g for g, z in zip(second, 2 * zeros, strict=True)]

    both(build)


# ---- the backward passes of plain eager code ----


def is_reduced(sample: Sample) -> bool:
    default = "mean" if sample.function == "elbo_loss" else "none"
    return sample.make(DOUBLE).get("reduction", default) != "none"


REDUCED = [sample for sample in FULL if is_reduced(sample)]


def leaves_of(sample: Sample) -> list[Tensor]:
    return [v.detach().clone().requires_grad_() for v in on_tensors(sample)[1]]


@each(REDUCED)
def test_gradients_of_each_result(sample: Sample) -> None:
    """Loss, log-likelihood and KL one by one and all at once, from one forward pass, in every order."""

    def build(module: ModuleType) -> Any:
        leaves = leaves_of(sample)
        outputs = as_tuple(on_tensors(sample, module)[0](*leaves))
        gradients = []
        for subset in itertools.chain.from_iterable(
            itertools.permutations(range(len(outputs)), n) for n in range(1, len(outputs) + 1)
        ):
            total = weighted_sum(lambda subset=subset: tuple(outputs[k] for k in subset))()
            found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
            gradients.append([torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)])
        return gradients

    both(build)


@each(REDUCED)
def test_several_backward_passes(sample: Sample) -> None:
    """retain_graph: the second pass has to make anew what the first gave away, whatever became of that."""

    def build(module: ModuleType) -> Any:
        leaves = leaves_of(sample)
        total = weighted_sum(on_tensors(sample, module)[0])(*leaves)
        total.backward(retain_graph=True)
        first = [v.grad.clone() for v in leaves]
        for v in leaves:
            v.grad.mul_(-3)  # the caller's own, to change as he likes
        total.backward(gradient=torch.full_like(total, 0.25), retain_graph=True)
        second = [v.grad.clone() for v in leaves]
        for v in leaves:
            v.grad = None
        (2 * total).backward()
        return first, second, [v.grad for v in leaves]

    both(build)


@each(REDUCED)
def test_create_graph_on_the_fast_path(sample: Sample) -> None:
    """A gradient penalty: the gradient of a function of the gradient."""

    def build(module: ModuleType) -> Any:
        leaves = leaves_of(sample)
        total = weighted_sum(on_tensors(sample, module)[0])(*leaves)
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        penalty = total + sum((g * g).sum() for g in gradients)
        return gradients, torch.autograd.grad(penalty, leaves)

    both(build)


@each(REDUCED)
def test_backward_before_create_graph(sample: Sample) -> None:
    """The forward pass's gradients are given away, then differentiable ones are asked for, then plain ones again."""

    def build(module: ModuleType) -> Any:
        leaves = leaves_of(sample)
        total = weighted_sum(on_tensors(sample, module)[0])(*leaves)
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        second = torch.autograd.grad(total, leaves, create_graph=True)
        return first, second, torch.autograd.grad(sum(g.sum() for g in second), leaves, retain_graph=True,
                                                  allow_unused=True), torch.autograd.grad(total, leaves)  # fmt: skip

    actual, truth = build(elbo_ext), build(reference)
    zeros = [torch.zeros_like(v) for v in leaves_of(sample)]
    for a, t in zip(actual, truth, strict=True):
        # "None" and zeros say the same thing about a second derivative that is nothing.
        assert_close([z if g is None else g for g, z in zip(a, zeros, strict=True)],
                     [z if g is None else g for g, z in zip(t, zeros, strict=True)])  # fmt: skip


@each(FULL)
def test_inputs_that_need_no_gradient(sample: Sample) -> None:
    """Any one operand alone: its gradient is the same as among the others, which get none."""
    function, values = on_tensors(sample)
    everything = leaves_of(sample)
    truth = torch.autograd.grad(weighted_sum(on_tensors(sample, reference)[0])(*everything), everything)
    for i in range(len(values)):
        leaves = [v.detach().clone().requires_grad_(k == i) for k, v in enumerate(values)]
        weighted_sum(function)(*leaves).backward()
        assert_close(leaves[i].grad, truth[i])
        assert all(v.grad is None for k, v in enumerate(leaves) if k != i)
    # Asked for some of them only, though all could have one.
    leaves = leaves_of(sample)
    total = weighted_sum(function)(*leaves)
    for i in range(len(values)):
        assert_close(torch.autograd.grad(total, leaves[i], retain_graph=True)[0], truth[i])
    assert all(v.grad is None for v in leaves)


@each(FULL)
def test_no_grad_and_inference_mode(sample: Sample) -> None:
    function, values = on_tensors(sample)
    truth = as_tuple(on_tensors(sample, reference)[0](*values))
    leaves = leaves_of(sample)
    constants = sample.make(DOUBLE).get("gradient") == "score"  # z is one
    assert [t.requires_grad for t in as_tuple(function(*leaves))] == [not constants, *[True] * (len(truth) - 1)]
    with torch.no_grad():
        assert_close(as_tuple(function(*leaves)), truth)
        assert all(t.grad_fn is None for t in as_tuple(function(*leaves)))
    with torch.inference_mode():
        results = as_tuple(function(*leaves))
        assert_close(results, truth)
        from_inference = as_tuple(function(*(v.clone() for v in values)))
        assert_close(from_inference, truth)


@pytest.mark.parametrize("num_samples", [None, 2])
def test_forward_mode_without_elements(num_samples: int | None) -> None:
    """Examples without a latent dimension have ln q = ln p = 0, whose derivative is 0."""
    empty, zeros = torch.zeros(3, 0, dtype=DOUBLE), torch.zeros(*([2] if num_samples else []), 3, dtype=DOUBLE)
    values, tangents = torch.func.jvp(
        lambda v: rsample_with_log_prob(v, v, num_samples=num_samples)[1:], (empty,), (empty,)
    )
    for result in (*values, *tangents):
        assert torch.equal(result, zeros)


def test_one_tensor_as_several_operands() -> None:
    def build(module: ModuleType) -> Any:
        v = numbers(4, 3).requires_grad_()
        total = module.gaussian_log_prob(v, 2 * v, v, reduction="mean") + module.elbo_loss(v, v, v, v).loss
        total = total + module.gaussian_kl(v, v, v, v / 2, reduction="sum") + module.rsample(v, v, noise=v).sum()
        return torch.autograd.grad(total, v)

    both(build)


def test_a_view_and_a_non_leaf() -> None:
    def build(module: ModuleType) -> Any:
        v = numbers(4, 6).requires_grad_()
        mu, logvar = v.chunk(2, -1)
        loss = module.elbo_loss(v[:, ::2] * 2, v[:, 1::2].exp(), mu.t().t(), logvar.clone()).loss
        return torch.autograd.grad(loss, v)

    both(build)


# ---- what is changed or freed between forward and backward ----


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("changed", ["x", "mean", "logvar", "weight"])
def test_saved_inputs_changed_in_place(changed: str, reduction: str) -> None:
    """torch's own error, although the gradients of a reduced result exist already."""
    operands = dict(zip(("x", "mean", "logvar", "weight"), numbers(4, 2, 3), strict=True))
    operands["mean"].requires_grad_()
    total = gaussian_log_prob(**operands, reduction=reduction).sum()
    with torch.no_grad():
        operands[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("changed", ["mu", "logvar"])
def test_saved_inputs_of_a_sample_changed_in_place(changed: str) -> None:
    operands = dict(zip(("mu", "logvar"), numbers(2, 4, 3), strict=True))
    operands["logvar"].requires_grad_()
    z, kl = rsample_kl(**operands)
    with torch.no_grad():
        operands[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (z.sum() + kl.sum()).backward()


@pytest.mark.parametrize("output", ["z", "kl"])
def test_results_changed_in_place(output: str) -> None:
    """Neither is needed in the backward pass, so both may be changed like any torch result."""

    def build(module: ModuleType) -> Any:
        mu, logvar = (t.requires_grad_() for t in numbers(2, 4, 3))
        results = dict(zip(("z", "kl"), module.rsample_kl(mu, logvar, noise=numbers(4, 3, seed=5)), strict=True))
        results[output].mul_(2)
        return torch.autograd.grad(results["z"].pow(2).sum() + results["kl"].sum(), (mu, logvar))

    both(build)


@pytest.mark.parametrize("field", ["loss", "log_likelihood", "kl"])
def test_fields_changed_in_place(field: str) -> None:
    def build(module: ModuleType) -> Any:
        recon, x, mu, logvar = (t.requires_grad_() for t in numbers(4, 4, 3))
        elbo = module.elbo_loss(recon, x, mu, logvar)
        getattr(elbo, field).mul_(3)
        return torch.autograd.grad(elbo.loss + elbo.log_likelihood + 2 * elbo.kl, (recon, x, mu, logvar))

    both(build)


def test_a_second_backward_needs_retain_graph() -> None:
    v = numbers(4, 3).requires_grad_()
    loss = elbo_loss(v, v.detach(), v, 0.0).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_noise_is_not_saved() -> None:
    """What autograd keeps of a sample are its operands and the seed, however many samples there are."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    mu, logvar = (t.requires_grad_() for t in numbers(2, 4, 3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z, kl = rsample_kl(mu, logvar, num_samples=100)
    assert sum(t.numel() for t in kept) <= mu.numel() + logvar.numel() + 1
    (z.sum() + kl.sum()).backward()
    assert_close(mu.grad, 100 + reference_gradient(reference.gaussian_kl, mu, logvar)[0])


def reference_gradient(function: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().clone().requires_grad_() for v in values]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


def test_saved_tensors_moved_away() -> None:
    """Hooks such as save_on_cpu hand other tensors back than were saved."""

    def build(module: ModuleType) -> Any:
        recon, x, mu, logvar = (t.requires_grad_() for t in numbers(4, 4, 3))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
            z, kl = module.rsample_kl(mu, logvar, noise=numbers(4, 3, seed=5))
            elbo = module.elbo_loss(recon + z, x, kl=kl)
            row = module.gaussian_log_prob(x, recon, logvar)
        return torch.autograd.grad(elbo.loss + row.sum(), (recon, x, mu, logvar))

    both(build)


def test_nothing_is_left_when_the_graph_is_gone() -> None:
    """No cycle of references keeps gradients or inputs alive until the garbage collector comes."""
    gc.disable()
    try:
        recon = numbers(4, 3).requires_grad_()
        operand = recon * 1
        watch = weakref.ref(operand)
        loss = elbo_loss(operand, numbers(4, 3), kl=numbers(4)).loss
        loss.backward(retain_graph=True)
        loss.backward()
        del loss, operand
        assert watch() is None
    finally:
        gc.enable()


def test_anomaly_detection() -> None:
    v = numbers(4, 3).requires_grad_()
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        z, kl = rsample_kl(v, v)
        elbo_loss(z, v.detach(), kl=kl).loss.backward()
    assert bool(v.grad.isfinite().all())


# ---- checkpointing ----


class Step(torch.nn.Module):
    """Encoder, sample, decoder and loss: all that a VAE recomputes."""

    def __init__(self, module: ModuleType, reduction: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = torch.nn.Linear(5, 6).double(), torch.nn.Linear(3, 5).double()
        self.module, self.reduction = module, reduction

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = self.encoder(x).chunk(2, -1)
        z, kl = self.module.rsample_kl(mu, logvar, num_samples=2)
        other = self.module.rsample(mu, logvar)
        recon = self.decoder(torch.nn.functional.dropout(z, 0.3) + other)
        elbo = self.module.elbo_loss(recon, x, kl=kl, batch_dims=2, reduction=self.reduction)
        return elbo.loss.sum(), elbo.log_likelihood.sum(), z, other


def run_step(step: Step, apply: Callable[..., Any], device: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    x = numbers(4, 5).to(device).requires_grad_()
    torch.manual_seed(2)
    loss, log_likelihood, z, other = apply(step.to(device), x)
    (loss + 0.5 * log_likelihood + z.sum()).backward()
    gradients = [p.grad for p in (x, *step.parameters())]
    return [loss, log_likelihood, z, other], gradients, torch.rand(2, device=device)


@ON_DEVICES
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, reduction: str, device: str) -> None:
    """The recomputation draws what the forward pass drew, and the generator ends where it does without."""
    plain = run_step(Step(elbo_ext, reduction), lambda step, x: step(x), device)
    actual = run_step(Step(elbo_ext, reduction), partial(checkpoint, use_reentrant=use_reentrant), device)
    truth = run_step(Step(reference, reduction), lambda step, x: step(x), device)
    # z and the draw after the step, bit for bit.
    for a, b in zip(actual[0][2:], plain[0][2:], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(actual[2], plain[2])
    assert_close(actual[0], plain[0])
    assert_close(actual[1], plain[1])
    assert_close(actual, truth)


@ON_DEVICES
def test_checkpoint_of_the_sample_alone(device: str) -> None:
    """Selective use: only the latent stage is recomputed; and with a generator of one's own state."""
    mu, logvar = (t.requires_grad_() for t in numbers(2, 4, 3).to(device))
    torch.manual_seed(3)
    z, kl = checkpoint(rsample_kl, mu, logvar, use_reentrant=False)
    gradients = torch.autograd.grad(z.pow(2).sum() / 2 + kl.sum(), (mu, logvar))
    torch.manual_seed(3)
    again = rsample_kl(mu, logvar)
    assert torch.equal(z, again[0])
    of_kl = reference_gradient(reference.gaussian_kl, mu, logvar)
    assert_close(gradients[0], z.detach() + of_kl[0])
    assert_close(gradients[1], (z * (z - mu) / 2).detach() + of_kl[1])


# ---- mixed precision ----


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_autocast(reduction: str) -> None:
    """Under autocast layers return bfloat16; the loss takes it as it comes, with float32 data, and stays float32."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)
    x, noise = torch.randn(6, 12), torch.randn(6, 4)

    def run(module: ModuleType) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            mu, logvar = encoder(x).chunk(2, -1)
            assert mu.dtype == torch.bfloat16
            z, kl = module.rsample_kl(mu, logvar, noise=noise)
            recon = decoder(z)
            elbo = module.elbo_loss(recon, x, kl=kl, reduction=reduction)
            kl_again = module.elbo_loss(recon, x, mu, logvar, reduction=reduction).kl
        assert z.dtype == recon.dtype == torch.bfloat16
        for t in (kl, *elbo, kl_again):
            assert t.dtype == torch.float32
        leaves = (mu, logvar, recon)
        gradients = torch.autograd.grad(elbo.loss.sum(), leaves)
        assert all(g.dtype == torch.bfloat16 for g in gradients)
        return z, kl, *elbo, kl_again, *gradients

    for actual, truth in zip(run(elbo_ext), run(reference), strict=True):
        # float32 sums of the same bfloat16 numbers; z and the gradients, rounded to bfloat16, one step apart.
        step = 2.0**-7 if actual.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(actual, truth, rtol=step, atol=step)


def test_autocast_changes_nothing_for_float32() -> None:
    """The kernels compute in float32 anyway; autocast must not cast their inputs down."""
    x, mean, logvar = torch.randn(3, 4, 5)
    plain = gaussian_log_prob(x, mean, logvar)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gaussian_log_prob(x, mean, logvar), plain)


FACTORS = [2.0**16, 1.0, 0.5, -3.0, 0.0, 2.0**-20]


@pytest.mark.parametrize("factor", FACTORS)
@each(REDUCED)
def test_upstream_factor(sample: Sample, factor: float) -> None:
    """GradScaler's factor, a loss that counts half, one that is switched off: gradients times any factor."""
    leaves = leaves_of(sample)
    (weighted_sum(on_tensors(sample)[0])(*leaves) * factor).backward()
    truth_leaves = leaves_of(sample)
    truth = torch.autograd.grad(weighted_sum(on_tensors(sample, reference)[0])(*truth_leaves), truth_leaves)
    for leaf, expected in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad, factor * expected, rtol=1e-12, atol=1e-12 * abs(factor))


@pytest.mark.parametrize("function", ["elbo_loss", "gaussian_log_prob"])
@pytest.mark.parametrize("factor", [1.0, 2.0**16])
def test_float16_gradients_below_its_range(function: str, factor: float) -> None:
    """2.4e-8 rounds to 0 in float16, whose smallest number is 6e-8: gradients may be rounded only after the factor."""
    rows = 40_000
    recon = torch.full((rows, 2), 0.5, dtype=torch.float16, requires_grad=True)
    difference = torch.tensor([2.0**-10, -(2.0**-11)])
    x = recon.detach().float() + difference
    value = elbo_loss(recon, x, kl=torch.zeros(rows)).loss if function == "elbo_loss" else -gaussian_log_prob(
        x, recon, reduction="mean")  # fmt: skip
    (value * factor).backward()
    truth = (-difference * factor / rows).to(torch.float16).expand(rows, 2)
    assert (factor == 1.0) == bool((truth == 0).all())
    assert torch.equal(recon.grad, truth)


def test_grad_scaler() -> None:
    """torch.amp.GradScaler itself: scaled backward, unscaled gradients, a step; a skipped step after an overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    x, before = torch.zeros(4, 3), weight.detach().clone()
    scaler.scale(elbo_loss(weight, x, kl=torch.zeros(4)).loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(weight.grad, before / 4)  # d(mean over 4 of |w|^2 / 2) / dw
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.detach(), before * 0.75)
    optimizer.zero_grad()
    scaler.scale(elbo_loss(weight, torch.full_like(x, float("inf")), kl=torch.zeros(4)).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    torch.testing.assert_close(weight.detach(), before * 0.75)


def test_upstream_gradient_of_another_dtype() -> None:
    """A float64 sum over float32 losses sends float64 gradients through a cast back."""
    v = torch.randn(4, 3, requires_grad=True)
    total = elbo_loss(v, torch.zeros(4, 3), v, 0.0).loss.double() * 3 + gaussian_kl(v, 0.0, reduction="sum").double()
    total.backward()
    assert v.grad.dtype == torch.float32
    torch.testing.assert_close(v.grad, v.detach() * (2 * 3 / 4 + 1))


def test_rows_expanded_upstream() -> None:
    """The upstream gradient of kl.mean() is one number repeated with stride 0; that of kl[::2] has steps."""

    def build(module: ModuleType) -> Any:
        mu, logvar = (t.requires_grad_() for t in numbers(2, 6, 3))
        z, kl = module.rsample_kl(mu, logvar, noise=numbers(2, 6, 3, seed=4), num_samples=2)
        per_row = module.gaussian_log_prob(z, mu, logvar, batch_dims=2)
        total = kl.mean() + kl[::2].sum() + per_row.t()[1:].sum() + z.transpose(0, 1)[..., 1].sum()
        return torch.autograd.grad(total, (mu, logvar))

    both(build)


# ---- elbo of a posterior and its sample: the whole step ----


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_whole_step(likelihood: str, num_samples: int | None, reduction: str) -> None:
    """Draw, decode, loss: the reference draws the same noise from the same seed."""

    def build(module: ModuleType) -> Any:
        torch.manual_seed(0)
        encoder, decoder = torch.nn.Linear(8, 6).double(), torch.nn.Linear(3, 8).double()
        x = torch.rand(5, 8, dtype=DOUBLE)
        mu, logvar = encoder(x).chunk(2, -1)
        z, kl = module.rsample_kl(mu, logvar, num_samples=num_samples)
        elbo = module.elbo_loss(decoder(z), x, kl=kl, likelihood=likelihood, reduction=reduction,
                                batch_dims=1 if num_samples is None else 2)  # fmt: skip
        parameters = [*encoder.parameters(), *decoder.parameters()]
        return tuple(elbo), torch.autograd.grad(weighted_sum(lambda: tuple(elbo))(), parameters), torch.rand(1)

    both(build)


# ---- elements that are left out ----


def test_left_out_elements_stay_out_of_second_derivatives() -> None:
    """0 * NaN must not come back when the gradient is differentiated again; -7 is the second derivative by hand."""
    x = torch.tensor([[float("nan"), 1.0]], dtype=torch.float64)
    mask = ~x.isnan()
    for module in (elbo_ext, reference):
        hessian = torch.func.hessian(lambda r, m=module: m.gaussian_log_prob(x, r, 0.0, weight=mask, reduction="sum"))
        torch.testing.assert_close(hessian(torch.zeros_like(x)).flatten(), x.new_tensor([0.0, 0.0, 0.0, -1.0]))

        shared = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = module.gaussian_log_prob(x, shared.expand(1, 2), log_std=shared, weight=mask, reduction="sum")
        (first,) = torch.autograd.grad(value, shared, create_graph=True)
        (second,) = torch.autograd.grad(first, shared)
        assert (first.item(), second.item()) == pytest.approx((1.0, -7.0))


# ---- dtypes of 0-dim tensors under vmap ----

NUMBER_IN_A_TENSOR = {
    "rsample": lambda module, a, s: module.rsample(a, s, noise=torch.ones_like(a)),
    "rsample_kl": lambda module, a, s: module.rsample_kl(a, log_std=s, noise=torch.ones_like(a), batch_dims=0),
    "gaussian_kl": lambda module, a, s: module.gaussian_kl(a, s, batch_dims=0),
    "laplace_log_prob": lambda module, a, s: module.laplace_log_prob(a, a + 1, s, batch_dims=0),
    "discretized_logistic_log_prob": lambda module, a, s: module.discretized_logistic_log_prob(a, 0.1, s, batch_dims=0),
}


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", NUMBER_IN_A_TENSOR)
def test_a_mapped_number_does_not_promote(name: str, in_dims: tuple[int | None, int | None]) -> None:
    """The mapped axis gives a 0-dim scale a dimension in memory, which must not decide the dtype of the result."""
    function = NUMBER_IN_A_TENSOR[name]
    a = torch.linspace(-1, 1, 12).reshape(*(2,) * (in_dims[0] is not None), -1)
    s = (
        torch.tensor([0.2, 0.5], dtype=torch.float64)
        if in_dims[1] is not None
        else torch.tensor(0.2, dtype=torch.float64)
    )
    actual = torch.vmap(partial(function, elbo_ext), in_dims)(a, s)
    for i in range(2):
        one = function(elbo_ext, a if in_dims[0] is None else a[i], s if in_dims[1] is None else s[i])
        for mapped, expected in zip(as_tuple(actual), as_tuple(one), strict=True):
            assert mapped.dtype == expected.dtype == torch.float32
            torch.testing.assert_close(mapped[i], expected, rtol=1e-6, atol=1e-6)
