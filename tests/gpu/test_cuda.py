"""What only a GPU can show: streams, graphs, synchronization, launches, memory, several GPUs, very large tensors.

Values, gradients, noise, numerics and reproducibility are tested on a GPU where they are tested on the CPU.
"""

import ast
import contextlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import reference
from samples import CORE, NEEDS_GPU, NOISE_ERROR, SAMPLES, Maker, Sample, differentiable, in_float64, run
from test_reproducible import BIG, everything, same_bits

pytestmark = NEEDS_GPU

GIB = 2**30


@contextlib.contextmanager
def needs_memory(gib: float) -> Iterator[None]:
    """Skips a test where the GPU has less to spare, before it or during it: other processes, among them pytest's other
    workers, may take what was free a moment ago, which says nothing about the kernels. What those allocate is tested apart.
    """
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free memory on the GPU, which has {free:.0f}")
    try:
        yield
    except RuntimeError as error:  # ours is no torch.OutOfMemoryError
        if "out of memory" not in str(error):
            raise
        pytest.skip(f"needs {gib} GiB of memory on the GPU, and others took some of it: {error}")
    finally:
        torch.cuda.empty_cache()


# ---- a training step ----


class Step:
    """Sample, KL and Gaussian likelihood of one size, with everything learned but the data."""

    def __init__(self, data: tuple[int, ...] = (128, 784), latent: tuple[int, ...] = (128, 20), dtype=torch.float32):
        m = Maker(dtype, "cuda", 0)
        self.x = m.normal(*data)
        self.leaves = [m.normal(*data), m.scale("logvar", *data), m.normal(*latent), m.scale("logvar", *latent)]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.of_z = m.normal(*latent)

    def __call__(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        recon, recon_logvar, mu, logvar = self.leaves
        z, kl = elbo_ext.rsample_kl(mu, logvar)
        loss = elbo_ext.elbo_loss(recon, self.x, kl=kl, recon_logvar=recon_logvar).loss
        return loss, z, torch.autograd.grad([loss, z], self.leaves, [torch.ones_like(loss), self.of_z])


def kernels_of(function: Callable[[], object]) -> list[str]:
    """The names of the kernels that a call launches."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_gpu if not name.startswith(("Memset", "Memcpy"))]


def test_launches_of_a_step() -> None:
    """A seed, the latent stage, the likelihood, and their two backward passes; torch.ones_like is the test's own."""
    step = Step()
    kernels = [name for name in kernels_of(step) if "FillFunctor" not in name]
    assert 4 <= len(kernels) <= 6, kernels


def test_no_synchronization() -> None:
    """Neither the operators nor what is around them wait for the GPU."""
    step = Step()
    step()
    weight = torch.rand(128, 1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        recon, recon_logvar, mu, logvar = step.leaves
        per_example = elbo_ext.gaussian_log_prob(step.x, recon, recon_logvar.mean(0), weight=weight)
        kl = elbo_ext.gaussian_kl(mu, log_std=logvar, prior_mu=mu.mean(0), prior_std=2.0)
        z = elbo_ext.rsample(mu, std=logvar.exp(), num_samples=3)
        _, log_q, log_p = elbo_ext.rsample_with_log_prob(mu, logvar, num_samples=3, gradient="sticking_the_landing")
        bound = elbo_ext.bounds.iwae_bound(log_p - log_q)
        torch.autograd.grad([per_example.sum(), kl.mean(), z.sum(), bound.sum()], step.leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_step() -> None:
    """Beyond the results and the gradients, next to nothing is allocated."""
    step = Step((512, 65536), (512, 64))
    results = step()
    del results
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, z, gradients = step()
    kept = sum(t.untyped_storage().nbytes() for t in (z, *gradients))
    assert torch.cuda.max_memory_allocated() - before <= kept + 0.01 * step.x.nbytes + 2**20
    assert math.isfinite(loss.item())


# ---- the same bits ----


@pytest.mark.parametrize("sample", BIG, ids=lambda sample: sample.id)
def test_same_bits_on_other_streams(sample: Sample) -> None:
    expected = everything(sample, torch.float32, "cuda")
    for _ in range(2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = everything(sample, torch.float32, "cuda")
        for a, b in zip(actual, expected, strict=True):
            assert same_bits(a, b)


def test_same_bits_with_streams_side_by_side() -> None:
    """Sums that several kernels make at the same time: no counter and no buffer is shared by two of them."""
    m = Maker(torch.float32, "cuda", 0)
    inputs = [(m.normal(64, 50_000), m.normal(64, 50_000), m.scale("logvar").requires_grad_()) for _ in range(4)]

    def work(x: Tensor, mean: Tensor, logvar: Tensor) -> list[Tensor]:
        value = elbo_ext.gaussian_log_prob(x, mean, logvar, reduction="sum")
        return [value.detach(), *torch.autograd.grad(value, [logvar])]

    expected = [work(*operands) for operands in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[list[list[Tensor]]] = [[] for _ in inputs]
    for _ in range(20):
        for stream, operands, result in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(work(*operands))
    torch.cuda.synchronize()
    for result, truth in zip(results, expected, strict=True):
        for actual in result:
            assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(actual, truth, strict=True))


# ---- noise ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_the_cpus(dtype: torch.dtype) -> None:
    seeds = torch.tensor([0, -1, 2**62, 12345])
    for first in (0, 3, 2**34 - 700):
        on_cpu, on_gpu = (
            torch.ops.elbo_ext.normal_noise(seeds.to(device), 5001, dtype == torch.float64, first).cpu().double()
            for device in ("cpu", "cuda")
        )
        assert (on_cpu - on_gpu).abs().max() <= 2 * NOISE_ERROR[dtype]


# ---- CUDA graphs ----


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, warmed up as torch asks for, and what the call returned: memory that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def importance_weighted(
    module: Any, mu: Tensor, logvar: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """z of 8 samples, the bound on the prior's evidence, and its gradients."""
    z, log_q, log_p = module.rsample_with_log_prob(mu, logvar, num_samples=8, noise=noise)
    bound = elbo_ext.bounds.iwae_bound(log_p - log_q)
    return z, bound, torch.autograd.grad(bound.sum(), (mu, logvar))


def test_graph_of_an_importance_weighted_bound() -> None:
    m = Maker(torch.float32, "cuda", 0)
    leaves = m.normal(64, 16).requires_grad_(), m.scale("logvar", 64, 16).requires_grad_()
    graph, (z, bound, gradients) = captured(lambda: importance_weighted(elbo_ext, *leaves, None))
    mu, logvar = (leaf.detach().double().requires_grad_() for leaf in leaves)
    samples = []
    for _ in range(3):
        graph.replay()
        samples.append(z.clone())
        noise = ((z.detach().double() - mu) / torch.exp(logvar / 2)).detach()
        _, exact, exact_gradients = importance_weighted(reference, mu, logvar, noise)
        torch.testing.assert_close(bound.double(), exact, rtol=1e-4, atol=1e-4)
        for gradient, truth in zip(gradients, exact_gradients, strict=True):
            torch.testing.assert_close(gradient.double(), truth, rtol=1e-3, atol=1e-3)
    assert not torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])


def test_graph_of_a_step() -> None:
    """A captured step computes what an eager one does, and draws fresh noise on every replay."""
    step = Step()
    graph, (loss, z, gradients) = captured(step)

    recon, recon_logvar, mu, logvar = (leaf.detach().double() for leaf in step.leaves)
    kl = reference.gaussian_kl(mu, logvar)
    exact = reference.elbo_loss(recon, step.x.double(), kl=kl, recon_logvar=recon_logvar).loss
    samples = []
    for _ in range(5):
        for leaf in gradients:
            leaf.fill_(math.nan)
        graph.replay()
        samples.append(z.clone())
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        # dz/dlogvar = eps sigma / 2, and the KL's, which does not depend on the noise.
        eps = (z.detach().double() - mu) / torch.exp(logvar / 2)
        of_kl = torch.expm1(logvar) / 2 / len(mu)
        of_logvar = of_kl + step.of_z.double() * eps * torch.exp(logvar / 2) / 2
        torch.testing.assert_close(gradients[3].double(), of_logvar, rtol=1e-4, atol=1e-5)
        assert abs(eps.mean()) < 4.5 / math.sqrt(eps.numel()) and 0.8 < eps.var() < 1.2
    for i in range(1, 5):
        assert not torch.equal(samples[i], samples[i - 1])

    # New data in the same place is what a replay sees.
    with torch.no_grad():
        step.leaves[0].copy_(step.x)
    graph.replay()
    exact = reference.elbo_loss(step.x.double(), step.x.double(), kl=kl, recon_logvar=recon_logvar).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


MANY = [sample for sample in SAMPLES if "num_samples-many" in sample.id]  # whose backward pass has a kernel of its own


@pytest.mark.parametrize("sample", [*BIG, *MANY], ids=lambda sample: sample.id)
def test_replays_are_eager_calls(sample: Sample) -> None:
    """The same bits, forward and backward, from one seed on, of every kind of sum; and other noise in the next replay."""
    arguments = sample.make(torch.float32, "cuda")
    leaves = [arguments[name].requires_grad_() for name in differentiable(arguments)]

    def call() -> list[Tensor]:
        result = getattr(elbo_ext, sample.function)(**arguments)
        results = [t for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad]
        upstream = [torch.linspace(0.5, 1.5, t.numel(), device="cuda").reshape(t.shape) for t in results]
        return [*(t.detach() for t in results), *torch.autograd.grad(results, leaves, upstream)]

    graph, results = captured(call)
    torch.manual_seed(7)
    replays = []
    for _ in range(2):
        for t in results:
            t.fill_(math.nan)
        graph.replay()
        replays.append([t.clone() for t in results])
    torch.manual_seed(7)
    for replay in replays:
        assert all(same_bits(a, b) for a, b in zip(replay, call(), strict=True))
    assert sample.function.startswith("rsample") != torch.equal(replays[0][0], replays[1][0])


def test_replays_beside_eager_work() -> None:
    """A graph keeps its own counters and buffers: other work of the same kind may run at the same time."""
    m = Maker(torch.float32, "cuda", 0)
    x, mean = m.normal(64, 50_000), m.normal(64, 50_000)
    elbo_ext.gaussian_log_prob(x, mean, reduction="sum")
    expected = elbo_ext.gaussian_log_prob(x, mean, 0.3, reduction="sum")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = elbo_ext.gaussian_log_prob(x, mean, 0.3, reduction="sum")
    side = torch.cuda.Stream()
    for _ in range(30):
        with torch.cuda.stream(side):
            graph.replay()
            copy = value.clone()
        eager = [elbo_ext.gaussian_log_prob(x, mean, 0.3, reduction="sum") for _ in range(3)]
        torch.cuda.synchronize()
        assert all(torch.equal(v, expected) for v in (copy, *eager))


# The first call of all of an operator, whose kernels CUDA has not loaded yet, in a capture. Where a graph is made torch's own
# kernels of the call have been warmed up.
FIRST_LAUNCH = """
import torch, elbo_ext
x, mean = torch.arange(6.0, device="cuda").reshape(2, 3), torch.ones(2, 3, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    value = elbo_ext.gaussian_log_prob(x, mean)
value.zero_()
graph.replay()
print("values:", value.tolist(), elbo_ext.reference.gaussian_log_prob(x, mean).tolist())
"""


def test_the_first_launch_in_a_capture() -> None:
    """In a process of its own, in which nothing has been launched."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LAUNCH], capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_MODULE_LOADING": "LAZY"},
    )  # fmt: skip
    printed = re.search(r"values: (\[.*?\]) (\[.*?\])", done.stdout)
    assert printed, done.stdout + done.stderr
    actual, exact = (torch.tensor(ast.literal_eval(numbers)) for numbers in printed.groups())
    torch.testing.assert_close(actual, exact, rtol=1e-6, atol=0)


# To wait for a stream spoils its capture, and until that ends every launch on the stream fails. The operator allocates
# nothing, and its kernel has been loaded before.
FAILING_LAUNCH = """
import torch, elbo_ext
numbers, factor = torch.ones(6, device="cuda"), torch.full((), 2.0, device="cuda")
launch = lambda: torch.ops.elbo_ext.scale_gradients_([numbers], factor)
launch()
torch.cuda.synchronize()
stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
with torch.cuda.stream(stream):
    graph.capture_begin()
    for call in (stream.synchronize, launch, graph.capture_end):
        try:
            call()
        except RuntimeError as error:
            print(call.__name__, "raised:", error)
launch()
print("numbers:", numbers.tolist(), flush=True)
"""


def test_a_failed_launch() -> None:
    """It names the operator, the shape and CUDA's reason, does nothing, and does not stand in the way of the next.

    In a process of its own, because torch need not get over a capture that failed.
    """
    done = subprocess.run([sys.executable, "-c", FAILING_LAUNCH], capture_output=True, text=True, check=False)
    sentence = r"<lambda> raised: .*elbo_ext::scale_gradients_ of shape \[1\] failed on CUDA device 0: .*captur"
    assert re.search(sentence, done.stdout), done.stdout + done.stderr
    assert f"numbers: {[4.0] * 6}" in done.stdout, done.stdout + done.stderr


# ---- compiled, and under autocast ----


@pytest.mark.parametrize("sample", [s for s in CORE if s.function in ("elbo_loss", "rsample_kl", "rsample_with_log_prob")],
                         ids=lambda s: s.id)  # fmt: skip
def test_compiled_functions(sample: Sample) -> None:
    """torch.compile(fullgraph=True) gives the values of eager code."""
    arguments = sample.make(torch.float32, "cuda")
    function = getattr(elbo_ext, sample.function)
    torch.manual_seed(3)
    eager = function(**arguments)
    torch._dynamo.reset()
    torch.manual_seed(3)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)(**arguments)
    torch.testing.assert_close(tuple(compiled), tuple(eager), equal_nan=True)


def test_compiled_step() -> None:
    step = Step()

    def loss_of(x: Tensor, recon: Tensor, recon_logvar: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z, kl = elbo_ext.rsample_kl(mu, logvar)
        return elbo_ext.elbo_loss(recon, x, kl=kl, recon_logvar=recon_logvar).loss, z

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        torch.manual_seed(5)
        loss, z = function(step.x, *step.leaves)
        results.append((loss, z, *torch.autograd.grad([loss, z.sum()], step.leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """A decoder's half-precision output with float32 data, and a loss in float32."""
    m = Maker(torch.float32, "cuda", 0)
    x, h, weight = m.normal(64, 96), m.normal(64, 32), m.normal(96, 32).requires_grad_()
    mu, logvar = m.normal(64, 8).requires_grad_(), m.scale("logvar", 64, 8).requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        recon = torch.nn.functional.linear(h, weight)
        assert recon.dtype == dtype
        recon.retain_grad()
        loss = elbo_ext.elbo_loss(recon, x, mu, logvar).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert recon.grad.dtype == dtype and weight.grad.dtype == mu.grad.dtype == torch.float32
    exact = reference.elbo_loss(recon.detach().double(), x.double(), mu.detach().double(), logvar.detach().double())
    torch.testing.assert_close(loss.detach().double(), exact.loss, rtol=1e-6, atol=0)


# ---- several GPUs ----


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA GPU")
@pytest.mark.parametrize("sample", [s for s in CORE if "empty" not in s.id][::7], ids=lambda sample: sample.id)
def test_another_gpu_than_the_current_one(sample: Sample) -> None:
    first = run(sample, sample.make(torch.float32, "cuda:0"))
    second = run(sample, sample.make(torch.float32, "cuda:1"))
    assert torch.cuda.current_device() == 0
    for name, value in second.items():
        assert value.device == torch.device("cuda", 1)
        torch.testing.assert_close(value.cpu(), first[name].cpu(), equal_nan=True)


# ---- more than 2^31 elements ----

ROWS, COLS = 2**15 + 2**8, 2**16  # 2^31 + 2^24 elements
PLACES = [(0, 0), (12_345, 678), (2**15 - 1, COLS - 1), (2**15, 0), (2**15 + 7, 4321), (ROWS - 1, COLS - 1)]


@needs_memory(16)
def test_sums_beyond_32_bits() -> None:
    """Few elements that count, at both ends: the sum over everything, over rows, and along strides of 2^16."""
    x = torch.zeros(ROWS, COLS, dtype=torch.bfloat16, device="cuda")
    for k, (i, j) in enumerate(PLACES):
        x[i, j] = 2.0 + k
    squares = {place: (2.0 + k) ** 2 for k, place in enumerate(PLACES)}
    constant = 0.5 * math.log(2 * math.pi)
    total = elbo_ext.gaussian_log_prob(x, 0.0, reduction="sum").item()
    assert total == pytest.approx(-0.5 * sum(squares.values()) - constant * x.numel(), rel=1e-6)
    per_row = elbo_ext.gaussian_log_prob(x, 0.0).double() + constant * COLS
    for i in {i for i, _ in PLACES}:
        exact = -0.5 * sum(square for (row, _), square in squares.items() if row == i)
        assert per_row[i].item() == pytest.approx(exact, abs=0.02)
    column = elbo_ext.gaussian_log_prob(x.t()[-1:], 0.0).item() + constant * ROWS
    exact = -0.5 * sum(square for (_, col), square in squares.items() if col == COLS - 1)
    assert column == pytest.approx(exact, abs=0.02)


@needs_memory(24)
def test_gradients_beyond_32_bits() -> None:
    x = torch.zeros(ROWS, COLS, dtype=torch.bfloat16, device="cuda")
    for k, (i, j) in enumerate(PLACES):
        x[i, j] = 2.0 + k
    mean = torch.zeros(COLS, device="cuda", requires_grad=True)
    x.requires_grad_()
    value = elbo_ext.gaussian_log_prob(x, mean, reduction="sum")
    dx, dmean = torch.autograd.grad(value, [x, mean])
    for k, (i, j) in enumerate(PLACES):
        assert dx[i, j].item() == -(2.0 + k)
    assert int((dx != 0).sum()) == len(PLACES)
    for j in {j for _, j in PLACES}:
        assert dmean[j].item() == pytest.approx(sum(2.0 + k for k, (_, col) in enumerate(PLACES) if col == j))
    assert int((dmean != 0).sum()) == len({j for _, j in PLACES})


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 5, 2**64 - 1, -1])
def test_the_seed_is_the_one_that_torch_draws(seed: int) -> None:
    """It is read off the generator's state, which is left as torch.randint leaves it; so compiled and captured code, which
    call torch.randint, draw the same."""
    ours, theirs = (torch.Generator("cuda").manual_seed(seed) for _ in range(2))
    for _ in range(3):
        drawn = elbo_ext.functional.latent_call.draw_seeds(torch.device("cuda", 0), ours)
        assert drawn.device.type == "cpu" and drawn.dtype == torch.int64
        assert int(drawn) == int(elbo_ext.ops.draw_seed(torch.device("cuda", 0), theirs))
        assert ours.get_offset() == theirs.get_offset()
        assert torch.equal(torch.rand(5, device="cuda", generator=ours), torch.rand(5, device="cuda", generator=theirs))


def test_a_seed_on_the_cpu_and_one_on_the_device() -> None:
    mu, grad = torch.zeros(3, 40, device="cuda"), torch.ones(3, 40, device="cuda")
    drawn = torch.tensor([-(2**63) + 12345])
    results = []
    for seed in (drawn, drawn.cuda()):
        with mock.patch.object(elbo_ext.functional.latent_call, "draw_seeds", lambda *_, seed=seed: seed):
            for samples in (None, 3):
                std = torch.ones(3, 40, device="cuda", requires_grad=True)
                z, log_q, _ = elbo_ext.rsample_with_log_prob(mu, std=std, num_samples=samples)
                first = torch.autograd.grad(z.sum() + (z * log_q.unsqueeze(-1)).sum(), std, create_graph=True)[0]
                results.append((z, log_q, first, torch.autograd.grad(first, std, grad)[0]))
    for on_cpu, on_device in zip(results[:2], results[2:], strict=True):
        for a, b in zip(on_cpu, on_device, strict=True):
            assert torch.equal(a, b)


@needs_memory(16)
def test_samples_beyond_32_bits() -> None:
    size = 2**31 + 5000
    mu = torch.full((size,), 0.5, dtype=torch.bfloat16, device="cuda")
    torch.manual_seed(4)
    seed = int(elbo_ext.ops.draw_seed(torch.device("cuda")))
    torch.manual_seed(4)
    z = elbo_ext.rsample(mu, std=2.0)
    for first in (0, 2**31 - 3000, size - 1001):
        exact = 0.5 + 2.0 * torch.from_numpy(reference.normal_noise(seed, 1001, offset=first))
        error = (z[first : first + 1001].cpu().double() - exact).abs()
        assert bool((error <= 3e-6 + exact.abs() * 2**-8).all()), first


SHARED, TIMES = 2**10, 2**5 + 1  # TIMES samples of SHARED rows of COLS elements: 2^31 + 2^26


def row_of(t: Tensor, rows: int, i: int) -> Tensor:
    """Of a tensor with an axis of so many rows, row i alone."""
    return t.detach().narrow(t.shape.index(rows), i, 1)


def rising(t: Tensor) -> Tensor:
    """An upstream gradient that differs along the last axis, and takes no memory for the others."""
    return torch.linspace(0.5, 1.5, t.shape[-1]).to(t).expand(t.shape)


def assert_rows_close(actual: Tensor, truth: Tensor) -> None:
    """Half precision: an ulp, and as much again where a gradient made in the forward pass is rounded twice."""
    rtol = 2**-7 if actual.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual.double(), truth.detach(), rtol=rtol, atol=1e-3)


@pytest.mark.parametrize(("rows", "num_samples"), [(ROWS, None), (SHARED, TIMES)])
@pytest.mark.parametrize("function", ["rsample", "rsample_kl", "rsample_with_log_prob"])
@needs_memory(32)
def test_latent_beyond_32_bits(function: str, rows: int, num_samples: int | None) -> None:
    """Single rows of the results and gradients, where mu is that large and where the samples of a smaller one are."""
    mu, logvar = (
        torch.empty(rows, COLS, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_() for _ in range(2)
    )
    torch.manual_seed(4)
    seed = int(elbo_ext.ops.draw_seed(torch.device("cuda")))
    torch.manual_seed(4)
    results = getattr(elbo_ext, function)(mu, logvar, num_samples=num_samples)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [rising(t) for t in results]
    gradients = torch.autograd.grad(results, (mu, logvar), upstream)
    for i in (0, rows - 2**8 - 1, rows - 2**8, rows - 1):
        noise = [reference.normal_noise(seed, COLS, offset=(k * rows + i) * COLS) for k in range(num_samples or 1)]
        noise = torch.from_numpy(np.stack(noise)).cuda().reshape(*(() if num_samples is None else (-1,)), 1, COLS)
        part = [row_of(t, rows, i).double().requires_grad_() for t in (mu, logvar)]
        exact = getattr(reference, function)(*part, num_samples=num_samples, noise=noise)
        exact = exact if isinstance(exact, tuple) else (exact,)
        exact_gradients = torch.autograd.grad(exact, part, [row_of(t, rows, i).double() for t in upstream])
        for t, truth in zip((*results, *gradients), (*exact, *exact_gradients), strict=True):
            assert_rows_close(row_of(t, rows, i), truth)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@needs_memory(20)
def test_repeated_operands_beyond_32_bits(reduction: str) -> None:
    """Data and a scale for each example, for several reconstructions of it; single examples of the gradients."""
    x, recon = (torch.empty(*k, SHARED, COLS, dtype=torch.bfloat16, device="cuda").normal_() for k in ((), (TIMES,)))
    leaves = [x, recon, torch.linspace(-1, 1, SHARED, device="cuda").reshape(SHARED, 1)]
    for leaf in leaves:
        leaf.requires_grad_()
    value = elbo_ext.gaussian_log_prob(*leaves, batch_dims=2, reduction=reduction)
    # Of the mean, times the number of examples, so that its gradients are those of each example.
    upstream = rising(value) if reduction == "none" else torch.full_like(value, TIMES * SHARED)
    gradients = torch.autograd.grad(value, leaves, upstream)
    examples = elbo_ext.gaussian_log_prob(*(t.detach() for t in leaves), batch_dims=2)
    torch.testing.assert_close(value.double(), examples.double() if reduction == "none" else examples.double().mean(),
                               rtol=1e-6, atol=0)  # fmt: skip
    of_examples = upstream.expand(TIMES, SHARED) if reduction == "none" else torch.ones_like(examples)
    for i in (0, SHARED // 2 - 1, SHARED - 1):
        part = [row_of(t, SHARED, i).double().requires_grad_() for t in leaves]
        exact = reference.gaussian_log_prob(*part, batch_dims=2)
        truths = torch.autograd.grad(exact, part, row_of(of_examples, SHARED, i).double())
        assert_rows_close(row_of(examples, SHARED, i), exact)
        for gradient, truth in zip(gradients, truths, strict=True):
            assert_rows_close(row_of(gradient, SHARED, i), truth)


# ---- the shapes that choose between kernels ----

SHAPES = [
    *((3, n) for n in (1, 7, 20, 64, 784, 785, 4096, 65_536, 300_001)),
    *((2000, n) for n in (1, 3, 20, 64, 784, 785, 5000)),
    (100_000, 20),
    (300_000, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_regime(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Short rows for parts of a warp, rows for a warp, for a block, for several blocks; whole and broken vectors."""
    m = Maker(dtype, "cuda", 0)
    scales = {"scalar": (), "row": (shape[0], 1), "column": (shape[1],), "element": shape}
    for extent, scale_shape in scales.items():
        operands = [m.normal(*shape), m.normal(*shape), m.scale("logvar", *scale_shape)]
        for t in operands:
            t.requires_grad_()
        full = [t.detach().double().expand(shape).clone().requires_grad_() for t in operands]
        upstream = torch.linspace(0.5, 1.5, shape[0], device="cuda")
        for reduction in ("none", "mean"):
            value = elbo_ext.gaussian_log_prob(*operands, reduction=reduction)
            exact = reference.gaussian_log_prob(*full, reduction=reduction)
            torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=2e-5)
            flowing = upstream if reduction == "none" else torch.tensor(0.7, device="cuda")
            gradients = torch.autograd.grad(value, operands, flowing)
            contributions = torch.autograd.grad(exact, full, flowing.double())
            for gradient, of_each in zip(gradients, contributions, strict=True):
                truth, size = (t.sum_to_size(gradient.shape) for t in (of_each, of_each.abs()))
                # Parts of an element's derivative may cancel; made in the forward pass, it is rounded to its dtype twice.
                allowed = 1e-6 * (size + size.mean()) + torch.finfo(dtype).eps * truth.abs()
                assert bool(((gradient.double() - truth).abs() <= allowed).all()), extent


def test_a_small_sum_is_exact_in_every_dtype() -> None:
    m = Maker(torch.float32, "cuda", 0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, mean = m.normal(40, 30, dtype=dtype), m.normal(40, 30, dtype=dtype)
        wide = in_float64({"x": x, "mean": mean})
        exact = reference.gaussian_log_prob(**wide).numpy()
        assert np.allclose(elbo_ext.gaussian_log_prob(x, mean).cpu().double().numpy(), exact, rtol=1e-6)
