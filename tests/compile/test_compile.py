"""torch.compile(fullgraph=True): the same values, gradients and draws as eager code under the same torch.manual_seed.

Most tests use the backend aot_eager, which traces, functionalizes and partitions like inductor but compiles no C++;
inductor is tried on the few graphs that have everything.
"""

import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

import elbo_ext
from elbo_ext import (
    ELBOLoss,
    bounds,
    diagnostics,
    elbo_loss,
    gaussian_kl,
    gaussian_log_prob,
    reference,
    rsample,
    rsample_kl,
)
from samples import CORE, REDUCTIONS, Sample, differentiable

# One sample of each structure that reaches the graph: function, number of operands, constants, reductions, layouts.
TRACED_IDS = {
    "gaussian-crossed",
    "gaussian-mean-number",
    "gaussian-weight-mask",
    "gaussian-batch_dims-3-none",
    "gaussian-layout-channels_last",
    "gaussian-mixed-x-float32",
    "gaussian-empty-batch",
    "bernoulli-weight",
    "negative_binomial-logits-log_theta",
    "student_t-log_df",
    "discretized_gaussian-batch_dims-1-mean",
    "elbo-discretized_gaussian",
    "discretized_gaussian-rho+min_std-element",
    "categorical-plain",
    "categorical-weight-mask",
    "categorical-ignored",
    "multinomial-shared",
    "multinomial-x-with-gradient",
    "categorical_kl-over-samples",
    "categorical_kl-unimix-6",
    "categorical_kl-batch_dims-1-sum",
    "categorical_sample-plain",
    "categorical_sample-num_samples-3",
    "kl-std-prior_std",
    "kl-batch_dims-1-sum",
    "rsample-num_samples-3",
    "rsample-noise-num_samples",
    "rsample-layout-channels_last",
    "rsample_kl-prior-larger",
    "rsample_kl-noise",
    "log_prob-prior-larger",
    "log_prob-noise-sticking_the_landing",
    "log_prob-logvar-prior_logvar-score",
    "elbo-gaussian-mu-none",
    "elbo-gaussian-mu-mean",
    "elbo-bernoulli-kl-sum",
    "elbo-beta-tensor",
    "gaussian-rho+min_var-element",
    "rsample_kl-rho+min_std",
    "elbo-rho+min_std",
    "elbo-mixed",
    "elbo-mask",
}
TRACED = [sample for sample in CORE if sample.id in TRACED_IDS]
# Of any other function the one whose operands all broadcast.
_FUNCTIONS = {sample.function for sample in TRACED}
TRACED += [sample for sample in CORE if sample.id.endswith("-crossed") and sample.function not in _FUNCTIONS]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test compiles for itself: no graph of another test, no count of its recompilations."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch.compile announces its own deprecations and the machine's missing accelerators.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(function: Callable[..., Any], *inputs: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The results, the gradients of their weighted sum, and where the generator stands afterwards."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in inputs]
    torch.manual_seed(7)
    results = function(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    summed = [t.double() * torch.arange(1, t.numel() + 1).reshape(t.shape) for t in results if t.requires_grad]
    total = sum(t.sum() for t in summed)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=True)]
    return results, gradients, torch.rand(3)


def assert_same(compiled: tuple[Any, ...], eager: tuple[Any, ...], rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Both call the same kernels; what differs is the order in which torch sums the examples."""
    torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol, equal_nan=True)


def test_the_table_has_the_traced_samples() -> None:
    assert {sample.id for sample in TRACED} >= TRACED_IDS
    assert {sample.function for sample in TRACED} == {sample.function for sample in CORE}


@pytest.mark.parametrize("sample", TRACED, ids=lambda sample: sample.id)
def test_public_functions(sample: Sample) -> None:
    arguments = sample.make(torch.float32)
    if "mixed" in sample.id:
        arguments = sample.make(torch.bfloat16)
    names = differentiable(arguments)

    def function(*values: Tensor) -> Any:
        result = getattr(elbo_ext, sample.function)(**{**arguments, **dict(zip(names, values, strict=True))})
        return tuple(result) if isinstance(result, tuple) else result

    values = [arguments[name] for name in names]
    compiled = run(torch.compile(function, backend="aot_eager", fullgraph=True), *values)
    eager = run(function, *values)
    assert_same(compiled, eager)
    for a, b in zip(compiled[0], eager[0], strict=True):
        assert a.stride() == b.stride()
    if sample.function.startswith("rsample"):
        assert torch.equal(compiled[0][0], eager[0][0])  # the draw itself, bit for bit


ONE, TWO = numbers(4, 3), numbers(4, 3, seed=1).sigmoid()
BATCH = numbers(4, seed=2)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "log_prob": (gaussian_log_prob, dict(x=TWO, mean=ONE)),
    "kl": (gaussian_kl, dict(mu=ONE, logvar=TWO)),
    "rsample": (rsample, dict(mu=ONE, logvar=TWO)),
    "rsample_kl": (rsample_kl, dict(mu=ONE, logvar=TWO)),
    "rsample_with_log_prob": (elbo_ext.rsample_with_log_prob, dict(mu=ONE, logvar=TWO)),
    "elbo-kl": (elbo_loss, dict(recon=ONE, x=TWO, kl=BATCH, likelihood="bernoulli")),
    "elbo-mu": (elbo_loss, dict(recon=ONE, x=TWO, mu=ONE, std=1.0, beta=BATCH.abs())),
    "elbo-samples": (elbo_loss, dict(recon=torch.stack([ONE, TWO]), x=TWO, kl=BATCH, batch_dims=2)),
    "elbo-log_likelihood": (elbo_loss, dict(log_likelihood=BATCH, kl=BATCH)),
    "free_energy": (bounds.free_energy, dict(recon=ONE, x=TWO, kl=BATCH)),
    **{f"ELBOLoss-{reduction}": (ELBOLoss(reduction=reduction), dict(recon=ONE, x=TWO, kl=BATCH)) for reduction in REDUCTIONS},
    "log_evidence": (diagnostics.log_evidence, dict(log_weights=ONE)),
    "aggregate_posterior": (diagnostics.aggregate_posterior, dict(mu=ONE, logvar=TWO)),
    "amortization_gap": (
        diagnostics.amortization_gap,
        dict(elbo=lambda mu, logvar: -gaussian_kl(mu, logvar), mu=ONE, logvar=TWO, steps=1),
    ),
}  # fmt: skip
WITH_REDUCTIONS = [
    (name, reduction)
    for name, (function, _) in CALLS.items()
    for reduction in (REDUCTIONS if "reduction" in inspect.signature(function).parameters else [None])
]


@pytest.mark.parametrize(("name", "reduction"), WITH_REDUCTIONS)
def test_a_function_by_itself(name: str, reduction: str | None) -> None:
    """Compiled without a function around it, where Dynamo has to make the result again outside of the graph, of its class."""
    function, arguments = CALLS[name]
    arguments = arguments if reduction is None else {**arguments, "reduction": reduction}
    # amortization_gap steps out of the graph for its optimizer.
    compiled = torch.compile(function, backend="eager", fullgraph=name != "amortization_gap", dynamic=False)
    torch.manual_seed(7)
    actual = compiled(**arguments)
    torch.manual_seed(7)
    expected = function(**arguments)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_where_no_gradient_is_wanted() -> None:
    """The graph is another one then: no autograd.Function, no backward pass."""

    def everything(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        z, kl = rsample_kl(mu, logvar)
        return z, kl, rsample(z, logvar), gaussian_log_prob(mu, z), *elbo_loss(z, mu, kl=kl)

    mu, logvar = numbers(4, 3), numbers(3, seed=1)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    eager = everything(mu, logvar)
    for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with context:
            torch.manual_seed(7)
            results = compiled(mu, logvar)
        assert not any(t.requires_grad for t in results)
        assert_same(results, eager)


# ---- draws ----


def several_draws(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    """Equal calls, calls of other shapes, torch's own draws between them, and a draw that nobody uses."""
    first = rsample(mu, logvar)
    second = rsample(mu, logvar)
    noisy = dropout(second, 0.5)
    rsample(mu, logvar)
    third, kl = rsample_kl(mu, logvar, num_samples=2)
    uniform = torch.rand_like(mu)
    fourth = rsample(mu[:1], 0.0)
    return first, second, noisy, third, kl, uniform, fourth


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_several_draws(backend: str) -> None:
    mu, logvar = numbers(4, 3), numbers(3, seed=1)
    compiled = run(torch.compile(several_draws, backend=backend, fullgraph=True), mu, logvar)
    eager = run(several_draws, mu, logvar)
    for a, b in zip(compiled[0], eager[0], strict=True):
        assert torch.equal(a, b)
    assert_same(compiled, eager)
    first, second, _, third, *_ = compiled[0]
    for a, b in ((first, second), (first, third[0]), (third[0], third[1])):
        assert not bool((a == b).any())


def test_draws_differ_from_call_to_call() -> None:
    """The seed is drawn when the graph runs, not when it is made."""
    mu = numbers(4, 3)
    compiled = torch.compile(rsample, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    graph = [compiled(mu, 0.0) for _ in range(3)]
    torch.manual_seed(0)
    eager = [rsample(mu, 0.0) for _ in range(3)]
    for a, b in zip(graph, eager, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(graph[0], graph[1])


def test_a_graph_break_keeps_the_order_of_draws() -> None:
    def function(mu: Tensor) -> tuple[Tensor, Tensor]:
        first = rsample(mu, 0.0)
        torch._dynamo.graph_break()
        return first, rsample(mu, 0.0)

    mu = numbers(4, 3)
    assert_same(run(torch.compile(function, backend="aot_eager"), mu), run(function, mu), rtol=0, atol=0)


def test_an_own_generator() -> None:
    """Dynamo takes no torch.Generator into a graph, not even for torch.randn; without fullgraph it steps out of it."""
    mu, generator = numbers(4, 3), torch.Generator()
    compiled = torch.compile(lambda m: rsample(m.sin(), 0.0, generator=generator).cos(), backend="aot_eager")
    results = []
    for function in (compiled, lambda m: rsample(m.sin(), 0.0, generator=generator).cos()):
        generator.manual_seed(3)
        results.append(function(mu))
    assert torch.equal(*results)


# ---- the whole step ----


class VAE(torch.nn.Module):
    """Everything at once: two draws, dropout between them, a learned scale, the loss."""

    def __init__(self, drop: float = 0.0, num_samples: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)
        self.loss = ELBOLoss(recon_logvar=torch.nn.Parameter(torch.zeros(())), beta=0.5,
                             batch_dims=1 if num_samples is None else 2)  # fmt: skip
        self.drop, self.num_samples = drop, num_samples

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = self.encoder(x).chunk(2, -1)
        z, kl = rsample_kl(mu, logvar, num_samples=self.num_samples)
        hidden = dropout(z, self.drop) if self.drop else z
        other = rsample(mu, logvar)
        elbo = self.loss(self.decoder(hidden + other), x, kl=kl)
        return elbo.loss, elbo.log_likelihood, elbo.kl, z, other


def train(model: VAE, step: Callable[..., Any], batches: list[Tensor]) -> list[Tensor]:
    """Every result of every step, and the parameters at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(5)
    seen = []
    for x in batches:
        optimizer.zero_grad()
        results = step(x)
        results[0].backward()
        seen += [t.detach() for t in results] + [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return [*seen, *(p.detach() for p in model.parameters()), torch.rand(3)]


@pytest.mark.parametrize(("backend", "num_samples", "sizes"), [
    ("aot_eager", None, (6, 6, 5)),
    ("inductor", 3, (6, 6)),
])  # fmt: skip
def test_training(backend: str, num_samples: int | None, sizes: tuple[int, ...]) -> None:
    """Steps of training, the last batch smaller."""
    batches = [numbers(n, 12, seed=i).sigmoid() for i, n in enumerate(sizes)]
    eager, model = VAE(num_samples=num_samples), VAE(num_samples=num_samples)
    truth = train(eager, eager, batches)
    actual = train(model, torch.compile(model, backend=backend, fullgraph=True), batches)
    assert_same(tuple(actual), tuple(truth), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_with_dropout(backend: str) -> None:
    """inductor draws dropout from a generator of its own, unless it is told to do as eager code does."""
    batches = [numbers(6, 12, seed=i).sigmoid() for i in range(2)]
    eager, model = VAE(drop=0.4), VAE(drop=0.4)
    with torch._inductor.config.patch(fallback_random=True):
        actual = train(model, torch.compile(model, backend=backend, fullgraph=True), batches)
    assert_same(tuple(actual), tuple(train(eager, eager, batches)), rtol=5e-6, atol=5e-6)


def test_inductor_draws() -> None:
    """Where inductor has its own random functions and its own elimination of common and dead code."""

    def function(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        first = rsample(mu, logvar)
        second = rsample(mu, logvar)
        rsample(mu, logvar)
        third, kl = rsample_kl(mu, logvar)
        return first * second.sin(), second, third, kl

    mu, logvar = numbers(4, 3), numbers(3, seed=1)
    compiled = run(torch.compile(function, backend="inductor", fullgraph=True), mu, logvar)
    assert_same(compiled, run(function, mu, logvar))


def test_autocast() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(12, 8), numbers(6, 12)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            mu, logvar = layer(x).chunk(2, -1)
            z, kl = rsample_kl(mu, logvar)
            elbo = elbo_loss(z.repeat(1, 3), x, kl=kl)
        return z, elbo.loss, elbo.kl

    compiled = run(torch.compile(function, backend="aot_eager", fullgraph=True), x)
    eager = run(function, x)
    assert [t.dtype for t in compiled[0]] == [torch.bfloat16, torch.float32, torch.float32]
    assert_same(compiled, eager)


def test_checkpoint_inside() -> None:
    """A region that the compiled backward pass computes again. (A draw inside of such a region is refused by torch.)"""

    def region(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return mu.sin() * mu, gaussian_kl(mu, logvar)

    def function(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(region, mu, logvar, use_reentrant=False)

    mu, logvar = numbers(4, 3), numbers(3, seed=1)
    compiled = run(torch.compile(function, backend="aot_eager", fullgraph=True), mu, logvar)
    assert_same(compiled, run(region, mu, logvar))


def test_checkpoint_around() -> None:
    """A compiled region that eager code computes again."""
    compiled = torch.compile(rsample_kl, backend="aot_eager", fullgraph=True)
    mu, logvar = numbers(4, 3), numbers(3, seed=1)
    actual = run(lambda m, s: checkpoint(compiled, m, s, use_reentrant=False), mu, logvar)
    assert_same(actual, run(rsample_kl, mu, logvar))


# ---- how often is compiled ----


def step(x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    z, kl = rsample_kl(mu, logvar, num_samples=2)
    elbo = elbo_loss(z, x, kl=kl, batch_dims=2)
    return elbo.loss, z, gaussian_log_prob(x, mu, logvar)


@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_batch_size(dynamic: bool | None) -> None:
    """After the second size no size is compiled for again, but for 0 and 1, which torch always treats apart."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    counts = []
    for size in (4, 5, 7, 12, 6, 300) if dynamic else (4, 5, 7, 300, 1, 0):
        x, mu, logvar = numbers(size, 3), numbers(size, 3, seed=1), numbers(3, seed=2)
        assert_same(run(compiled, x, mu, logvar), run(step, x, mu, logvar), rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[1] <= 2
    assert counts[1:4] == [counts[1]] * 3
    assert counts[-1] <= counts[1] + (0 if dynamic else 2)


def test_static_shapes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    for size in (4, 5, 4, 5):
        x, mu, logvar = numbers(size, 3), numbers(size, 3, seed=1), numbers(3, seed=2)
        assert_same(run(compiled, x, mu, logvar), run(step, x, mu, logvar), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_annealed_beta() -> None:
    """A beta that grows from step to step is a number, and no reason to compile each time."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(recon: Tensor, x: Tensor, beta: float) -> tuple[Tensor, ...]:
        return tuple(elbo_loss(recon, x, recon, 0.0, beta=beta))

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    recon, x = numbers(4, 3), numbers(4, 3, seed=1)
    for beta in (0.0, 0.1, 0.2, 0.3, 0.4, 1.0):
        assert_same(run(compiled, recon, x, beta), run(function, recon, x, beta))
    assert counter.frame_count <= 3  # the first, a symbolic one, and perhaps one for beta == 1


def test_annealed_scale() -> None:
    """A scale that changes is passed as a tensor of no dimensions; the kernels take it as it is."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, m, s: gaussian_log_prob(x, m, std=s), backend=counter, fullgraph=True)
    x, mean = numbers(4, 3), numbers(4, 3, seed=1)
    for std in torch.linspace(0.5, 2, 5):
        assert_same(run(compiled, x, mean, std), run(lambda x, m, s: gaussian_log_prob(x, m, std=s), x, mean, std))
    assert counter.frame_count == 1


def test_training_compiles_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = VAE()
    train(model, torch.compile(model, backend=counter, fullgraph=True), [numbers(6, 12, seed=i) for i in range(4)])
    assert counter.frame_count == 1


# ---- torch.func inside of torch.compile ----

FUNCTIONS: dict[str, Callable[[Any], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "gaussian_log_prob": lambda m: lambda v, s, x: m.gaussian_log_prob(x, v, s, batch_dims=0),
    "bernoulli_log_prob": lambda m: lambda v, s, x: m.bernoulli_log_prob(x.sigmoid(), v * s, batch_dims=0),
    "gaussian_kl": lambda m: lambda v, s, x: m.gaussian_kl(v, s, batch_dims=0),
    "rsample": lambda m: lambda v, s, x: m.rsample(v, s, noise=x).pow(2).sum(),
    "rsample_kl": lambda m: lambda v, s, x: sum(t.sum() for t in m.rsample_kl(v, s, noise=x, batch_dims=0)),
    "rsample_with_log_prob": lambda m: (
        lambda v, s, x: sum(t.sum() for t in m.rsample_with_log_prob(v, s, noise=x, batch_dims=0))
    ),
    "elbo_loss": lambda m: lambda v, s, x: m.elbo_loss(v, x, v, s, batch_dims=0).loss,
}
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: lambda v, s, x: grad(f, (0, 1))(v[0], s, x[0]),
    "vmap": lambda f: vmap(f, in_dims=(0, None, 0)),
    "vmap-grad": lambda f: vmap(grad(f, (0, 1)), in_dims=(0, None, 0)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_inside(transform: str) -> None:
    """Derivatives taken inside of the compiled function, against those of the reference outside."""

    def everything(module: Any) -> Callable[..., dict[str, Any]]:
        return lambda *at: {name: TRANSFORMS[transform](build(module))(*at) for name, build in FUNCTIONS.items()}

    values = (numbers(4, 3), numbers(3, seed=1), numbers(4, 3, seed=2))
    truth = everything(reference)(*(v.double() for v in values))
    actual = torch.compile(everything(elbo_ext), backend="aot_eager", fullgraph=True)(*values)
    torch.testing.assert_close(actual, truth, rtol=2e-5, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_other_gradients_in_a_transform_inside(backend: str) -> None:
    """A gradient that is not that of the value."""

    def gradient(mu: Tensor, x: Tensor) -> Tensor:
        def kl(mu: Tensor) -> Tensor:
            return bounds.balanced_kl(mu, 0.0, x, x, posterior_weight=0.1, prior_weight=3.0).sum()

        return grad(kl)(mu)

    mu, x = numbers(4, 3), numbers(4, 3, seed=1)
    expected = 0.1 * (mu - x) * torch.exp(-x)
    for function in (gradient, torch.compile(gradient, fullgraph=True, backend=backend)):
        torch.testing.assert_close(function(mu, x), expected)


def test_draws_in_a_transform_inside() -> None:
    def function(mu: Tensor, logvar: Tensor) -> Tensor:
        return grad(lambda m: rsample(m, logvar).pow(2).sum())(mu)

    mu, logvar = numbers(4, 3), numbers(3, seed=1)
    results = []
    for f in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        torch.manual_seed(7)
        results.append((f(mu, logvar), torch.rand(2)))
    assert_same(*results)


def test_transforms_around() -> None:
    """torch.func on a compiled function: Dynamo steps aside, the result has to be right."""

    def everything(module: Any) -> Callable[..., Tensor]:
        return lambda *at: sum((k + 1) * build(module)(*at) for k, build in enumerate(FUNCTIONS.values()))

    values = (numbers(3), numbers(3, seed=1), numbers(3, seed=2))
    truth = grad(everything(reference), (0, 1))(*(v.double() for v in values))
    compiled = torch.compile(everything(elbo_ext), backend="aot_eager")
    actual = grad(lambda *at: compiled(*at), (0, 1))(*values)
    torch.testing.assert_close(actual, truth, rtol=2e-5, atol=2e-5, check_dtype=False)


# ---- the rest ----


def test_double_backward_is_refused_clearly() -> None:
    """AOTAutograd differentiates compiled code once; asking for more is an error of torch, never a wrong number."""
    compiled = torch.compile(partial(gaussian_kl, reduction="sum"), backend="aot_eager", fullgraph=True)
    mu = numbers(4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(mu, 0.0), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_errors_are_those_of_eager_code() -> None:
    def function(x: Tensor) -> Tensor:
        return gaussian_log_prob(x, torch.ones(4))

    with pytest.raises(ValueError, match="shapes do not broadcast"):
        torch.compile(function, backend="eager")(numbers(4, 3))


def test_export() -> None:
    """A traced model draws as the eager one."""

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, mu: Tensor) -> Tensor:
            z, kl = rsample_kl(mu, 0.0)
            return elbo_loss(z, x, kl=kl).loss

    x, mu = numbers(4, 3), numbers(4, 3, seed=1)
    exported = torch.export.export(Model(), (x, mu)).module()
    for seed in (1, 2):
        torch.manual_seed(seed)
        actual = exported(x, mu)
        torch.manual_seed(seed)
        torch.testing.assert_close(actual, Model()(x, mu))


# ---- numbers that change from call to call ----

M = torch.linspace(-1.5, 2.0, 24).reshape(6, 4)
LINEAR, COSINE, LOGISTIC = bounds.LinearSchedule(1.0), bounds.CosineSchedule(1.0), bounds.LogisticSchedule(0.5, 3.0)
CYCLICAL = bounds.CyclicalSchedule(bounds.LinearSchedule(0.3), 0.45)
NUMPY = bounds.LinearSchedule(np.int64(5), np.float32(0.25), torch.tensor(2))
NUMBERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "free_bits-example": lambda m, n: (
        bounds.free_bits(gaussian_kl(m, 0.0, batch_dims=2), n, per="example").square().mean()
    ),
    "free_bits-batch": lambda m, n: bounds.free_bits(gaussian_kl(m, 0.0, batch_dims=2), n, per="batch"),
    "capacity": lambda m, n: bounds.capacity(gaussian_kl(m, 0.0), n, per="example").sum(),
    "balanced_kl": lambda m, n: bounds.balanced_kl(m, 0.0, posterior_weight=n, prior_weight=1.5 - n).sum(),
    "active_units": lambda m, n: diagnostics.active_units(m, threshold=n),
    "collapse_report": lambda m, n: diagnostics.collapse_report(m, 0 * m, epsilon=n, threshold=n).collapsed,
    "LinearSchedule": lambda m, n: m * LINEAR(n),
    "CosineSchedule": lambda m, n: m * COSINE(n),
    "LogisticSchedule": lambda m, n: m * LOGISTIC(n),
    "CyclicalSchedule": lambda m, n: m * CYCLICAL(n),
    "beta": lambda m, n: elbo_ext.elbo_loss(m, 0 * m, kl=m.sum(1), beta=n).loss,
    "kl": lambda m, n: elbo_ext.elbo_loss(m, 0 * m, kl=n).loss + n,
    "log_likelihood": lambda m, n: elbo_ext.elbo_loss(log_likelihood=m[:, 0], kl=n, beta=n).loss,
    "formula": lambda m, n: vmap(lambda row: gaussian_log_prob(row, n, 0.0, batch_dims=0))(m) * n,
    "formula-prior": lambda m, n: grad(lambda m: gaussian_kl(m, 0.0, n).sum())(m) * n,
    "NumPySchedule": lambda m, n: m * NUMPY(n),
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes(name: str, backend: str) -> None:
    """In one graph, the eager value for each number, and no compilation per number: twelve of them, torch's limit is 8."""
    if backend == "inductor" and name.endswith("Schedule") and torch.__version__.startswith("2.11."):
        pytest.skip("inductor of torch 2.11 compiles anew for each n, of tensor * (n / 2) as well")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(NUMBERS[name], backend=counter, fullgraph=True)
    for n in np.linspace(0.1, 1.2, 12).tolist():
        torch.testing.assert_close(compiled(M, n), NUMBERS[name](M, n), rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 3


# ---- export ----


def _image(batch: int) -> Tensor:
    return torch.linspace(-1, 1, batch * 48).reshape(batch, 3, 4, 4)


def _vector(batch: int) -> Tensor:
    return torch.linspace(-1, 1, batch * 5).reshape(batch, 5)


FIVE = torch.linspace(0.5, 1.0, 5)
# Operands of a lower rank than the data, whose first dimension is not the batch.
EXPORTED: dict[str, tuple[Callable[[Tensor], Any], Callable[[int], Tensor]]] = {
    "scale": (lambda x: elbo_ext.gaussian_log_prob(x, 0.0, log_std=torch.zeros(3, 1, 1)), _image),
    "weight": (lambda x: elbo_ext.bernoulli_log_prob(x, 0 * x, weight=torch.ones(3, 1, 1)), _image),
    "laplace": (lambda x: elbo_ext.laplace_log_prob(x, 0.0, scale=torch.ones(4)), _image),
    "bins": (lambda x: elbo_ext.discretized_gaussian_log_prob(x, 0.0, std=torch.ones(4), low=None, high=None), _image),
    "prior": (lambda mu: gaussian_kl(mu, 0.0, prior_mu=FIVE, prior_std=FIVE), _vector),
    "rsample": (lambda mu: elbo_ext.rsample(mu, FIVE, num_samples=3), _vector),
    "rsample_kl": (lambda mu: elbo_ext.rsample_kl(mu, FIVE, prior_mu=FIVE, num_samples=3), _vector),
    "log_prob": (lambda mu: elbo_ext.rsample_with_log_prob(mu, FIVE, num_samples=3), _vector),
    "elbo": (
        lambda x: tuple(
            elbo_ext.elbo_loss(x, 0 * x, x.flatten(1)[:, :5], FIVE, recon_std=torch.ones(3, 1, 1), reduction="none")
        ),
        _image,
    ),
    "elbo-samples": (
        lambda x: tuple(elbo_ext.elbo_loss(x.expand(2, *x.shape), x, kl=x.flatten(1).sum(1), batch_dims=2)),
        _image,
    ),
    "iwae": (lambda mu: bounds.iwae(lambda z: z.sum(-1), mu, FIVE, num_samples=4), _vector),
    "free_bits": (lambda mu: bounds.free_bits(gaussian_kl(mu, 0.0, batch_dims=2), FIVE, per="example"), _vector),
    "gap": (lambda w: diagnostics.elbo_gap(w), _vector),
    "evidence": (lambda w: diagnostics.log_evidence(w), _vector),
    "data-dependent": (
        lambda x: elbo_ext.gaussian_log_prob(x[x > 0], 0.0, batch_dims=0, log_std=torch.zeros(1)),
        _vector,
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_a_dynamic_batch(name: str, strict: bool) -> None:
    """Exported with a batch of 6, run with one of 3, which is also a number of channels."""
    function, data = EXPORTED[name]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    program = torch.export.export(Module(), (data(6),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    x = data(3)
    torch.manual_seed(0)
    actual = program.module()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(actual, function(x))


class _Loss(torch.nn.Module):
    def forward(self, x: Tensor) -> elbo_ext.ELBO:
        return elbo_ext.elbo_loss(x, 0 * x, kl=x.sum(1))


def test_an_exported_loss_is_saved() -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(_Loss(), (_vector(4),)), file)
    file.seek(0)
    result = torch.export.load(file).module()(_vector(4))
    assert isinstance(result, elbo_ext.ELBO)
    torch.testing.assert_close(tuple(result), tuple(_Loss()(_vector(4))))


def test_an_exported_report_is_saved() -> None:
    class Report(torch.nn.Module):
        def forward(self, m: Tensor) -> diagnostics.CollapseReport:
            return diagnostics.collapse_report(m, 0 * m)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Report(), (M,), strict=False), file)
    file.seek(0)
    loaded = torch.export.load(file).module()(2 * M)
    assert isinstance(loaded, diagnostics.CollapseReport)
    torch.testing.assert_close(loaded.kl, diagnostics.collapse_report(2 * M, 0 * M).kl)


def test_a_checkpoint_with_results_and_schedules() -> None:
    """torch.load's default since 2.6 refuses classes that nobody has declared safe."""
    report = diagnostics.collapse_report(M, 0 * M)
    saved = {
        "loss": _Loss()(_vector(4)),
        "schedules": [
            bounds.CyclicalSchedule(bounds.LinearSchedule(10), 5.0),
            bounds.CosineSchedule(3),
            bounds.LogisticSchedule(3.0, 1.0),
            bounds.LinearSchedule(np.int64(10), np.float32(0.5)),
        ],
        "active": report.active,
    }
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["schedules"] == saved["schedules"] and torch.equal(loaded["active"], saved["active"])
    assert isinstance(loaded["loss"], elbo_ext.ELBO) and loaded["loss"] == saved["loss"]


TWICE = {
    "kl": lambda t, s: gaussian_kl(t, s, 0.5 * t, s),
    "log_prob": lambda t, s: gaussian_log_prob(t, t, s),
    "rsample_kl": lambda t, s: rsample_kl(t, s, t, s, noise=torch.ones_like(t)),
    "weight": lambda t, s: gaussian_kl(t, std=s, weight=s),
    "elbo": lambda t, s: tuple(elbo_loss(t, t, kl=t.sum(1), recon_std=s)),
}


@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_as_two_arguments(name: str) -> None:
    """A scale that posterior and prior share: its gradient is the sum of both."""
    leaves = [torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_(), torch.full((4,), 0.7, requires_grad=True)]

    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        result = function(*leaves)
        total = sum(t.sum() for t in (result if isinstance(result, tuple) else (result,)))
        return torch.autograd.grad(total, leaves)

    compiled = torch.compile(TWICE[name], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(TWICE[name]))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, lambda value: torch.tensor(int(10 * value))])
def test_numbers_of_other_kinds(kind: Callable[[float], Any]) -> None:
    """A NumPy number may change from call to call without another compilation."""

    def loss(mu: Tensor, number: Any) -> Tensor:
        kl = bounds.free_bits(gaussian_kl(mu, std=number), number, per="example")
        return elbo_loss(mu, mu, kl=kl, beta=number).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    mu = numbers(4, 3)
    for value in (0.5, 0.7, 1.1, 1.3):
        torch.testing.assert_close(compiled(mu, kind(value)), loss(mu, kind(value)))
    assert counter.frame_count <= 2  # the first value may be a constant
