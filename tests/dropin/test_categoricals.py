"""elbo_ext.distributions' Categorical and OneHotCategoricalStraightThrough, against torch's in float64."""

import copy
import pickle
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch import distributions as theirs
from torch.distributions import Independent, kl_divergence

import elbo_ext
from elbo_ext import distributions as ours
from subclasses import Wrapper, unwrapped

NAMES = ("Categorical", "OneHotCategoricalStraightThrough")


@pytest.fixture(autouse=True)
def _seed() -> None:
    theirs.Distribution.set_default_validate_args(True)
    torch.manual_seed(0)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def value_of(name: str, *shape: int) -> Tensor:
    classes = torch.randint(5, shape, generator=torch.Generator().manual_seed(3))
    return classes if name == "Categorical" else torch.nn.functional.one_hot(classes, 5).double()


@pytest.mark.parametrize("given", ["logits", "probs"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_torchs(name: str, given: str) -> None:
    leaf = numbers(4, 3, 5) if given == "logits" else numbers(4, 3, 5).exp()
    results = []
    for module in (ours, theirs):
        parameter = leaf.clone().requires_grad_()
        d = getattr(module, name)(**{given: parameter})
        values = [
            d.log_prob(value_of(name, 4, 3)),
            d.log_prob(value_of(name, 2, 4, 3)),
            d.entropy(),
            d.mean,
            d.variance,
        ]
        values = [v for v in values if not v.isnan().any()]
        total = sum((v * (i + 1)).sum() for i, v in enumerate(values))
        results.append([*values, *torch.autograd.grad(total, parameter)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_attributes_are_torchs(name: str) -> None:
    p, q = (getattr(module, name)(logits=numbers(3, 5)) for module in (ours, theirs))
    assert isinstance(p, getattr(theirs, name))
    for a, b in ((p, q), (p.expand((4, 3)), q.expand((4, 3)))):
        assert type(a) is getattr(ours, name)
        assert a.batch_shape == b.batch_shape and a.event_shape == b.event_shape
        torch.testing.assert_close((a.logits, a.probs), (b.logits, b.probs))
        for shape in ((), (2,), (2, 6)):
            assert a.sample(shape).shape == b.sample(shape).shape
        torch.testing.assert_close(
            a.log_prob(value_of(name, *a.batch_shape)), b.log_prob(value_of(name, *a.batch_shape))
        )
    joint = Independent(p, 1)
    torch.testing.assert_close(joint.log_prob(value_of(name, 3)), p.log_prob(value_of(name, 3)).sum())
    for copied in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(copied.log_prob(value_of(name, 3)), p.log_prob(value_of(name, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_bad_values_and_parameters(name: str) -> None:
    d = getattr(ours, name)(logits=numbers(3, 5))
    bad = torch.tensor([0, 5, 1]) if name == "Categorical" else torch.full((3, 5), 0.2)
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(bad)
    with pytest.raises(TypeError, match="value must be a torch.Tensor, got float"):
        d.log_prob(0.5)
    with pytest.raises(ValueError, match="logits"):
        getattr(ours, name)(logits=torch.full((3, 5), torch.nan))
    with pytest.raises(TypeError, match="logits must have dtype"):
        getattr(ours, name)(logits=torch.zeros(3, 5, dtype=torch.complex64))
    unchecked = ours.Categorical(logits=numbers(3, 5), validate_args=False)
    assert unchecked.log_prob(torch.tensor([0, 5, -1])).isneginf().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Half precision is computed in float32 and comes out so; samples keep their dtype."""
    logits = numbers(4, 5, dtype=dtype)
    d, wide = getattr(ours, name)(logits=logits), getattr(theirs, name)(logits=logits.double())
    value = value_of(name, 4)
    result = d.log_prob(value if name == "Categorical" else value.to(dtype))
    assert result.dtype == torch.float32 and d.entropy().dtype == torch.float32
    # torch normalizes logits in their dtype
    torch.testing.assert_close(result.double(), wide.log_prob(value), rtol=0, atol=4 * torch.finfo(dtype).eps)
    if name != "Categorical":
        assert d.rsample((2,)).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_kl(name: str) -> None:
    """With each other and with torch's, as torch's; to relative precision where the two are close."""
    p, q = numbers(4, 5).requires_grad_(), numbers(4, 5, seed=1).requires_grad_()
    exact = kl_divergence(getattr(theirs, name)(logits=p), getattr(theirs, name)(logits=q))
    gradients = torch.autograd.grad(exact.sum(), (p, q))
    for first, second in ((ours, ours), (ours, theirs), (theirs, ours)):
        kl = kl_divergence(getattr(first, name)(logits=p), getattr(second, name)(logits=q))
        torch.testing.assert_close(kl, exact, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(kl.sum(), (p, q)), gradients, rtol=1e-10, atol=1e-13)
    close = (p + 1e-7 * q).detach()
    kl = kl_divergence(getattr(ours, name)(logits=p), getattr(ours, name)(logits=close))
    s = p.softmax(-1)
    second_order = (s * (q - (s * q).sum(-1, keepdim=True)).square()).sum(-1) * 1e-14 / 2
    torch.testing.assert_close(kl, second_order, rtol=1e-6, atol=0)


def test_samples() -> None:
    """One-hot, with their probabilities, the package's draws, and the gradient of the probabilities."""
    logits = numbers(3, 5).requires_grad_()
    d = ours.OneHotCategoricalStraightThrough(logits=logits)
    z = d.rsample((20_000,))
    assert bool((z.sum(-1) == 1).all()) and z.requires_grad and not d.sample().requires_grad
    for counts, p in zip(z.detach().sum(0), d.probs.detach(), strict=True):
        assert scipy.stats.chisquare(counts.numpy(), (20_000 * p / p.sum()).numpy()).pvalue > 1e-3
    torch.manual_seed(5)
    own, _ = elbo_ext.categorical_rsample_kl(d.logits, num_samples=1)
    torch.manual_seed(5)
    assert torch.equal(d.rsample(), own[0])
    upstream = numbers(3, 5, seed=2)
    (gradient,) = torch.autograd.grad((d.rsample() * upstream).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logits.softmax(-1) * upstream).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    classes = ours.Categorical(logits=numbers(3, 5)).sample((20_000,))
    assert classes.dtype == torch.int64 and classes.shape == (20_000, 3)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_wrapped(name: str) -> None:
    logits, value = numbers(3, 5), value_of(name, 3)

    def score(logits: Tensor, value: Tensor) -> Any:
        d = getattr(ours, name)(logits=logits, validate_args=False)
        return d.log_prob(value), d.entropy()

    torch._dynamo.reset()
    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)(logits, value)
    torch.testing.assert_close(compiled, score(logits, value))
    wrapped = functional(name, Wrapper(logits), value)
    torch.testing.assert_close(unwrapped(wrapped), score(logits, value)[0])


def functional(name: str, logits: Tensor, value: Tensor) -> Tensor:
    return getattr(ours, name)(logits=logits, validate_args=False).log_prob(value)
