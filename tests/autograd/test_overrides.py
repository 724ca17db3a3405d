"""``__torch_function__``: every public function lets a subclass of tensors take the call over, as torch's own do."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import elbo_ext
from elbo_ext import ELBO, ELBOLoss, bounds, diagnostics, likelihoods
from samples.registry import calls_of_likelihoods
from subclasses import Plain, Wrapper, unwrapped


class Logging(Tensor):
    """Overrides with torch's own."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


X, MU, SCALE, KL = numbers(4, 3), numbers(4, 3, seed=1), numbers(3, seed=2) + 0.5, numbers(4, seed=3)
COUNTS = (5 * X.abs()).ceil()
WEIGHTS = numbers(5, 4, seed=4)
POSTERIOR = {"mu": MU, "std": SCALE, "prior_mu": numbers(3, seed=5), "prior_logvar": numbers(3, seed=6)}


def log_likelihood(z: Tensor) -> Tensor:
    return -(z - 1).square().sum(-1)


def of_samples(function: Any) -> tuple[Any, dict[str, Any]]:
    return function, {"log_likelihood": log_likelihood, **POSTERIOR, "num_samples": 3}


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    **calls_of_likelihoods(x=X, counts=COUNTS, real=MU, positive=SCALE),
    "categorical_kl": (elbo_ext.categorical_kl, {"logits": MU, "prior_logits": X, "unimix": 0.01}),
    "categorical_rsample_kl": (elbo_ext.categorical_rsample_kl, {"logits": MU, "prior_logits": X}),
    "gaussian_kl": (elbo_ext.gaussian_kl, POSTERIOR),
    "rsample": (elbo_ext.rsample, {"mu": MU, "std": SCALE}),
    "rsample_kl": (elbo_ext.rsample_kl, POSTERIOR),
    "rsample_with_log_prob": (elbo_ext.rsample_with_log_prob, POSTERIOR),
    "elbo_loss": (elbo_ext.elbo_loss, {"recon": MU, "x": X, "kl": KL, "recon_std": SCALE, "beta": torch.tensor(0.5)}),
    "elbo_loss-mu": (elbo_ext.elbo_loss, {"recon": MU, "x": X, **POSTERIOR, "reduction": "none"}),
    "free_energy": (bounds.free_energy, {"recon": MU, "x": X, "kl": KL}),
    "free_bits": (bounds.free_bits, {"kl": KL, "nats": torch.tensor(0.4), "per": "example"}),
    "capacity": (bounds.capacity, {"kl": KL, "nats": torch.tensor(0.4), "per": "batch"}),
    "balanced_kl": (bounds.balanced_kl, {**POSTERIOR, "posterior_weight": 0.2, "prior_weight": 0.8}),
    "iwae_bound": (bounds.iwae_bound, {"log_weights": WEIGHTS}),
    **{function.__name__: of_samples(function) for function in (
        bounds.sgvb_a, bounds.sgvb_b, bounds.sticking_the_landing, bounds.iwae, bounds.dreg, bounds.score_function)},
    "log_evidence": (diagnostics.log_evidence, {"log_weights": WEIGHTS}),
    "elbo_gap": (diagnostics.elbo_gap, {"log_weights": WEIGHTS, "elbo": KL}),
    "kl_per_dimension": (diagnostics.kl_per_dimension, POSTERIOR),
    "active_units": (diagnostics.active_units, {"mu": MU}),
    "collapse_report": (diagnostics.collapse_report, POSTERIOR),
    "aggregate_posterior": (diagnostics.aggregate_posterior, {"mu": MU, "std": SCALE}),
    "amortization_gap": (
        diagnostics.amortization_gap,
        {"elbo": lambda mu, logvar: -elbo_ext.gaussian_kl(mu, logvar), "mu": MU, "logvar": X, "steps": 2},
    ),
}  # fmt: skip
CALLS["gaussian_log_prob"][1]["weight"] = numbers(4, 1)
CALLS["bernoulli_log_prob"][1]["reduction"] = "mean"
WITH_TENSORS = {case: call for case, call in CALLS.items() if case != "collapse_report"}


def run(function: Any, arguments: dict[str, Any], wrap: Callable[[Tensor], Tensor]) -> tuple[Any, list[Tensor | None]]:
    """The result, and the gradients of its sum by the tensors inside."""
    tensors = {name: t.clone() for name, t in arguments.items() if isinstance(t, Tensor)}
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    torch.manual_seed(7)
    result = function(**{**arguments, **{name: wrap(t) for name, t in tensors.items()}})
    parts = [unwrapped(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
    total = sum(t.double().sum() for t in parts if t.requires_grad)
    if isinstance(total, int):
        return result, []
    return result, list(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))


def values(result: Any) -> list[Any]:
    if isinstance(result, diagnostics.CollapseReport):
        result = vars(result)
    return [unwrapped(t) for t in tree_leaves(result)]


def test_every_public_function_is_here() -> None:
    functions = {
        name: function
        for module in (elbo_ext.functional, bounds, diagnostics)
        for name in module.__all__
        if inspect.isfunction(function := getattr(module, name))
    }
    assert {function.__name__ for function, _ in CALLS.values()} == functions.keys()
    for name, function in functions.items():
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)
        assert len(inspect.signature(function).parameters) > 1 or name == "log_evidence"
        assert inspect.getdoc(function)


@pytest.mark.parametrize("case", CALLS)
def test_a_wrapper(case: str) -> None:
    function, arguments = CALLS[case]
    Wrapper.calls.clear()
    result, gradients = run(function, arguments, Wrapper)
    assert Wrapper.calls[0] is function
    expected, expected_gradients = run(function, arguments, lambda t: t)
    torch.testing.assert_close(values(result), values(expected), rtol=0, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=0)
    if case in WITH_TENSORS:
        assert all(isinstance(t, Wrapper) for t in tree_leaves(result) if isinstance(t, Tensor))
    if function.__module__ == "elbo_ext.functional":
        assert any(g is not None and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("name", ["mu", "x", "recon", "std", "prior_mu", "weight", "kl", "beta", "nats", "elbo"])
def test_one_wrapped_argument(case: str, name: str) -> None:
    function, arguments = CALLS[case]
    if not isinstance(arguments.get(name), Tensor):
        pytest.skip("not an argument of this function")
    Wrapper.calls.clear()
    torch.manual_seed(7)
    result = function(**{**arguments, name: Wrapper(arguments[name])})
    assert Wrapper.calls[0] is function
    torch.manual_seed(7)
    torch.testing.assert_close(values(result), values(function(**arguments)), rtol=0, atol=0)


def test_arguments_by_position() -> None:
    assert isinstance(elbo_ext.gaussian_log_prob(X, Wrapper(MU), SCALE), Wrapper)
    assert isinstance(elbo_ext.elbo_loss(MU, X, kl=Wrapper(KL)).loss, Wrapper)


@pytest.mark.parametrize("kind", [Plain, Logging])
@pytest.mark.parametrize("case", CALLS)
def test_a_subclass_that_changes_nothing(case: str, kind: type[Tensor]) -> None:
    """Results are of the subclass, as torch's own are, and a NamedTuple of them is one; torch looks into no dataclass."""
    function, arguments = CALLS[case]
    result, gradients = run(function, arguments, lambda t: t.as_subclass(kind))
    expected, expected_gradients = run(function, arguments, lambda t: t)
    assert type(result) in (type(expected), kind)
    leaves = tree_leaves(result, is_leaf=lambda t: isinstance(t, diagnostics.CollapseReport))
    assert all(type(t) is kind for t in leaves if isinstance(t, Tensor))
    plain = [t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in values(result)]
    torch.testing.assert_close(plain, values(expected), rtol=0, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=0)


def test_parameters_are_plain_tensors() -> None:
    with torch.no_grad():
        assert type(elbo_ext.gaussian_log_prob(X, torch.nn.Parameter(MU))) is Tensor


def test_the_module() -> None:
    loss = ELBOLoss("gaussian", recon_logvar=torch.nn.Parameter(torch.zeros(3)))
    recon = MU.clone().requires_grad_()
    wrapped = loss(Wrapper(recon), X, kl=KL)
    assert isinstance(wrapped, ELBO) and isinstance(wrapped.loss, Wrapper)
    gradients = torch.autograd.grad(wrapped.loss._t, [recon, loss.scale])
    expected = torch.autograd.grad(loss(recon, X, kl=KL).loss, [recon, loss.scale])
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    "likelihood_with",
    [
        lambda scale: likelihoods.Laplace(scale=scale),
        lambda scale: likelihoods.Gaussian(rho=scale, min_var=0.1),
        lambda scale: likelihoods.DiscretizedGaussian(std=scale, min_std=0.1, low=0.0, high=1.0, bins=8),
        lambda scale: likelihoods.NegativeBinomial(theta=scale, recon="log_mean"),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_parameter_of_a_likelihood_object(reduction: str, likelihood_with: Callable[[Tensor], Any]) -> None:
    """It stands inside of an argument; the log-likelihood, whose argument it is, gives way to it."""

    def losses(scale: Tensor) -> ELBO:
        likelihood = likelihood_with(scale)
        return elbo_ext.elbo_loss(
            MU.expand(2, 4, 3), X, MU, 0.0, likelihood=likelihood, batch_dims=2, reduction=reduction, beta=0.5
        )

    scale = SCALE.clone().requires_grad_()
    wrapped, expected = losses(Wrapper(scale)), losses(scale)
    torch.testing.assert_close(values(wrapped), list(expected))
    of_wrapped, of_scale = (torch.autograd.grad(unwrapped(e.loss).sum(), scale)[0] for e in (wrapped, expected))
    torch.testing.assert_close(of_wrapped, of_scale)


def test_the_exact_model() -> None:
    model = bounds.LinearGaussian(numbers(3, 2), std=0.5)
    q = {"mu": numbers(4, 2, seed=8), "logvar": torch.zeros(2)}
    for method in (model.elbo, model.gap):
        x = X.clone().requires_grad_()
        wrapped = method(Wrapper(x), **q)
        torch.testing.assert_close(wrapped._t, method(x, **q))
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x) for t in (wrapped._t, method(x, **q))))


def test_modes() -> None:
    """A mode sees the public function, too; but code of the caller's runs inside of the mode."""
    seen: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def decoder(z: Tensor) -> Tensor:
        return log_likelihood(z) + torch.zeros(())

    with Mode():
        elbo_ext.gaussian_kl(MU, 0.0)
        bounds.iwae(decoder, MU, 0.0, num_samples=2)
    assert elbo_ext.gaussian_kl in seen and torch.zeros in seen


def test_a_class_that_refuses() -> None:
    class Refusing:
        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            return NotImplemented

    with pytest.raises(TypeError, match="no implementation found for 'elbo_ext.functional.*rsample'"):
        elbo_ext.rsample(MU, Refusing())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Plain, torch.nn.Parameter])
def test_compiled(kind: type[Tensor]) -> None:
    def function(mu: Tensor, x: Tensor) -> ELBO:
        kl = elbo_ext.gaussian_kl(mu, std=0.5)
        return elbo_ext.elbo_loss(mu, x, kl=bounds.free_bits(kl, 0.1, per="example"))

    torch._dynamo.reset()
    mu = MU.clone().as_subclass(kind) if kind is Plain else torch.nn.Parameter(MU.clone())
    expected = function(mu, X)
    # aot_eager has no way for an operator that is given a subclass.
    backend = "eager" if kind is Plain else "aot_eager"
    compiled = torch.compile(function, backend=backend, fullgraph=True)(mu, X)
    for a, b in zip(compiled, expected, strict=True):
        assert type(a) is type(b)
        torch.testing.assert_close(a, b)


def test_compiled_inside_of_a_mode() -> None:
    torch._dynamo.reset()
    with torch.device("cpu"):
        compiled = torch.compile(lambda mu: elbo_ext.gaussian_kl(mu, 0.0), backend="eager", fullgraph=True)(MU)
    torch.testing.assert_close(compiled, elbo_ext.gaussian_kl(MU, 0.0))
