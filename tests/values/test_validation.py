"""validate_values: what it refuses, what it says of it, and where it does not look."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import (
    bernoulli_log_prob,
    bounds,
    diagnostics,
    elbo_loss,
    gaussian_kl,
    gaussian_log_prob,
    laplace_log_prob,
    likelihoods,
    rsample,
    rsample_kl,
    validate_values,
)

A = torch.full((2, 3), 0.5)


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    with validate_values(False):
        yield


def bad(value: float, like: Tensor = A) -> Tensor:
    t = like.clone()
    t[1, 2] = value
    return t


NAN = float("nan")
AT = " at index (1, 2)"
ABOVE_FLOOR = "{} must not be negative or NaN, got "
BITS = "x must be in the support of the bernoulli likelihood, Interval(lower_bound=0.0, upper_bound=1.0), got "
CASES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (gaussian_log_prob, dict(x=bad(NAN), mean=A), "x must not be NaN, got nan" + AT),
    (gaussian_log_prob, dict(x=A, mean=bad(NAN)), "mean must not be NaN, got nan" + AT),
    (gaussian_log_prob, dict(x=A, mean=A, std=bad(-0.5)), "std must be positive, got -0.5" + AT),
    (gaussian_log_prob, dict(x=A, mean=A, var=torch.tensor(0.0)), "var must be positive, got 0"),
    (gaussian_log_prob, dict(x=A, mean=A, weight=bad(NAN)), "weight must not be NaN, got nan" + AT),
    (laplace_log_prob, dict(x=A, mean=A, scale=bad(NAN)), "scale must be positive, got nan" + AT),
    (bernoulli_log_prob, dict(x=bad(1.5), logits=A), BITS + "1.5" + AT),
    (bernoulli_log_prob, dict(x=bad(-255.0), logits=A), BITS + "-255" + AT),
    (
        gaussian_kl,
        dict(mu=A, std=A, prior_var=torch.tensor([1.0, 0, 1])),
        "prior_var must be positive, got 0 at index (1,)",
    ),
    (rsample, dict(mu=A, std=bad(0.0)), "std must be positive, got 0" + AT),
    (rsample, dict(mu=A, logvar=A, noise=bad(NAN)), "noise must not be NaN, got nan" + AT),
    (rsample_kl, dict(mu=bad(NAN), logvar=A), "mu must not be NaN, got nan" + AT),
    (elbo_loss, dict(recon=A, x=bad(2.0), kl=0.0, likelihood="bernoulli"), BITS + "2" + AT),
    (elbo_loss, dict(recon=bad(NAN), x=A, kl=0.0), "recon must not be NaN, got nan" + AT),
    (elbo_loss, dict(recon=A, x=A, kl=torch.tensor([0.0, NAN])), "kl must not be NaN, got nan at index (1,)"),
    (elbo_loss, dict(recon=A, x=A, kl=0.0, beta=torch.tensor(NAN)), "beta must not be NaN, got nan"),
    (elbo_loss, dict(recon=A, x=A, kl=0.0, recon_std=bad(-1.0)), "recon_std must be positive, got -1" + AT),
    (elbo_loss, dict(recon=A, x=A, mu=A, var=bad(-1.0)), "var must be positive, got -1" + AT),
    (
        elbo_loss,
        dict(recon=A, x=A, kl=0.0, likelihood=likelihoods.Laplace(scale=bad(-1.0))),
        "scale must be positive, got -1" + AT,
    ),
    (elbo_ext.ELBOLoss(recon_var=bad(-1.0)), dict(recon=A, x=A, kl=0.0), "recon_var must be positive, got -1" + AT),
    (bounds.free_bits, dict(kl=bad(NAN), nats=0.1, per="batch"), "kl must not be NaN, got nan" + AT),
    (bounds.iwae_bound, dict(log_weights=bad(NAN)), "log_weights must not be NaN, got nan" + AT),
    (
        bounds.iwae,
        dict(log_likelihood=lambda z: gaussian_log_prob(bad(NAN), z, batch_dims=2), mu=A, logvar=0.0, num_samples=2),
        "x must not be NaN, got nan" + AT,
    ),
    (diagnostics.kl_per_dimension, dict(mu=A, std=bad(-1.0)), "std must be positive, got -1" + AT),
    (gaussian_log_prob, dict(x=A, mean=A, rho=bad(NAN)), "rho must not be NaN, got nan" + AT),
    (gaussian_log_prob, dict(x=A, mean=A, var=bad(-0.25), min_var=0.5), ABOVE_FLOOR.format("var") + "-0.25" + AT),
    (gaussian_kl, dict(mu=A, std=bad(NAN), min_var=0.5), ABOVE_FLOOR.format("std") + "nan" + AT),
    (gaussian_kl, dict(mu=A, std=A, prior_std=bad(0.0)), "prior_std must be positive, got 0" + AT),
    (diagnostics.active_units, dict(mu=bad(NAN)), "mu must not be NaN, got nan" + AT),
]


@pytest.mark.parametrize(("function", "arguments", "message"), CASES)
def test_bad_values(function: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    function(**arguments)
    with validate_values(), pytest.raises(ValueError) as error:
        function(**arguments)
    assert str(error.value) == message
    function(**arguments)


def test_good_values_change_nothing() -> None:
    def results() -> Any:
        torch.manual_seed(0)
        z, kl = rsample_kl(A, std=A, kl_weight=A > 0)
        return z, elbo_loss(z, A, kl=kl, likelihood="bernoulli", beta=torch.tensor(0.5))

    expected = results()
    with validate_values():
        torch.testing.assert_close(results(), expected, rtol=0, atol=0)


def test_a_floor_carries_a_scale_of_zero() -> None:
    with validate_values():
        for floor in ("min_std", "min_var"):
            assert bool(gaussian_kl(A, std=bad(0.0), **{floor: 0.5}).isfinite().all())
            assert bool(gaussian_kl(A, rho=bad(-1.0), **{floor: 0.5}).isfinite().all())


def test_infinite_values_are_values() -> None:
    with validate_values():
        gaussian_log_prob(bad(float("inf")), A, logvar=bad(float("-inf")))
        bounds.iwae_bound(bad(float("-inf")))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (4, 2, 3)])
def test_elements_of_weight_zero(shape: tuple[int, ...]) -> None:
    """Whatever the weight's shape, the index is the operand's own."""
    weight = torch.ones(shape)
    weight[..., 1, :] = 0
    x = bad(NAN)
    with validate_values():
        gaussian_log_prob(x, A, weight=weight)
        gaussian_kl(x, std=x, weight=weight)
        if len(shape) == 2:
            elbo_loss(x, x, kl=0.0, weight=weight)
            rsample_kl(A, std=1.0, prior_mu=x, kl_weight=weight)
            elbo_loss(A, A, mu=x, std=x, kl_weight=weight)
            bounds.balanced_kl(x, std=x, posterior_weight=1.0, prior_weight=1.0, weight=weight)
        x[0, 1] = NAN
        with pytest.raises(ValueError, match=r"x must not be NaN, got nan at index \(0, 1\)"):
            gaussian_log_prob(x, A, weight=weight)
        with pytest.raises(ValueError, match=r"mu must not be NaN, got nan at index \(0, 1\)"):
            bounds.balanced_kl(x, std=1.0, posterior_weight=1.0, prior_weight=1.0, weight=weight)
        with pytest.raises(ValueError, match=r"mean must not be NaN, got nan at index \(0, 1\)"):
            gaussian_log_prob(A, x[:1], weight=weight)


def test_the_first_of_several() -> None:
    """By the order of the arguments, then by that of the elements."""
    x = bad(NAN)
    x[0, 1] = NAN
    with validate_values(), pytest.raises(ValueError, match=r"x must not be NaN, got nan at index \(0, 1\)"):
        gaussian_log_prob(x, bad(NAN), std=bad(-1.0))


def test_other_errors_come_first() -> None:
    with validate_values(), pytest.raises(ValueError, match="do not broadcast"):
        gaussian_log_prob(bad(NAN), torch.ones(5))
    with validate_values(), pytest.raises(TypeError, match="unexpected keyword"):
        gaussian_log_prob(A, A, nonsense=bad(NAN))  # type: ignore[call-arg]


def test_a_switch() -> None:
    validate_values(True)
    with pytest.raises(ValueError, match="must not be NaN"):
        rsample(bad(NAN), 0.0)
    with validate_values(False):
        rsample(bad(NAN), 0.0)
    with pytest.raises(ValueError, match="must not be NaN"):
        rsample(bad(NAN), 0.0)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(rsample(bad(NAN), 0.0)))
    thread.start()
    thread.join()
    assert len(results) == 1  # another thread has not asked
    validate_values(False)
    rsample(bad(NAN), 0.0)


def test_one_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: waits.append(t) or original(t))
    for forbidden in ("item", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, forbidden, lambda t: pytest.fail("waited"))
    with validate_values():
        elbo_loss(A, A, mu=A, std=A, beta=torch.tensor(0.5))
    assert len(waits) == 1


def test_gradients_and_transforms() -> None:
    with validate_values():
        leaf = A.clone().requires_grad_()
        elbo_loss(leaf, A, mu=leaf, std=leaf).loss.backward()
        torch.func.vmap(lambda x: gaussian_log_prob(x, x, batch_dims=0))(bad(NAN))
        torch.func.grad(lambda x: gaussian_log_prob(x, x, reduction="sum"))(bad(NAN))
    assert leaf.grad is not None


def test_not_in_compiled_code() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gaussian_log_prob(x, A), backend="eager", fullgraph=True)
    with validate_values():
        compiled(bad(NAN))


def test_every_likelihood_has_a_support() -> None:
    for likelihood in likelihoods.LIKELIHOODS.values():
        assert isinstance(likelihood.support, torch.distributions.constraints.Constraint)
