"""The same bits for any number of threads and from run to run; the same numbers from every instruction set."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import elbo_ext
from samples import CORE, SAMPLES, Maker, Sample, devices, differentiable, run

# ---- problems large enough for several threads ----

ROWS, COLS = 300, 2000  # 600,000 elements: nine times what is worth a thread


def _rows(m: Maker) -> dict:
    return dict(x=m.normal(ROWS, COLS), mean=m.normal(ROWS, COLS), logvar=m.scale("logvar", ROWS, COLS))


def _long_rows(m: Maker) -> dict:
    return dict(x=m.normal(7, 90_000), mean=m.normal(7, 90_000), logvar=m.scale("logvar"))


def _short_rows(m: Maker) -> dict:
    return dict(x=m.normal(60_000, 10), mean=m.normal(60_000, 10), std=m.scale("std", 10))


def _channels(m: Maker) -> dict:
    x, mean = m.normal(20, 3, 100, 100), m.normal(20, 3, 100, 100)
    return dict(x=x, mean=mean, var=m.scale("var", 3, 1, 1), weight=m.unit(100), reduction="mean")


def _broadcast(m: Maker) -> dict:
    return dict(x=m.normal(COLS), mean=m.normal(ROWS, 1), logvar=m.scale("logvar", ROWS, COLS), reduction="sum")


def _bernoulli(m: Maker) -> dict:
    return dict(x=m.unit(ROWS, COLS), logits=m.normal(ROWS, COLS), reduction="mean")


def _kl(m: Maker) -> dict:
    prior = dict(prior_mu=m.normal(COLS), prior_logvar=m.scale("logvar", ROWS, 1))
    return dict(mu=m.normal(ROWS, COLS), logvar=m.scale("logvar", COLS), **prior)


def _sample(m: Maker) -> dict:
    return dict(mu=m.normal(ROWS, COLS), logvar=m.scale("logvar", COLS))


def _samples(m: Maker) -> dict:
    return dict(mu=m.normal(50, COLS), logvar=m.scale("logvar", 50, COLS), num_samples=6, reduction="sum")


def _many_samples(m: Maker) -> dict:
    return dict(mu=m.normal(16, 32), std=m.scale("std", 16, 1), prior_mu=m.normal(32), num_samples=3000)


def _elbo(m: Maker) -> dict:
    data = dict(
        recon=m.normal(4, ROWS, COLS // 4), x=m.normal(ROWS, COLS // 4), recon_logvar=m.scale("logvar", COLS // 4)
    )
    return dict(**data, mu=m.normal(ROWS, 20), logvar=m.scale("logvar", ROWS, 20), batch_dims=2)


BIG = [
    Sample("rows", "gaussian_log_prob", _rows, "rows of one block"),
    Sample("long-rows", "gaussian_log_prob", _long_rows, "rows of eleven blocks"),
    Sample("short-rows", "gaussian_log_prob", _short_rows, "hundreds of rows in a block"),
    Sample("channels", "gaussian_log_prob", _channels, "the gradient of a per-channel scale, and of a weight"),
    Sample("broadcast", "gaussian_log_prob", _broadcast, "gradients summed over rows and over columns"),
    Sample("bernoulli", "bernoulli_log_prob", _bernoulli, "gradients in the forward pass"),
    Sample("kl", "gaussian_kl", _kl, "a broadcast prior"),
    Sample("sample", "rsample", _sample, "draws"),
    Sample("samples", "rsample_kl", _samples, "draws of six samples, and the KL"),
    Sample("many-samples", "rsample_with_log_prob", _many_samples, "few elements of very many samples"),
    Sample("elbo", "elbo_loss", _elbo, "four samples of each example"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def everything(sample: Sample, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The results, then the gradients of all operands by all results, with fixed random upstream gradients."""
    arguments = sample.make(dtype, device)
    names = differentiable(arguments)
    leaves = {k: v.detach().requires_grad_() if k in names else v for k, v in arguments.items()}
    results = [result for result in run(sample, leaves).values() if result.requires_grad]
    generator = torch.Generator().manual_seed(1)
    # float64: torch's own float32 normals depend on the instruction set
    flowing = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    gradients = torch.autograd.grad(results, [leaves[name] for name in names], flowing)
    return [t.detach().cpu() for t in (*results, *gradients)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bytes: of one sign where they are 0, and NaN where the other is."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", BIG, ids=lambda sample: sample.id)
def test_same_bits_for_any_number_of_threads(sample: Sample, dtype: torch.dtype) -> None:
    """Values, gradients and draws. Three and seven threads cut the work where two do not."""
    torch.set_num_threads(1)
    expected = everything(sample, dtype)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for a, b in zip(everything(sample, dtype), expected, strict=True):
            assert same_bits(a, b), f"{count} threads"


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("sample", BIG, ids=lambda sample: sample.id)
def test_same_bits_from_run_to_run(sample: Sample, device: str) -> None:
    expected = everything(sample, torch.float32, device)
    for _ in range(5):
        for a, b in zip(everything(sample, torch.float32, device), expected, strict=True):
            assert same_bits(a, b)


def test_same_bits_wherever_the_tensors_lie() -> None:
    """A dense tensor gives the same sums at every address: blocks and lanes count elements, not addresses."""
    m = Maker(torch.float32, "cpu", 0)
    x, mean = m.normal(50, 3001), m.normal(50, 3001)
    for reduction in ("none", "sum"):
        expected = elbo_ext.gaussian_log_prob(x, mean, 0.3, reduction=reduction)
        for offset in (1, 2, 3, 5, 7, 13):
            moved = torch.empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
            assert same_bits(elbo_ext.gaussian_log_prob(moved, mean, 0.3, reduction=reduction), expected)


# ---- instruction sets ----

PROGRAM = """
import sys
sys.path[:0] = {folders!r}
import torch, elbo_ext, test_reproducible
torch.save((elbo_ext.build_info()["instruction_set"], test_reproducible.compact_results()), sys.argv[1])
"""

COMPACT = [*CORE, *(sample for sample in SAMPLES if "-row-" in sample.id or "-rows-" in sample.id)]
CAPABILITIES = ("default", "avx2", "avx512")  # of torch's ATEN_CPU_CAPABILITY on x86-64; the first is on every machine


def compact_results() -> dict[str, list[Tensor]]:
    results = {f"{s.id}, {dtype}": everything(s, dtype) for s in COMPACT for dtype in DTYPES}
    for double in (False, True):
        results[f"noise, {double}"] = [torch.ops.elbo_ext.normal_noise(torch.tensor([-3]), 5000, double)[0]]
    return results


def machine_has(capability: str) -> bool:
    supported = torch.cpu._is_avx512_supported if capability == "avx512" else torch.cpu._is_avx2_supported
    return capability == "default" or supported()


@pytest.fixture(scope="module")
def by_instruction_set(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, list[Tensor]]]]:
    """What each instruction set of this machine computes, each in a process of its own: (name in use, results)."""
    folder = tmp_path_factory.mktemp("instruction_sets")
    here, package = Path(__file__).parent, Path(elbo_ext.__file__).parent
    program = PROGRAM.format(folders=[str(here), str(here.parent), str(package.parent)])
    results = {}
    for capability in filter(machine_has, CAPABILITIES):
        file = folder / capability
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", program, str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results[capability] = torch.load(file)
    return results


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_sets_agree(capability: str, by_instruction_set: dict) -> None:
    """To rounding: the registers' width decides in which order a block is summed, the set which products are fused."""
    if not machine_has(capability):
        pytest.skip(f"this machine has no {capability.upper()}")
    in_use, results = by_instruction_set[capability]
    expected_name = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}[capability]
    assert in_use == expected_name and expected_name in elbo_ext.build_info()["instruction_sets"]
    _, baseline = by_instruction_set["default"]
    assert results.keys() == baseline.keys() and len(results) > 300
    for name, tensors in results.items():
        computed = torch.float64 if "float64" in name or "True" in name else torch.float32
        for a, b in zip(tensors, baseline[name], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a.isnan(), b.isnan()), name
            # Parts of an element may be several times its size, and cancel. In half precision a rounding may fall to
            # the other side, once or (gradients made forward) twice.
            eps = max(16 * torch.finfo(computed).eps, 2 * torch.finfo(a.dtype).eps)
            difference, size = (a.double() - b.double()).nan_to_num(), b.double().nan_to_num()
            scale = size.square().mean().sqrt() if size.numel() else 0.0
            assert bool((difference.abs() <= eps * (size.abs() + scale)).all()), f"{name}: {difference.abs().max()}"


def test_instruction_sets_are_different_code(by_instruction_set: dict) -> None:
    """Were they one and the same code, the comparison above would prove nothing."""
    if len(by_instruction_set) < 2:
        pytest.skip("this machine has one instruction set: no AVX2")
    _, baseline = by_instruction_set["default"]
    for capability, (_, results) in by_instruction_set.items():
        if capability == "default":
            continue
        differing = sum(
            not same_bits(a, b) for name in results for a, b in zip(results[name], baseline[name], strict=True)
        )
        assert differing > 0, capability
