"""torch.library.opcheck on every operator of the schema: what it returns and mutates is what it declares, its fake
kernel agrees with its real one, and it can be traced.

The arguments are those that the public functions really pass, for the core of the sample table: they are written down
while a forward and a backward pass run.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import elbo_ext
from elbo_ext.likelihoods import TERMS
from samples import CORE, Sample, devices, differentiable

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("elbo_ext::"))

# What an empty tensor or mixed dtypes could break differs from operator to operator, so the fake kernels see every core
# sample; tracing is slow and sees the ones that differ in structure.
QUICK = ("test_schema", "test_faketensor")
TRACED = {
    "gaussian-crossed",
    "gaussian-weight-mask",
    "gaussian-mean-number",
    "gaussian-batch_dims-3-none",
    "categorical-dim",
    "multinomial-x-with-gradient",
    "categorical_kl-unimix-6",
    "categorical_sample-num_samples-3",
    "kl-mixed",
    "rsample-noise-num_samples",
    "rsample-layout-channels_last",
    "rsample_kl-prior-larger",
    "log_prob-prior-larger",
    "log_prob-noise-sticking_the_landing",
    "elbo-gaussian-kl-mean",
    "elbo-samples-bernoulli-none",
}


class Recorder(TorchDispatchMode):
    """Writes down the calls of our operators, with copies of their tensors as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "elbo_ext":
            self.calls.append((operator, *torch.utils._pytree.tree_map(as_it_was, (args, kwargs or {}))))
        return operator(*args, **(kwargs or {}))


def as_it_was(value: Any) -> Any:
    """A copy with the same strides, so that layouts, also repeating ones, stay what they are."""
    if not isinstance(value, Tensor):
        return value
    dense = torch.empty(max(value.untyped_storage().nbytes(), 1), dtype=torch.uint8, device=value.device)
    dense[: value.untyped_storage().nbytes()] = dense.new_empty(0).set_(value.untyped_storage())
    copy = value.new_empty(0).set_(dense.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    assert torch.equal(copy, value) or value.isnan().any()
    return copy


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    with Recorder() as recorder:
        yield recorder.calls


def results(sample: Sample, arguments: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    result = getattr(elbo_ext, sample.function)(**arguments)
    return list(result) if isinstance(result, tuple) else [result]


def calls_of(sample: Sample, dtype: torch.dtype, device: str = "cpu") -> list[Call]:
    """The calls without gradients, and with: forward, a backward pass with an upstream factor, and a second one."""
    arguments = sample.make(dtype, device)
    with recorded() as calls:
        results(sample, arguments)
        leaves = [arguments[name].requires_grad_() for name in differentiable(arguments)]
        outputs = [t for t in results(sample, arguments) if t.requires_grad]
        for _ in range(2):
            # A factor other than 1, as GradScaler's, and uneven upstream gradients of unreduced results.
            upstream = [0.5 * torch.arange(1, t.numel() + 1).to(t).reshape(t.shape) for t in outputs]
            torch.autograd.grad(outputs, leaves, upstream, retain_graph=True, allow_unused=True)
    return calls


def of_operator(calls: list[Call]) -> dict[str, list[Call]]:
    by_name: dict[str, list[Call]] = {}
    for call in calls:
        by_name.setdefault(call[0]._schema.name, []).append(call)
    return by_name


def run_opcheck(call: Call, utils: tuple[str, ...] | None = None) -> None:
    operator, args, kwargs = call
    results = opcheck(operator, args, kwargs, **({} if utils is None else {"test_utils": utils}))
    assert set(results.values()) == {"SUCCESS"}, results


ON_DEVICES = pytest.mark.parametrize("device", devices())


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", CORE, ids=lambda sample: sample.id)
def test_sample(sample: Sample, dtype: torch.dtype, device: str) -> None:
    calls = calls_of(sample, dtype, device)
    assert calls
    for call in calls:
        run_opcheck(call, QUICK)


@ON_DEVICES
@pytest.mark.parametrize("sample", [s for s in CORE if s.id in TRACED], ids=lambda sample: sample.id)
def test_tracing(sample: Sample, device: str) -> None:
    for calls in of_operator(calls_of(sample, torch.float32, device)).values():
        run_opcheck(calls[0])


def test_the_table_has_the_traced_samples() -> None:
    assert TRACED <= {sample.id for sample in CORE}


def calls_of_lists(device: str = "cpu") -> list[Call]:
    """Of functions that are given lists of tensors, forward and backward."""
    mu = [torch.ones(shape, device=device, requires_grad=True) for shape in [(2, 3), (2,), (2, 0)]]
    rho = [(-t.detach()).requires_grad_() for t in mu]
    with recorded() as calls:
        z, kl = elbo_ext.rsample_kl(mu, rho=rho, prior_std=0.5)
        torch.autograd.grad([*z[:2], kl], [*mu, *rho[1:]], [*z[:2], kl])
        torch.autograd.grad(elbo_ext.rsample(mu, rho=rho, num_samples=2)[0].sum(), rho[0])
        torch.autograd.grad(elbo_ext.gaussian_kl(mu, rho=rho, reduction="mean"), mu)
    return calls


@ON_DEVICES
def test_latent_lists(device: str) -> None:
    names = set()
    for call in calls_of_lists(device):
        run_opcheck(call)
        names.add(call[0]._schema.name)
    assert names == {"elbo_ext::latent_list", "elbo_ext::latent_list_backward"}


@ON_DEVICES
def test_draw_seed(device: str) -> None:
    """The draw differs from call to call, as it should, so that no value can be compared."""
    like = torch.zeros(3, device=device)
    run_opcheck((torch.ops.elbo_ext.draw_seed.default, (like,), {}), QUICK)
    assert torch.Tag.nondeterministic_seeded in torch.ops.elbo_ext.draw_seed.default.tags


@pytest.mark.parametrize("number", [-1, 9])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("term", "there is no term (over a dimension )?{}"),
        ("forms", r"(\w+ has|terms over a dimension have) no forms {}"),
        ("batch_dims", r"batch_dims is {} for \d dimensions"),
        ("reduction", "there is no reduction {}"),
        ("results", r"latent\w* has no results {}"),
    ],
)
def test_numbers_that_mean_nothing(name: str, sentence: str, number: int) -> None:
    """Each operator that takes a number of the schema refuses one that stands for nothing."""

    def place(operator: str) -> int | None:
        arguments = getattr(torch.ops.elbo_ext, operator.removeprefix("elbo_ext::")).default._schema.arguments
        return next((place for place, argument in enumerate(arguments) if argument.name == name), None)

    left = {operator for operator in OPERATORS if place(operator) is not None}
    assert left
    for calls in (calls_of_lists(), *(calls_of(sample, torch.float32) for sample in CORE)):
        for operator, args, kwargs in calls:
            at = place(operator._schema.name)
            if at is None:
                continue
            with pytest.raises(RuntimeError, match=f"elbo_ext: {sentence.format(number)}$"):
                operator(*args[:at], number, *args[at + 1 :], **kwargs)
            left.discard(operator._schema.name)
        if not left:
            break
    assert not left


def test_a_tensor_in_the_place_of_a_number() -> None:
    """Kernels read what is a number alone from the constants, and make no gradient of it."""
    number, x = TERMS["discretized_logistic"].number, torch.zeros(2, 3)
    for at in (3, 4, 5):
        operands = [x if k in (0, 1, at) else None for k in range(7)]
        with pytest.raises(RuntimeError, match=f"discretized_logistic takes no tensor for its input {at}, which is a"):
            torch.ops.elbo_ext.term_sum(number, operands, [0.5] * 7, 0, 1, 0)


@ON_DEVICES
@pytest.mark.parametrize("double_precision", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("seeds", [0, 1, 3])
def test_noise(seeds: int, count: int, double_precision: bool, device: str) -> None:
    seed = torch.arange(seeds, device=device) - 1
    for operator in (torch.ops.elbo_ext.normal_noise, torch.ops.elbo_ext.gumbel_noise):
        run_opcheck((operator.default, (seed, count, double_precision), {}))


@ON_DEVICES
def test_scale_gradients(device: str) -> None:
    """It mutates, which opcheck's tracing test has to see in the schema."""
    numbers, factor = torch.arange(6.0, device=device).reshape(2, 3), torch.tensor(0.5, device=device)
    gradients = [numbers.to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    run_opcheck((torch.ops.elbo_ext.scale_gradients_.default, (gradients, factor), {}))
    run_opcheck((torch.ops.elbo_ext.scale_gradients_.default, ([], factor), {}))


@ON_DEVICES
@pytest.mark.parametrize("kl_shape", [(), (3,), (2, 3), (0,)])
def test_elbo_backward(kl_shape: tuple[int, ...], device: str) -> None:
    """The numbers too: gradients of -log-likelihood become those of 3 loss + 0.5 log-likelihood + 7 kl, beta = 2."""
    gradients = [torch.arange(6.0, device=device).reshape(2, 3), torch.arange(4, dtype=torch.float64, device=device)]
    expected = [2.5 * gradient for gradient in gradients]
    of_kl = torch.tensor(0.25, device=device).expand(kl_shape)
    grads = torch.tensor([3.0, 0.5, 7.0], device=device).unbind()
    elbo_backward = torch.ops.elbo_ext.elbo_backward.default
    copies = [gradient.clone() for gradient in gradients]
    result = elbo_backward(copies, of_kl, *grads, 2.0)
    torch.testing.assert_close(copies, expected)
    torch.testing.assert_close(result, torch.full(kl_shape, 0.25 * (2.0 * 3.0 + 7.0), device=device))
    run_opcheck((elbo_backward, (gradients, of_kl, *grads, 2.0), {}))
    run_opcheck((elbo_backward, (gradients, of_kl, None, grads[1], None, 1.0), {}))


@ON_DEVICES
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 0), (4, 2, 3)], ids=str)
def test_importance_bound(shape: tuple[int, ...], with_weights: bool, device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        log_weights = torch.randn(shape, dtype=dtype, device=device)
        run_opcheck((torch.ops.elbo_ext.importance_bound.default, (log_weights, with_weights), {}))


# Checked by a test of its own above.
APART = {
    f"elbo_ext::{name}"
    for name in (
        "draw_seed",
        "importance_bound",
        "latent_list",
        "latent_list_backward",
        "gumbel_noise",
        "normal_noise",
        "scale_gradients_",
    )
}


def test_every_operator_is_checked() -> None:
    """A new operator that no sample calls fails here: give it a sample, or a test of its own."""
    seen = set(APART)
    for sample in CORE:
        seen |= set(of_operator(calls_of(sample, torch.float32)))
        if seen >= set(OPERATORS):
            break
    assert sorted(seen) == OPERATORS
