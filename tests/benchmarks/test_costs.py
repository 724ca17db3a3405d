"""What decides the speed, counted: operators, allocated bytes, passes over memory. Nothing here reads a clock.

The bytes are those that torch allocates. The kernels' own buffers for gradients that are summed (csrc/ops/gradients.cpp)
are not among them; together they are at most a sixteenth of the data's size.
"""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import elbo_ext

BATCH, PIXELS, LATENT = 64, 4096, 8  # arrays of 1 MiB; a number per example or per latent is small compared to them
ARRAY = BATCH * PIXELS * 4
SMALL = ARRAY // 50


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


class Step:
    """A training step around a decoder that is left out: its output and its gradient of z are given."""

    def __init__(self, variance: str, likelihood: str = "gaussian") -> None:
        self.x, self.grad_z = torch.rand(BATCH, PIXELS), torch.randn(BATCH, LATENT)
        self.mu, self.logvar, self.recon = leaf(BATCH, LATENT), leaf(BATCH, LATENT), leaf(BATCH, PIXELS)
        scale = {"fixed": None, "learned": leaf(), "channel": leaf(PIXELS), "element": leaf(BATCH, PIXELS)}[variance]
        self.options = {"likelihood": likelihood} | ({} if scale is None else {"recon_logvar": scale})
        self.leaves = [t for t in (self.mu, self.logvar, self.recon, scale) if t is not None]

    def forward(self) -> tuple[Tensor, Tensor]:
        z, kl = elbo_ext.rsample_kl(self.mu, self.logvar)
        return elbo_ext.elbo_loss(self.recon, self.x, kl=kl, **self.options).loss, z

    def __call__(self) -> None:
        loss, z = self.forward()
        torch.autograd.backward([loss, z], [None, self.grad_z])

    def gradient_bytes(self) -> int:
        return sum(t.numel() * 4 for t in self.leaves)


def profiled(function) -> profile:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        function()
    return result


def operators(record: profile) -> list[str]:
    """The operators that the function called itself, in order: not those that other operators call."""
    calls = [event for event in record.events() if event.name.startswith(("aten::", "elbo_ext::"))]
    return [event.name for event in calls if not (event.cpu_parent and event.cpu_parent in calls)]


def peak(record: profile) -> int:
    """The most bytes that were allocated and not yet freed at any time since the profile began."""
    allocated = largest = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            largest = max(largest, allocated)
    return largest


def test_peak_sees_an_allocation() -> None:
    """The instrument itself: two arrays at once, then one."""

    def function() -> None:
        first = torch.empty(ARRAY // 4)
        second = torch.empty(ARRAY // 4)
        del first, second
        torch.empty(ARRAY // 4)

    assert 2 * ARRAY <= peak(profiled(function)) < 2 * ARRAY + SMALL


STEPS = [
    ("fixed", "gaussian"),
    ("learned", "gaussian"),
    ("channel", "gaussian"),
    ("element", "gaussian"),
    ("fixed", "bernoulli"),
]


@pytest.mark.parametrize(("variance", "likelihood"), STEPS)
def test_operators_of_a_step(variance: str, likelihood: str) -> None:
    """One draw, one operator for each stage and direction, and the 1 that loss.backward() itself begins with."""
    step = Step(variance, likelihood)
    step()
    for t in step.leaves:
        t.grad = None
    names = operators(profiled(step))
    ours = [name for name in names if name.startswith("elbo_ext::")]
    assert ours == [
        "elbo_ext::latent",
        "elbo_ext::elbo_with_gradients",
        "elbo_ext::elbo_backward",
        "elbo_ext::latent_backward",
    ]
    assert set(names) - set(ours) <= {"aten::randint", "aten::ones_like", "aten::detach"}
    assert names.count("aten::randint") == 1


@pytest.mark.parametrize(("variance", "likelihood"), STEPS)
def test_operators_of_an_evaluation(variance: str, likelihood: str) -> None:
    step = Step(variance, likelihood)
    with torch.no_grad():
        assert operators(profiled(step.forward)) == [
            "aten::randint",
            "elbo_ext::latent",
            "elbo_ext::elbo_with_gradients",
        ]


@pytest.mark.parametrize(("variance", "likelihood"), STEPS)
def test_memory_of_a_step(variance: str, likelihood: str) -> None:
    """Nothing of the data's size but the gradients themselves, which one pass of the forward kernel wrote."""
    step = Step(variance, likelihood)
    step()
    for t in step.leaves:
        t.grad = None
    assert peak(profiled(step)) < step.gradient_bytes() + SMALL


@pytest.mark.parametrize(("variance", "likelihood"), STEPS)
def test_memory_without_gradients(variance: str, likelihood: str) -> None:
    step = Step(variance, likelihood)
    with torch.no_grad():
        assert peak(profiled(step.forward)) < SMALL


@pytest.mark.parametrize("function", [elbo_ext.gaussian_log_prob, elbo_ext.bernoulli_log_prob, elbo_ext.gaussian_kl])
def test_memory_of_values_per_example(function) -> None:
    """Unreduced, the backward pass makes the gradients, and nothing else of the data's size is held in between."""
    a, b = leaf(BATCH, PIXELS), leaf(BATCH, PIXELS)

    def step() -> None:
        function(a, b).backward(torch.ones(BATCH))

    step()
    a.grad = b.grad = None
    assert peak(profiled(step)) < 2 * ARRAY + SMALL


@pytest.mark.parametrize("num_samples", [None, 3])
def test_memory_of_a_sample(num_samples: int | None) -> None:
    """z and its gradients, no noise: that is made in registers, in the backward pass again. Where z has no axis of samples
    its gradient is that of mu, and is given on."""
    mu, logvar = leaf(BATCH, PIXELS), leaf(BATCH, PIXELS)
    samples = 1 if num_samples is None else num_samples
    grad = torch.ones(*([] if num_samples is None else [num_samples]), BATCH, PIXELS)

    def step() -> None:
        torch.autograd.grad(elbo_ext.rsample(mu, logvar, num_samples=num_samples), (mu, logvar), grad)

    step()
    gradients = 1 if num_samples is None else 2
    assert peak(profiled(step)) < (samples + gradients) * ARRAY + SMALL


def test_no_cast_copy() -> None:
    """float32 data with bfloat16 recon and a broadcast scale: no operand is converted or expanded in memory."""
    x, recon, scale = torch.randn(BATCH, PIXELS), leaf(BATCH, PIXELS).detach().bfloat16().requires_grad_(), leaf(PIXELS)
    step = lambda: elbo_ext.elbo_loss(recon, x, kl=torch.zeros(BATCH), recon_logvar=scale).loss.backward()
    step()
    recon.grad = scale.grad = None
    assert peak(profiled(step)) < ARRAY // 2 + PIXELS * 4 + SMALL


def test_backward_reads_no_input() -> None:
    """With a scalar loss the gradients are ready: the backward pass neither reads the inputs nor writes an array. Both
    are overwritten without torch's knowledge before it runs, and the gradients are what they were."""
    expected, step = [], Step("element")
    seed = torch.Generator().manual_seed(0)
    for spoil in (False, True):
        loss = elbo_ext.elbo_loss(step.recon, step.x, step.mu, step.logvar, **step.options).loss
        if spoil:
            for t in (step.recon, step.x, step.options["recon_logvar"]):
                t.detach().numpy()[...] = torch.randn(t.shape, generator=seed).numpy()
        for t in step.leaves:
            t.grad = None
        record = profiled(loss.backward)
        assert peak(record) < SMALL
        expected.append([step.recon.grad.clone(), step.options["recon_logvar"].grad.clone()])
    torch.testing.assert_close(expected[0], expected[1], rtol=0, atol=0)
