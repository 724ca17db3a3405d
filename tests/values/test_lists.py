"""rsample, rsample_kl and gaussian_kl of lists of tensors, against calls on each tensor and the reference."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import gaussian_kl, reference, rsample, rsample_kl
from samples import DTYPES, LAYOUTS, Maker, devices, seeds_of_the_cpu, tolerance_of

# The weights and biases of a network, and what kernels cut their work at: vectors, tiles, pieces, blocks.
SHAPES = [(3, 5), (5,), (1,), (), (4, 1, 3), (33, 31), (4096,), (4097,), (17, 1000), (0, 7), (2, 3)]
Arguments = dict[str, Any]


def weights(form: str, dtype: torch.dtype, device: str = "cpu", shapes: Any = SHAPES) -> Arguments:
    """mu and a scale for each shape."""
    make = Maker(dtype, device, seed=1)
    return {"mu": [make.normal(*shape) for shape in shapes], form: [make.scale(form, *shape) for shape in shapes]}


def of_position(arguments: Arguments, k: int) -> Arguments:
    return {name: value[k] if isinstance(value, list) else value for name, value in arguments.items()}


def one_by_one(function: Callable[..., Any], arguments: Arguments) -> list[Any]:
    return [function(**of_position(arguments, k)) for k in range(len(arguments["mu"]))]


def tensors_of(arguments: Arguments) -> list[Tensor]:
    return [t for value in arguments.values() if isinstance(value, list) for t in value if isinstance(t, Tensor)]


def drawn(seed: int, function: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(seed)
    return function(*args)


def together(function: Callable[..., Any], arguments: Arguments) -> Any:
    return function(**arguments)


def upstream(tensors: Any) -> list[Tensor]:
    """An uneven gradient for each."""
    return [
        torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).to(t).reshape(t.shape)
        if t.dim()
        else t.new_full((), 0.7)
        for t in tensors
    ]


@contextlib.contextmanager
def recorded_operators() -> Iterator[list[str]]:
    """The names of the package's operators that are called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "elbo_ext":
                names.append(operator._schema.name.removeprefix("elbo_ext::"))
            return operator(*args, **(kwargs or {}))

    with Recorder():
        yield names


ON_DEVICES = pytest.mark.parametrize("device", devices())
CASES: dict[str, Arguments] = {
    "standard": {},
    "prior": {"prior_mu": 0.5, "prior_log_std": -1.0},
    "prior-of-each": {
        "prior_mu": [0.1 * k for k in range(len(SHAPES))],
        "prior_var": [0.5 + k for k in range(len(SHAPES))],
    },
    "floor": {"min_std": 0.05},
    "samples": {"num_samples": 3},
    "no-samples": {"num_samples": 0},
    "mean": {"reduction": "mean"},
}


# ---- values and gradients ----


@ON_DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["logvar", "std", "rho"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_one_call_a_tensor(case: str, form: str, dtype: torch.dtype, device: str) -> None:
    """The same draws, the sum of the KLs, and the gradients of both."""
    arguments = {**weights(form, dtype, device), "batch_dims": 0, **CASES[case]}
    leaves = [t.requires_grad_() for t in tensors_of(arguments)]
    z, kl = drawn(1, together, rsample_kl, arguments)
    expected = drawn(1, one_by_one, rsample_kl, arguments)
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for actual, (of_one, _) in zip(z, expected, strict=True):
        assert actual.shape == of_one.shape and actual.dtype is of_one.dtype and actual.stride() == of_one.stride()
        torch.testing.assert_close(actual, of_one, rtol=rounding, atol=rounding)
    sum_of_kls = torch.stack([kl.double() for _, kl in expected]).sum()
    of_values = torch.float64 if dtype is torch.float64 else torch.float32
    assert kl.shape == () and kl.dtype is of_values
    torch.testing.assert_close(kl.double(), sum_of_kls, rtol=1e-13 if dtype is torch.float64 else 2e-6, atol=0.0)

    factors = upstream(z)
    actual_gradients = torch.autograd.grad([*z, kl], leaves, [*factors, kl.new_full((), 0.7)])
    of_each = [t for pair in expected for t in pair]
    of_kl = [kl.new_full((), 0.7)] * len(expected)
    pairs = [t for pair in zip(factors, of_kl, strict=True) for t in pair]
    for actual, of_one in zip(actual_gradients, torch.autograd.grad(of_each, leaves, pairs), strict=True):
        torch.testing.assert_close(actual, of_one, rtol=4 * rounding, atol=4 * rounding)
    assert sum(float(g.abs().sum()) for g in actual_gradients) > 0


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_against_the_reference(dtype: torch.dtype, device: str) -> None:
    arguments = {**weights("rho", dtype, device), "prior_std": 0.1, "batch_dims": 0}
    with seeds_of_the_cpu():
        z, kl = drawn(2, together, rsample_kl, arguments)
        exact = {
            name: [t.detach().cpu().double() for t in value] if isinstance(value, list) else value
            for name, value in arguments.items()
        }
        expected = drawn(2, one_by_one, reference.rsample_kl, exact)
    tolerance = tolerance_of("rsample_kl", dtype)
    for actual, (of_one, _) in zip(z, expected, strict=True):
        rounding = 2**-8 if dtype is torch.bfloat16 else 4e-6 if dtype is torch.float32 else 1e-13
        torch.testing.assert_close(actual.cpu().double(), of_one, rtol=rounding, atol=rounding)
    torch.testing.assert_close(
        kl.cpu().double(), torch.stack([kl for _, kl in expected]).sum(), rtol=10 * tolerance.value_rtol, atol=0.0
    )


@ON_DEVICES
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_kl_for_each_example(reduction: str, device: str) -> None:
    """The latents of a hierarchical model: one batch, other shapes beyond it."""
    shapes = [(6, 4), (6, 2, 5), (6, 8000), (6, 0), (6,)]
    arguments = {**weights("logvar", torch.float64, device, shapes), "reduction": reduction}
    leaves = [t.requires_grad_() for t in tensors_of(arguments)]
    z, kl = drawn(3, together, rsample_kl, arguments)
    expected = drawn(3, one_by_one, rsample_kl, arguments)
    for actual, (of_one, _) in zip(z, expected, strict=True):
        torch.testing.assert_close(actual, of_one, rtol=1e-14, atol=1e-14)
    sum_of_kls = sum(kl for _, kl in expected)
    torch.testing.assert_close(kl, sum_of_kls, rtol=1e-13, atol=0.0)
    alone = gaussian_kl(**arguments)
    torch.testing.assert_close(alone, sum_of_kls, rtol=1e-13, atol=0.0)
    for result in (kl, alone):
        actual = torch.autograd.grad(result, leaves, upstream([result])[0], retain_graph=True)
        of_each = torch.autograd.grad(sum_of_kls, leaves, upstream([result])[0], retain_graph=True)
        for gradient, other in zip(actual, of_each, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-15)


@ON_DEVICES
@pytest.mark.parametrize("form", ["logvar", "var", "rho"])
def test_samples_alone_and_the_kl_alone(form: str, device: str) -> None:
    arguments = weights(form, torch.float32, device)
    z = drawn(4, together, rsample, arguments)
    for actual, of_one in zip(z, drawn(4, one_by_one, rsample, arguments), strict=True):
        torch.testing.assert_close(actual, of_one, rtol=1e-6, atol=1e-6)
    kl = gaussian_kl(**arguments, batch_dims=0)
    expected = sum(one_by_one(gaussian_kl, {**arguments, "batch_dims": 0}))
    torch.testing.assert_close(kl, expected, rtol=2e-6, atol=0.0)


@ON_DEVICES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    """Each tensor lies as it likes, also one that is not at home in vectors."""
    arguments = weights("log_std", torch.float32, device, [(3, 4, 6, 5), (2, 8, 3, 5), (1, 4, 4, 4)])
    arguments = {name: [LAYOUTS[layout](t) for t in value] for name, value in arguments.items()}
    leaves = [t.detach().requires_grad_() for t in tensors_of(arguments)]
    arguments = {"mu": leaves[:3], "log_std": leaves[3:], "batch_dims": 0}
    z, kl = drawn(5, together, rsample_kl, arguments)
    expected = drawn(5, one_by_one, rsample_kl, arguments)
    for actual, (of_one, _) in zip(z, expected, strict=True):
        torch.testing.assert_close(actual, of_one, rtol=1e-6, atol=1e-6)
    actual = torch.autograd.grad([*z, kl], leaves, [*upstream(z), torch.ones_like(kl)])
    of_each = [t for pair in expected for t in pair]
    factors = [t for f in upstream(z) for t in (f, torch.ones_like(kl))]
    for gradient, other in zip(actual, torch.autograd.grad(of_each, leaves, factors), strict=True):
        torch.testing.assert_close(gradient, other, rtol=4e-6, atol=4e-6)


@ON_DEVICES
def test_many_tensors(device: str) -> None:
    """More than one kernel takes; and the KL of each counts once."""
    arguments = {**weights("rho", torch.float32, device, [(k % 7 + 1,) for k in range(95)]), "batch_dims": 0}
    z, kl = drawn(6, together, rsample_kl, arguments)
    expected = drawn(6, one_by_one, rsample_kl, arguments)
    assert len(z) == 95
    for actual, (of_one, _) in zip(z, expected, strict=True):
        torch.testing.assert_close(actual, of_one, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl, torch.stack([kl for _, kl in expected]).sum(), rtol=2e-6, atol=0.0)


@ON_DEVICES
def test_broadcasting_within_a_tensor(device: str) -> None:
    """Scales and priors that are shared, given as tensors, numbers and 0-dim tensors."""
    make = Maker(torch.float64, device, seed=2)
    mu = [make.normal(4, 3), make.normal(3), make.normal(2, 4, 3)]
    scale = [make.normal(3), 0.2, make.normal(4, 1)]
    prior = [make.normal(1), make.normal(), 0.5]
    arguments = {"mu": mu, "log_std": scale, "prior_mu": prior, "prior_std": 2.0, "batch_dims": 0}
    leaves = [t.requires_grad_() for t in tensors_of(arguments)]
    z, kl = drawn(7, together, rsample_kl, arguments)
    expected = drawn(7, one_by_one, rsample_kl, arguments)
    sum_of_kls = sum(kl for _, kl in expected)
    torch.testing.assert_close(kl, sum_of_kls, rtol=1e-13, atol=0.0)
    actual = torch.autograd.grad([*z, kl], leaves, [*upstream(z), torch.ones_like(kl)])
    of_z = [z for z, _ in expected]
    others = torch.autograd.grad([*of_z, sum_of_kls], leaves, [*upstream(z), torch.ones_like(kl)])
    for gradient, other in zip(actual, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-14)


# ---- ways of differentiating ----


def small() -> tuple[list[Tensor], list[Tensor]]:
    make = Maker(torch.float64, "cpu", seed=3)
    shapes = [(2, 3), (3,), ()]
    return [make.normal(*s).requires_grad_() for s in shapes], [make.normal(*s).requires_grad_() for s in shapes]


def drawing(*tensors: Tensor) -> tuple[Tensor, ...]:
    half = len(tensors) // 2
    z, kl = rsample_kl(list(tensors[:half]), rho=list(tensors[half:]), prior_std=0.5, batch_dims=0)
    return (*z, kl)


def of_flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With the same noise in every call."""
    return drawn(0, drawing, *tensors)


def test_gradcheck() -> None:
    mu, rho = small()
    assert torch.autograd.gradcheck(of_flat, (*mu, *rho))
    assert torch.autograd.gradgradcheck(of_flat, (*mu, *rho))
    assert torch.autograd.gradcheck(of_flat, (*mu, *rho), check_batched_grad=True, fast_mode=True)


def test_forward_mode_and_torch_func() -> None:
    mu, rho = small()
    tensors = (*mu, *rho)
    tangents = tuple(torch.ones_like(t) for t in tensors)
    outputs, derivative = torch.func.jvp(of_flat, tensors, tangents)
    jacobian = torch.autograd.functional.jacobian(of_flat, tensors)
    for of_output, actual in zip(jacobian, derivative, strict=True):
        expected = sum(j.flatten(actual.dim()).sum(-1) if j.dim() > actual.dim() else j for j in of_output)
        torch.testing.assert_close(actual, expected)
    gradients = torch.func.grad(lambda *ts: of_flat(*ts)[-1], argnums=tuple(range(6)))(*tensors)
    for actual, expected in zip(gradients, torch.autograd.grad(of_flat(*tensors)[-1], tensors), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(outputs) == 4


def test_compiled_code() -> None:
    mu, rho = small()
    compiled = torch.compile(drawing, fullgraph=True, backend="aot_eager")
    actual, expected = drawn(0, compiled, *mu, *rho), of_flat(*mu, *rho)
    leaves = [*mu, *rho]
    for result, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, other)
    gradients = torch.autograd.grad(actual, leaves, upstream(actual))
    for gradient, other in zip(gradients, torch.autograd.grad(expected, leaves, upstream(expected)), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("wanted", ["z", "one z", "kl", "mu", "scale"])
def test_some_gradients(wanted: str) -> None:
    """Of some results, by some inputs: others are None, and no number is made for nothing."""
    mu, rho = small()
    options = {"mu": [t.detach() for t in rho], "scale": [t.detach() for t in mu]}
    if wanted in options:
        pair = (mu, options[wanted]) if wanted == "mu" else (options[wanted], rho)
    else:
        pair = (mu, rho)
    *z, kl = of_flat(*pair[0], *pair[1])
    results = {"z": z, "one z": z[1:2], "kl": [kl]}.get(wanted, [*z, kl])
    leaves = [t for t in (*pair[0], *pair[1]) if t.requires_grad]
    actual = torch.autograd.grad(results, leaves, upstream(results), allow_unused=True)
    torch.manual_seed(0)
    each = [rsample_kl(m, rho=r, prior_std=0.5, batch_dims=0) for m, r in zip(*pair, strict=True)]
    sums = {"z": [e[0] for e in each], "one z": [each[1][0]], "kl": [sum(e[1] for e in each)]}
    others = sums.get(wanted, [*(e[0] for e in each), sum(e[1] for e in each)])
    expected = torch.autograd.grad(others, leaves, upstream(results), allow_unused=True)
    for gradient, other in zip(actual, expected, strict=True):
        if other is None:
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-14)


# ---- one call ----


def test_one_node_and_one_operator_each_way() -> None:
    arguments = {**weights("rho", torch.float32), "batch_dims": 0}
    leaves = [t.requires_grad_() for t in tensors_of(arguments)]
    z, kl = rsample_kl(**arguments)
    assert {t.grad_fn for t in z} == {kl.grad_fn}
    with recorded_operators() as names, torch.no_grad():
        rsample_kl(**arguments)
        rsample(arguments["mu"], rho=arguments["rho"])
        gaussian_kl(**arguments)
    assert names == ["latent_list"] * 3
    with recorded_operators() as names:
        torch.autograd.grad(sum(t.sum() for t in z) + kl, leaves)
    assert names == ["latent_list_backward"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_with_any_number_of_threads(threads: int) -> None:
    arguments = {**weights("rho", torch.float32, shapes=[(300, 301), (7,), (40_001,), (3, 3)]), "batch_dims": 0}
    leaves = [t.requires_grad_() for t in tensors_of(arguments)]

    def everything() -> list[Tensor]:
        z, kl = drawn(8, together, rsample_kl, arguments)
        return [*z, kl, *torch.autograd.grad([*z, kl], leaves, [*upstream(z), torch.ones_like(kl)])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        torch.set_num_threads(threads)
        for actual, other in zip(everything(), expected, strict=True):
            assert torch.equal(actual, other)
    finally:
        torch.set_num_threads(before)


def test_draws_are_those_of_one_call_after_the_other() -> None:
    """From torch's generator or another one; the KL alone draws nothing."""
    mu = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(1)]
    generator = torch.Generator().manual_seed(9)
    z = rsample(mu, std=1.0, generator=generator)
    after = torch.rand((), generator=generator)
    generator.manual_seed(9)
    for actual, t in zip(z, mu, strict=True):
        assert torch.equal(actual, rsample(t, std=1.0, generator=generator))
    assert torch.equal(after, torch.rand((), generator=generator))
    torch.manual_seed(10)
    expected = torch.rand(())
    torch.manual_seed(10)
    gaussian_kl(mu, 0.0, batch_dims=0)
    assert torch.equal(torch.rand(()), expected)


def test_noise_and_weights_of_each() -> None:
    """One call for each tensor then."""
    make = Maker(torch.float64, "cpu", seed=3)
    mu, rho, noise, weight = ([make.normal(*s) for s in [(2, 3), (2, 4)]] for _ in range(4))
    arguments = {"mu": mu, "rho": rho, "noise": noise, "kl_weight": [w.abs() for w in weight]}
    z, kl = rsample_kl(**arguments)
    expected = one_by_one(rsample_kl, arguments)
    for actual, (of_one, _) in zip(z, expected, strict=True):
        assert torch.equal(actual, of_one)
    torch.testing.assert_close(kl, expected[0][1] + expected[1][1])
    assert kl.shape == (2,)


def test_precisions_side_by_side() -> None:
    """A float64 tensor does not widen its neighbours; the KL is float64 then."""
    mu = [torch.ones(3, dtype=torch.float64), torch.ones(2)]
    z, kl = rsample_kl(mu, logvar=-1.0, batch_dims=0)
    assert [t.dtype for t in z] == [torch.float64, torch.float32] and kl.dtype is torch.float64
    exact = 0.5 * (1 + math.exp(-1) - 1 + 1)  # of each of five elements
    assert math.isclose(float(kl), 5 * exact, rel_tol=1e-6)


def test_a_tuple_will_do() -> None:
    torch.manual_seed(0)
    z = rsample((torch.zeros(2), torch.zeros(3)), std=(1.0, 2.0))
    assert isinstance(z, list) and [t.shape for t in z] == [(2,), (3,)]


def test_subclasses_take_over() -> None:
    class Own:
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
            return function.__name__

    assert rsample([Own(), Own()], std=1.0) == "rsample"
    assert gaussian_kl(mu=[torch.zeros(2), torch.zeros(2)], std=[1.0, Own()]) == "gaussian_kl"


# ---- errors ----

A = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "mu must be a torch.Tensor, got list", {"mu": [], "std": 1.0}),
        (ValueError, "std must be a list of 2, as mu is, got 1", {"mu": [A, A], "std": [1.0]}),
        (TypeError, "std must be a list of 2, as mu is, or a number, got a torch.Tensor", {"mu": [A, A], "std": A}),
        (TypeError, "at position 1 of the lists: mu must be a torch.Tensor, got str", {"mu": [A, "A"], "std": 1.0}),
        (ValueError, "at position 1 of the lists: shapes do not broadcast: mu (2, 3), std (2, 4)",
         {"mu": [A, A], "std": [A, torch.ones(2, 4)]}),
        (ValueError, "at position 0 of the lists: exactly one of logvar, log_std, std, var, rho must be given, got none of "
                     "them", {"mu": [A, A]}),
        (ValueError, "the tensors of the lists must have one batch shape, as they have one KL, got (2,) and (5,) with "
                     "batch_dims=1; batch_dims=0 adds up all elements, as for the weights of a network",
         {"mu": [A, torch.zeros(5)], "std": 1.0}),
        (ValueError, "all tensors must be on one device, got mu[0] on cpu and mu[1] on meta",
         {"mu": [A, A.to("meta")], "std": 1.0}),
        (TypeError, "sigma is not an argument here", {"mu": [A, A], "sigma": 1.0}),
        (ValueError, "at position 0 of the lists: num_samples must not be negative, got -1",
         {"mu": [A, A], "std": 1.0, "num_samples": -1}),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, arguments: Arguments) -> None:
    with pytest.raises(error) as raised:
        elbo_ext.rsample_kl(**arguments)
    assert message in str(raised.value)
