"""ELBOLoss: the reference's values and gradients, and a scale that is learned, saved, copied and moved with it."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn import Parameter

from elbo_ext import ELBO, ELBOLoss, elbo_loss, likelihoods, reference
from samples import CORE, FORMS, Sample, devices, differentiable, from_logvar

DOUBLE = torch.float64
SCALES = tuple(f"recon_{form}" for form in FORMS)
ELBO_SAMPLES = [sample for sample in CORE if sample.function == "elbo_loss"]


def assert_close(actual: Any, truth: Any) -> None:
    """Of results on any device."""
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12, check_device=False)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


RECON, X, MU, LOGVAR = numbers(4, 5, 6)
KL = numbers(5, seed=1).abs()


def gradients(elbo: ELBO, inputs: list[Tensor]) -> list[Tensor]:
    """Of all three fields at once."""
    total = sum(((k + 1.0) * field).sum() for k, field in enumerate(elbo))
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("sample", ELBO_SAMPLES, ids=lambda sample: sample.id)
def test_table(sample: Sample, device: str) -> None:
    """Everything that can be fixed in the module is fixed there, the rest is given to the call."""
    arguments = sample.make(DOUBLE, device)
    arguments = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    leaves = [arguments[name].requires_grad_() for name in differentiable(arguments)]
    truth = reference.elbo_loss(**arguments)
    fixed = {"likelihood", "batch_dims", "reduction", *SCALES}
    if not isinstance(arguments.get("beta"), Tensor):
        fixed.add("beta")
    options = {name: value for name, value in arguments.items() if name in fixed}
    loss = ELBOLoss(**options)(**{name: value for name, value in arguments.items() if name not in fixed})
    assert isinstance(loss, ELBO)
    assert_close(tuple(loss), tuple(truth))
    if loss.loss.numel():
        assert_close(gradients(loss, leaves), gradients(truth, leaves))


def test_defaults() -> None:
    """Gaussian, sigma = 1, beta = 1, the mean over examples of sums: by hand."""
    loss = ELBOLoss()(RECON, X, MU, LOGVAR)
    log_likelihood = -0.5 * ((X - RECON) ** 2 + math.log(2 * math.pi)).sum(1)
    kl = 0.5 * (MU**2 + LOGVAR.exp() - 1 - LOGVAR).sum(1)
    assert_close(tuple(loss), ((kl - log_likelihood).mean(), log_likelihood.mean(), kl.mean()))


def test_the_call_comes_before_the_module() -> None:
    module = ELBOLoss(beta=0.5, batch_dims=1, reduction="sum")
    weight = numbers(5, 6, seed=2).abs()
    actual = module(RECON, X, kl=KL.sum(), beta=2.0, batch_dims=0, reduction="none", weight=weight)
    truth = reference.elbo_loss(RECON, X, kl=KL.sum(), beta=2.0, batch_dims=0, reduction="none", weight=weight)
    assert_close(tuple(actual), tuple(truth))
    actual = module(RECON, X, MU, std=LOGVAR.exp(), prior_mu=0.5, prior_var=2.0)
    truth = reference.elbo_loss(RECON, X, MU, std=LOGVAR.exp(), prior_mu=0.5, prior_var=2.0, beta=0.5, reduction="sum")
    assert_close(tuple(actual), tuple(truth))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("wide", ["recon", "mu", "kl", "beta"])
def test_one_float64_operand(wide: str, needs_gradient: bool, reduction: str) -> None:
    """Makes all three fields float64, wherever it stands and whichever way the loss is computed."""
    arguments = dict(recon=RECON, x=X, beta=KL + 0.5, **(dict(kl=KL) if wide == "kl" else dict(mu=MU, logvar=LOGVAR)))
    arguments = {name: value if name == wide else value.float() for name, value in arguments.items()}
    if wide != "beta":
        arguments["beta"] = 0.5
    arguments["recon"] = arguments["recon"].clone().requires_grad_(needs_gradient)
    loss = ELBOLoss(reduction=reduction)(**arguments)
    truth = reference.elbo_loss(**arguments, reduction=reduction)
    assert [field.dtype for field in loss] == [DOUBLE] * 3
    # The other operands are float32 numbers, which the kernels of their part of the loss sum in float32.
    torch.testing.assert_close(tuple(loss), tuple(truth), rtol=1e-6, atol=1e-6)


def test_training_and_evaluation_are_the_same() -> None:
    module = ELBOLoss(recon_std=0.5)
    assert_close(tuple(module.eval()(RECON, X, kl=KL)), tuple(module.train()(RECON, X, kl=KL)))


# ---- a learned scale ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", [(), (1,), (6,), (5, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_learned_scale(form: str, shape: tuple[int, ...], device: str) -> None:
    """On the device that the module was moved to."""
    values = from_logvar(0.3 * numbers(*shape, seed=3), form)
    module = ELBOLoss(**{"recon_" + form: Parameter(values.clone())}, beta=0.5).to(device)
    assert [p.shape for p in module.parameters()] == [shape]
    (scale,) = module.parameters()
    leaf = values.clone().requires_grad_()
    truth = reference.elbo_loss(RECON, X, MU, LOGVAR, **{"recon_" + form: leaf}, beta=0.5)
    loss = module(*(t.to(device) for t in (RECON, X, MU, LOGVAR)))
    assert_close(tuple(loss), tuple(truth))
    loss.loss.backward()
    assert_close(scale.grad, torch.autograd.grad(truth.loss, leaf)[0])


@pytest.mark.parametrize("form", FORMS)
def test_the_learned_scale_ends_at_the_mean_squared_error(form: str) -> None:
    """The likelihood's maximum in closed form: sigma^2 = mean of (x - recon)^2."""
    module = ELBOLoss(**{"recon_" + form: Parameter(from_logvar(torch.tensor(0.2, dtype=DOUBLE), form))})
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(RECON, X, kl=KL).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    (scale,) = module.parameters()
    error = ((X - RECON) ** 2).mean()
    torch.testing.assert_close(scale.detach(), from_logvar(error.log(), form), rtol=1e-6, atol=1e-6)


def test_functional_call() -> None:
    module = ELBOLoss(recon_logvar=Parameter(torch.zeros((), dtype=DOUBLE)))
    name = next(iter(dict(module.named_parameters())))
    value = torch.tensor(0.4, dtype=DOUBLE)
    actual = grad(lambda v: functional_call(module, {name: v}, (RECON, X), {"kl": KL}).loss)(value)
    assert_close(actual, grad(lambda v: reference.elbo_loss(RECON, X, kl=KL, recon_logvar=v).loss)(value))


# ---- saved, copied, moved ----


def learned(value: float = 0.3) -> ELBOLoss:
    return ELBOLoss(recon_logvar=Parameter(torch.full((6,), value, dtype=DOUBLE)), beta=0.5, reduction="sum")


def through_pickle(module: ELBOLoss) -> ELBOLoss:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: ELBOLoss) -> ELBOLoss:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("used", [False, True])
def test_copies(duplicate: Any, used: bool) -> None:
    """Before and after the module has been used: a call leaves nothing in it that cannot be copied."""
    module = learned()
    if used:
        module(RECON, X, kl=KL).loss.backward()
    other = duplicate(module)
    assert_close(tuple(other(RECON, X, kl=KL)), tuple(module(RECON, X, kl=KL)))
    (scale,), (copied,) = module.parameters(), other.parameters()
    assert isinstance(copied, Parameter)
    assert (copied is scale) == (duplicate is copy.copy)
    if duplicate is copy.copy:
        return
    before = tuple(t.detach().clone() for t in module(RECON, X, kl=KL))
    with torch.no_grad():
        copied.add_(1)
    assert_close(tuple(module(RECON, X, kl=KL)), before)
    truth = reference.elbo_loss(RECON, X, kl=KL, recon_logvar=1.3, beta=0.5, reduction="sum")
    assert_close(tuple(other(RECON, X, kl=KL)), tuple(truth))


def test_state_dict() -> None:
    module, other = learned(0.3), learned(-1.0)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_close(tuple(other(RECON, X, kl=KL)), tuple(module(RECON, X, kl=KL)))
    with pytest.raises(RuntimeError, match="Missing key"):
        learned().load_state_dict(ELBOLoss(recon_logvar=0.3).state_dict())


def test_the_state_of_one_form_does_not_load_into_another() -> None:
    """A logvar taken for a std would give NaN."""
    state = ELBOLoss(recon_logvar=torch.nn.Parameter(torch.tensor(-1.0))).state_dict()
    with pytest.raises(RuntimeError, match='(?s)Missing key.*"recon_std".*Unexpected key.*"recon_logvar"'):
        ELBOLoss(recon_std=torch.nn.Parameter(torch.tensor(1.0))).load_state_dict(state)


def test_a_tensor_for_beta_and_the_parameters_of_a_likelihood() -> None:
    """Moved, saved and, as parameters, learned with the module."""
    scale = torch.nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))
    module = ELBOLoss(likelihoods.Laplace(scale=scale), beta=torch.tensor(2.0, dtype=DOUBLE))
    assert {name: t.item() for name, t in module.state_dict().items()} == {"recon_scale": 0.5, "beta": 2.0}
    truth = reference.elbo_loss(RECON, X, kl=KL, likelihood=likelihoods.Laplace(scale=scale), beta=2.0)
    actual = module(RECON, X, kl=KL)
    assert_close(tuple(actual), tuple(truth))
    expected = torch.autograd.grad(truth.loss, scale)
    assert_close(torch.autograd.grad(actual.loss, list(module.parameters())), expected)
    fresh = ELBOLoss(
        likelihoods.Laplace(scale=torch.nn.Parameter(torch.ones((), dtype=DOUBLE))), beta=torch.zeros((), dtype=DOUBLE)
    )
    fresh.load_state_dict(module.state_dict())
    assert_close(tuple(fresh(RECON, X, kl=KL)), tuple(truth))
    assert {t.device.type for t in module.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("options", [dict(low=None, high=None, width=0.5), dict(low=0.0, high=2.0, bins=9)], ids=str)
def test_the_bins_of_a_likelihood(options: dict[str, Any]) -> None:
    """Numbers among the parameters: no state, but of the call and of what is shown."""
    scale = torch.nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))
    likelihood = likelihoods.DiscretizedLogistic(scale=scale, **options)
    module = ELBOLoss(likelihood)
    assert list(module.state_dict()) == ["recon_scale"]
    truth = reference.elbo_loss(RECON, X, kl=KL, likelihood=likelihood)
    assert_close(tuple(module(RECON, X, kl=KL)), tuple(truth))
    assert all(f"{name}={value}" in repr(module) for name, value in options.items())


@pytest.mark.parametrize("device", devices())
def test_a_fixed_tensor_is_a_buffer(device: str) -> None:
    """Saved and moved with the module, but not learned."""
    values = 0.3 * numbers(6, seed=3)
    module = ELBOLoss(recon_logvar=values).to(device)
    assert list(module.parameters()) == []
    assert [(b.shape, b.device.type) for b in module.buffers()] == [((6,), device)]
    truth = reference.elbo_loss(RECON, X, kl=KL, recon_logvar=values)
    loss = module(RECON.to(device), X.to(device), kl=KL.to(device))
    assert_close(tuple(loss), tuple(truth))
    fresh = ELBOLoss(recon_logvar=torch.zeros(6, dtype=DOUBLE))
    fresh.load_state_dict(module.state_dict())
    assert_close(tuple(fresh(RECON, X, kl=KL)), tuple(truth))
    assert next(module.to("meta").buffers()).device.type == "meta"


def test_a_number_has_no_state() -> None:
    module = ELBOLoss(recon_std=0.5)
    assert module.state_dict() == {}
    assert_close(tuple(module(RECON, X, kl=KL)), tuple(reference.elbo_loss(RECON, X, kl=KL, recon_std=0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_module(dtype: torch.dtype) -> None:
    """module.to(dtype) converts the scale, as any parameter; data of other dtypes goes with it."""
    module = learned().to(dtype)
    loss = module(RECON.float(), X.float(), kl=KL.float())
    loss.loss.backward()
    (scale,) = module.parameters()
    leaf = scale.detach().double().requires_grad_()
    truth = reference.elbo_loss(
        RECON.float().double(), X.float().double(), kl=KL.float().double(), recon_logvar=leaf, beta=0.5, reduction="sum"
    )
    assert loss.loss.dtype == torch.float32
    torch.testing.assert_close(tuple(loss), tuple(truth), rtol=2e-6, atol=0, check_dtype=False)
    assert scale.grad.dtype == dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    expected = torch.autograd.grad(truth.loss, leaf)[0]
    torch.testing.assert_close(scale.grad.double(), expected, rtol=rounding + 2e-6, atol=1e-5)


def test_part_of_a_model() -> None:
    """Its parameter appears in the model, under the model's name for the loss, and is optimized with it."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.nn.Linear(6, 6).double()
            self.loss = learned()

    model = Model()
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 3
    assert names[2].startswith("loss.")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model.loss(model.decoder(RECON), X, kl=KL).loss
    before.backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert model.loss(model.decoder(RECON), X, kl=KL).loss < before


def test_repr() -> None:
    module = ELBOLoss("bernoulli", beta=0.5, batch_dims=2, reduction="sum")
    assert repr(module) == "ELBOLoss(likelihood='bernoulli', beta=0.5, batch_dims=2, reduction='sum')"
    assert repr(ELBOLoss(recon_std=0.5)) == (
        "ELBOLoss(likelihood='gaussian', recon_std=0.5, beta=1.0, batch_dims=1, reduction='mean')"
    )
    assert "recon_std=tensor of shape (1,), " in repr(ELBOLoss(recon_std=torch.ones(1)))


def test_the_module_is_the_function() -> None:
    """Bit for bit: the same kernels on the same operands."""
    arguments = dict(recon=RECON, x=X, mu=MU, logvar=LOGVAR)
    for reduction in ("none", "sum", "mean"):
        module = ELBOLoss(beta=0.3, reduction=reduction, recon_var=2.0)
        truth = elbo_loss(**arguments, beta=0.3, reduction=reduction, recon_var=2.0)
        for a, b in zip(module(**arguments), truth, strict=True):
            assert torch.equal(a, b)
