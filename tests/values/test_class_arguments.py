"""Bad input to the functions over classes: the type of the error and its whole message."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import categorical_kl, categorical_log_prob, categorical_rsample_kl, elbo_loss, likelihoods
from elbo_ext import multinomial_log_prob as multinomial
from samples import OVER_CLASSES

LOGITS, LABELS, ROWS = torch.zeros(2, 3), torch.tensor([0, 2]), torch.ones(2)
VALID: dict[Callable[..., Any], dict[str, Any]] = {
    categorical_log_prob: dict(x=LABELS, logits=LOGITS, weight=ROWS),
    multinomial: dict(x=LOGITS, logits=LOGITS, weight=ROWS),
    categorical_kl: dict(logits=LOGITS, prior_logits=LOGITS, weight=ROWS),
    categorical_rsample_kl: dict(logits=LOGITS, prior_logits=LOGITS),
}
OPERANDS = [(function, name) for function, valid in VALID.items() for name in valid]
FUNCTIONS = pytest.mark.parametrize("function", VALID, ids=lambda function: function.__name__)


def assert_error(error: type[Exception], message: str, function: Callable[..., Any], **arguments: Any) -> None:
    with pytest.raises(error) as raised:
        function(**{**VALID.get(function, {}), **arguments})
    assert type(raised.value) is error
    assert str(raised.value) == message


def test_every_function_is_here() -> None:
    assert {function.__name__ for function in VALID} == OVER_CLASSES.keys()
    for function, valid in VALID.items():
        function(**valid)
        annotated = {n for n, p in inspect.signature(function).parameters.items() if "Tensor" in str(p.annotation)}
        assert annotated - {"noise"} == valid.keys()


@pytest.mark.parametrize(("function", "name"), OPERANDS)
def test_what_is_no_tensor(function: Callable[..., Any], name: str) -> None:
    for value in ([0.5, 0.5], np.zeros(3), "0", True, 0.5, 1j):
        message = f"{name} must be a torch.Tensor, got {type(value).__name__}"
        assert_error(TypeError, message, function, **{name: value})


@pytest.mark.parametrize(("function", "name"), OPERANDS)
def test_dtype(function: Callable[..., Any], name: str) -> None:
    if name == "x" and function is categorical_log_prob:
        message = "x must have an integer dtype, got float32; they are numbers of classes"
        assert_error(TypeError, message, function, x=LABELS.float())
        return
    message = (
        f"{name} must have dtype float32, float64, bfloat16 or float16, got complex64; "
        f"convert it first, for example with {name}.float()"
    )
    assert_error(TypeError, message, function, **{name: VALID[function][name].to(torch.complex64)})


@FUNCTIONS
def test_dim(function: Callable[..., Any]) -> None:
    for dim in (2, -3, 9):
        message = f"dim must be an axis of logits, which has shape (2, 3), got {dim}"
        assert_error(ValueError, message, function, dim=dim)
    for value in (1.0, "1", None, True):
        assert_error(TypeError, f"dim must be an int, got {type(value).__name__}", function, dim=value)
    message = "logits must have at least one class along dim -1, got shape (2, 0)"
    assert_error(ValueError, message, function, logits=torch.zeros(2, 0))
    message = "dim must be an axis of logits, which has shape (), got -1"
    assert_error(ValueError, message, function, logits=torch.zeros(()))


def test_shapes() -> None:
    message = "shapes do not broadcast: x (3,), logits without classes (2,), weight (2,)"
    assert_error(ValueError, message, categorical_log_prob, x=torch.tensor([0, 1, 2]))
    message = "shapes do not broadcast: logits without classes (2,), prior_logits without classes (4,)"
    assert_error(ValueError, message, categorical_rsample_kl, prior_logits=torch.zeros(4, 3))
    message = "the numbers of classes differ: 5 of x and 3 of logits"
    assert_error(ValueError, message, multinomial, x=torch.zeros(2, 5))
    message = "the numbers of classes differ: 3 of logits and 5 of prior_logits"
    assert_error(ValueError, message, categorical_kl, prior_logits=torch.zeros(2, 5))


@FUNCTIONS
def test_numbers(function: Callable[..., Any]) -> None:
    for dims in (-1, 2):
        message = f"batch_dims must be between 0 and 1, the number of dimensions of (2,), got {dims}"
        assert_error(ValueError, message, function, batch_dims=dims)
    assert_error(ValueError, "reduction must be 'none', 'sum' or 'mean', got 'all'", function, reduction="all")
    if function in (categorical_kl, categorical_rsample_kl):
        assert_error(ValueError, "unimix must be at most 1, got 1.5", function, unimix=1.5)
        assert_error(ValueError, "unimix must be a finite number of at least 0, got -0.1", function, unimix=-0.1)
        assert_error(TypeError, "unimix must be a number, got str", function, unimix="1")
    if function is categorical_log_prob:
        assert_error(TypeError, "ignore_index must be an int, got float", function, ignore_index=1.0)


def test_samples() -> None:
    message = "num_samples must not be negative, got -1"
    assert_error(ValueError, message, categorical_rsample_kl, num_samples=-1)
    message = "generator must be a torch.Generator or None, got int"
    assert_error(TypeError, message, categorical_rsample_kl, generator=3)
    message = "noise and generator were both given; noise leaves nothing to draw"
    assert_error(ValueError, message, categorical_rsample_kl, noise=LOGITS, generator=torch.Generator())
    message = "noise must have the shape of the sample, (4, 2, 3) with the classes last, got (2, 3)"
    assert_error(ValueError, message, categorical_rsample_kl, noise=LOGITS, num_samples=4)


def test_devices() -> None:
    message = "all tensors must be on one device, got x on cpu and logits without classes on meta"
    assert_error(ValueError, message, categorical_log_prob, logits=LOGITS.to("meta"))


def test_in_the_loss() -> None:
    def loss(**arguments: Any) -> Tensor:
        return elbo_loss(**{"recon": LOGITS, "x": LABELS, "kl": 0.0, "likelihood": "categorical", **arguments}).loss

    loss()
    with pytest.raises(ValueError, match="recon_std has no meaning for likelihood='categorical'"):
        loss(recon_std=1.0)
    assert_error(TypeError, "recon must be a torch.Tensor, got NoneType", loss, recon=None)
    message = "x must have an integer dtype, got float32; they are numbers of classes"
    assert_error(TypeError, message, loss, x=LABELS.float())
    message = "bins is no parameter of the categorical likelihood, which takes dim, ignore_index"
    assert_error(TypeError, message, likelihoods.Categorical, bins=3)
    message = "batch_dims must be at least 1, the number of axes of samples that recon has beyond x, got 0"
    assert_error(ValueError, message, loss, recon=torch.zeros(5, 2, 3), batch_dims=0)
    assert elbo_ext.ELBOLoss("categorical")(LOGITS, LABELS, kl=0.0).loss.isfinite()
