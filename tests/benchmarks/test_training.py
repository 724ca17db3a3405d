"""Whole training steps in the benchmarks: contenders compute the same, checks notice what does not, rows say what is missing.

scVI and bayesian-torch themselves where they are installed; else, and with them, stand-ins with the names that are used.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import elbo_ext
from benchmarks import BenchmarkError, goals, models, rows, suite, tables, training
from benchmarks.__main__ import main
from benchmarks.cases import BOTH
from benchmarks.contenders import NO_LOSS, SHIPPED, SHIPPED_COMPILED, TRAINING
from benchmarks.training import Training

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "scvi-zinb": Training("small", "scvi", (32, 60), "zinb", latent=(32, 10)),
    "scvi-nb": Training("small", "scvi", (32, 60), "nb", latent=(32, 10)),
    "bnn": Training("small", "bnn", (16, 30), "categorical", hidden=20),
    "vae-bernoulli": Training("small", "vae", (16, 48), "bernoulli", latent=(16, 5), hidden=24),
    "vae-gaussian": Training("small", "vae", (16, 48), "gaussian", latent=(16, 5), hidden=24),
}
VAE = SMALL["vae-gaussian"]


# ---- stand-ins ----


class Layer(nn.Module):
    """bayesian_torch.layers.LinearReparameterization."""

    prior_mean, prior_variance = 0, 1

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        for name, shape in (("weight", (out, width)), ("bias", (out,))):
            self.register_parameter(f"mu_{name}", nn.Parameter(0.1 * torch.randn(shape)))
            self.register_parameter(f"rho_{name}", nn.Parameter(0.1 * torch.randn(shape) - 3))
            for buffer, value in ((f"eps_{name}", 0), (f"prior_{name}_mu", 0), (f"prior_{name}_sigma", 1)):
                self.register_buffer(buffer, torch.full(shape, float(value)))

    def kl_div(self, mu: Tensor, sigma: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
        return kl_divergence(Normal(mu, sigma, False), Normal(prior_mu, prior_sigma, False)).mean()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        drawn, kl = [], 0
        for name in ("weight", "bias"):
            mu, sigma = getattr(self, f"mu_{name}"), F.softplus(getattr(self, f"rho_{name}"))
            drawn.append(mu + sigma * getattr(self, f"eps_{name}").normal_())
            kl += self.kl_div(mu, sigma, getattr(self, f"prior_{name}_mu"), getattr(self, f"prior_{name}_sigma"))
        return F.linear(x, *drawn), kl


class Perceptron(nn.Sequential):
    """scvi.nn.FCLayers, which takes categories as well."""

    def forward(self, x: Tensor, *categories: Tensor) -> Tensor:
        return super().forward(x)


class Decoder(nn.Module):
    def __init__(self, latent: int, hidden: int, genes: int) -> None:
        super().__init__()
        self.px_decoder = Perceptron(nn.Linear(latent, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.scale, self.gate = nn.Linear(hidden, genes), nn.Linear(hidden, genes)

    def forward(self, dispersion: str, z: Tensor, library: Tensor, *categories: Tensor) -> tuple:
        hidden = self.px_decoder(z)
        scale = self.scale(hidden).softmax(-1)
        return scale, None, library.exp() * scale, self.gate(hidden)


class VAEModule(nn.Module):
    """scvi.module.VAE."""

    dispersion = "gene"

    def __init__(self, genes: int, n_batch: int, gene_likelihood: str, n_hidden: int, latent: int = 10) -> None:
        super().__init__()
        self.likelihood, self.px_r = gene_likelihood, nn.Parameter(torch.randn(genes))
        self.z_encoder = nn.Module()
        self.z_encoder.encoder = Perceptron(
            nn.Linear(genes, n_hidden), nn.BatchNorm1d(n_hidden), nn.ReLU(), nn.Dropout(0.1)
        )
        self.z_encoder.mean_encoder, self.z_encoder.var_encoder = (nn.Linear(n_hidden, latent) for _ in range(2))
        self.z_encoder.var_eps = 1e-4
        self.decoder = Decoder(latent, n_hidden, genes)
        self.px_r_decoder = nn.Linear(n_hidden, genes)  # which is there, and is not used

    def forward(self, tensors: dict[str, Tensor], compute_loss: bool = True) -> tuple:
        x, encoder = tensors["X"], self.z_encoder
        hidden = encoder.encoder(x.log1p(), tensors["batch"])
        qz = Normal(encoder.mean_encoder(hidden), (encoder.var_encoder(hidden).exp() + encoder.var_eps).sqrt())
        z = qz.rsample()
        _, _, mean, gate = self.decoder("gene", z, x.sum(1, keepdim=True).log(), tensors["batch"])
        px = SimpleNamespace(mu=mean, theta=self.px_r.exp(), zi_logits=gate)
        outputs = {"z": z, "qz": qz}, {"px": px}
        if not compute_loss:
            return outputs
        formula = log_nb_positive if self.likelihood == "nb" else log_zinb_positive
        log_prob = formula(x, px.mu, px.theta, *([gate] if self.likelihood == "zinb" else []))
        kl = kl_divergence(qz, Normal(0.0, 1.0))
        return *outputs, SimpleNamespace(loss=(kl.sum(-1) - log_prob.sum(-1)).mean())


def log_nb_positive(x: Tensor, mu: Tensor, theta: Tensor, eps: float = 1e-8) -> Tensor:
    log_sum = (theta + mu + eps).log()
    power = theta * ((theta + eps).log() - log_sum) + x * ((mu + eps).log() - log_sum)
    return power + (x + theta).lgamma() - theta.lgamma() - (x + 1).lgamma()


def log_zinb_positive(x: Tensor, mu: Tensor, theta: Tensor, gate: Tensor) -> Tensor:
    counted = log_nb_positive(x, mu, theta)
    return torch.where(x == 0, torch.logaddexp(gate, counted), counted) - F.softplus(gate)


def stand_ins() -> dict[str, ModuleType]:
    content = {
        "bayesian_torch": {},
        "bayesian_torch.layers": {"LinearReparameterization": Layer},
        "scvi": {},
        "scvi.module": {"VAE": VAEModule},
        "scvi.distributions": {},
        "scvi.distributions._negative_binomial": {
            "log_nb_positive": log_nb_positive, "log_zinb_positive": log_zinb_positive,
        },
    }  # fmt: skip
    made = {}
    for name, names in content.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(names)
    return made


@pytest.fixture
def fresh():
    """What is missing is found out anew, and not remembered."""
    models.missing.cache_clear()
    yield
    models.missing.cache_clear()


@pytest.fixture(params=["installed", "stand-in"])
def source(request, monkeypatch, fresh) -> str:
    if request.param == "stand-in":
        for name, module in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, module)
    return request.param


def contest(case: Training, source: str = "") -> training.Contest:
    if source == "installed" and case.model not in models.NEEDS:
        pytest.skip("needs nothing, and is tested with the stand-ins")
    if source == "installed" and models.missing(case.model):
        pytest.skip(models.missing(case.model))
    return training.Contest(case, BOTH, CPU)


# ---- contenders ----


def learned_by(contest: training.Contest, contender: str) -> set[str]:
    (step,), (model,) = contest.bind(contender)
    for _ in range(2):
        contest.call_and_check(contender, step)
        found = {name for name, p in model.module.named_parameters() if p.grad is not None and p.grad.any()}
        model.drop_gradients()
        assert all(p.grad is None for p in model.module.parameters())
    assert all(part.training for part in model.module.modules())
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_contenders_compute_what_the_reference_computes(case, source):
    """And all of them learn the same parameters."""
    some = contest(case, source)
    learned = {name: learned_by(some, name) for name in TRAINING if name != SHIPPED_COMPILED}
    assert learned["ours"] == learned[SHIPPED] == learned[NO_LOSS] and len(learned["ours"]) >= 9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["scvi-zinb", "bnn", "vae-bernoulli"])
def test_the_loss_alone_compiles(name, source):
    """In a run, as a compiler that fails is noted there."""
    case = SMALL[name]
    contest(case, source)
    (measured,) = suite.run([suite.Group(case, BOTH, 1, (SHIPPED_COMPILED,))], CPU, rows.machine(CPU), 0.001)
    assert measured.note is None and measured.median_us > 0


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_the_limit_draws_nothing_and_has_no_loss(case, source, monkeypatch):
    some = contest(case, source)
    (step,), _ = some.bind(NO_LOSS)
    step()  # which makes the fixed gradients

    def forbidden(*arguments, **options):
        raise AssertionError

    for module, name in ((elbo_ext, "rsample_kl"), (torch, "randn_like"), (Normal, "rsample"), (F, "cross_entropy")):
        monkeypatch.setattr(module, name, forbidden)
    step()


def test_a_step_changes_the_parameters_and_not_the_point_of_the_training():
    some = contest(VAE)
    (step,), (model,) = some.bind("ours")
    first = [p.detach().clone() for p in some.first.module.parameters()]
    step()
    moved = [(after - before).abs().max().item() for before, after in zip(first, model.module.parameters())]
    assert 0 < max(moved) < 4 * training.LEARNING_RATE  # rounded at numbers of size 1
    assert all(torch.equal(p, before) for p, before in zip(some.first.module.parameters(), first))


def test_the_network_is_the_same_each_time_and_random_numbers_stay():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two = (models.make(VAE, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(one.x, two.x)
    assert all(map(torch.equal, one.module.parameters(), two.module.parameters()))


def test_counts_are_sparse():
    torch.manual_seed(0)
    x = models.counts((128, 2000), CPU)
    assert 0.75 < (x == 0).float().mean() < 0.85 and torch.equal(x, x.round()) and x.max() > 20
    assert (x.sum(1) > 0).all()  # scVI takes its logarithm


# ---- the check ----


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda result, grads: result.loss.mul_(1.002), "its loss"),
        (lambda result, grads: result.loss.fill_(math.nan), "its loss"),
        (lambda result, grads: grads["decoder.0.weight"].mul_(1.002), "its gradient of decoder.0.weight"),
        (lambda result, grads: grads["recon_logvar"].neg_(), "its gradient of recon_logvar"),
        (lambda result, grads: result.samples[0].add_(1), "its noise"),
        (lambda result, grads: result.samples[0].copy_(result.samples[0].flip(0)), "its"),
    ],
)
def test_the_check_notices_other_numbers(change, what):
    some = contest(VAE)
    (step,), (model,) = some.bind("ours")

    def doctored() -> models.Result:
        result = step()
        with torch.no_grad():
            change(result, {name: p.grad for name, p in model.module.named_parameters()})
        return result

    some.call_and_check("ours", step)
    model.drop_gradients()
    with pytest.raises(BenchmarkError, match=f"ours computes something else .* in case small: {what}"):
        some.call_and_check("ours", doctored)


def test_the_check_notices_a_missing_gradient():
    some = contest(VAE)
    (step,), (model,) = some.bind("ours")

    def doctored() -> models.Result:
        result = step()
        model.module.recon_logvar.grad = None
        return result

    with pytest.raises(BenchmarkError, match="ours gives no gradient of recon_logvar in case small"):
        some.call_and_check("ours", doctored)


def test_a_gradient_that_is_zero_may_be_rounding():
    """But no more than that: of a bias before a batch normalization."""
    some, exact = (models.make(SMALL["vae-bernoulli"], CPU) for _ in range(2))
    result = some.fused(elbo_ext)
    result.loss.backward()
    exact = exact.double()

    def add(size: float) -> None:
        with torch.no_grad():
            for p in some.module.parameters():
                p.grad += size * p.grad.norm() / math.sqrt(p.numel())

    training.check("small", "ours", some, result, exact)
    add(3e-4)
    training.check("small", "ours", some, result, exact)
    add(2e-3)
    with pytest.raises(BenchmarkError, match="its gradient of"):
        training.check("small", "ours", some, result, exact)


# ---- what is missing ----


def test_a_missing_package_is_noted_in_each_row(monkeypatch, fresh):
    monkeypatch.setattr(models, "NEEDS", {"vae": ("no_such_module.part", "no-such-package")})
    groups = suite.plan(CPU, 1, patterns=["vae-mnist"])
    measured = list(suite.run(groups, CPU, rows.machine(CPU), 0.001))
    assert [row.contender for row in measured] == list(TRAINING)
    note = "needs no-such-package, which is not installed: pip install 'elbo_ext[bench-steps]'"
    assert all(row.note == note and row.median_us is None for row in measured)
    assert tables.notes(measured)[0] == f"ours: {note} (vae-mnist)"
    assert tables.speed(measured).splitlines()[-1].count("| ") == 7
    assert models.EXTRA in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_module_that_is_nowhere", "ModuleNotFoundError: No module named 'a_module_that_is_nowhere'"),
        ("raise RuntimeError('another torch\\nlong story')", "RuntimeError: another torch"),
    ],
)
def test_a_package_that_does_not_load_is_noted(monkeypatch, fresh, tmp_path, source, said):
    (tmp_path / "broken_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "NEEDS", {"vae": ("broken_package", "broken-package")})
    assert models.missing("vae") == f"broken-package cannot be imported: {said}"


def test_what_is_pinned_is_what_is_asked_for():
    pinned = (ROOT / "benchmarks/steps.txt").read_text()
    for package in ("scvi-tools", "bayesian-torch"):
        assert f"\n{package}==" in pinned
    assert {package for _, package in models.NEEDS.values()} == {"scvi-tools", "bayesian-torch"}


# ---- all of it ----


def test_the_table_of_cases():
    assert len({case.name for case in suite.ALL_CASES}) == len(suite.ALL_CASES)
    kinds = {(case.model, case.likelihood) for case in training.CASES}
    assert kinds == {(case.model, case.likelihood) for case in SMALL.values()}
    groups = suite.plan(CPU, 4, patterns=["scvi-*", "bnn-*", "vae-*"])
    assert [group.case for group in groups] == list(training.CASES)
    assert all(group[1:] == (BOTH, 4, TRAINING) for group in groups)
    assert {case.elements for case in training.CASES if case.model == "bnn"} == {784 * 400, 1200 * 1200}
    elsewhere = [*suite.plan(CPU, 4, contenders=["copy"]), *suite.plan(torch.device("cuda"), 4)]
    assert not any(isinstance(group.case, Training) for group in elsewhere)


def test_goals():
    base = dict(work=training.WORK, direction=BOTH, dtype="float32", variance=None, data=None, latent=None,
                elements=1, array_bytes=4, threads=1)  # fmt: skip
    some = [
        rows.Row(case=case, contender=name, median_us=median, **base)
        for case, ours in (("scvi-nb-2k", 10.0), ("scvi-zinb-2k", 16.0), ("bnn-400", 20.0))
        for name, median in (("ours", ours), (SHIPPED, 40.0))
    ]
    found = [(goal.what.split(":")[0], value, row.case, goal.met(value)) for goal, value, row in goals.outcomes(some)]
    assert found == [
        ("training step of scVI's VAE", pytest.approx(2.5), "scvi-zinb-2k", False),
        ("training step of a Bayesian network", pytest.approx(2.0), "bnn-400", False),
    ]


def test_a_run(monkeypatch, tmp_path, capsys):
    """The command line, next to a work; and what a row has."""
    case = dataclasses.replace(VAE, name="vae-small")
    monkeypatch.setattr(suite, "ALL_CASES", (*suite.ALL_CASES, case))
    asked = ["--cases", "vae-small,kl-2560", "--contenders", "ours,shipped,no-loss,eager", "--seconds", "0.01"]
    assert main([*asked, "--threads", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for part in ("## Time\n", "## Time of whole training steps", "of training steps beyond parameters"):
        assert printed.count(part) == 1
    measured = [row for row in rows.read_json(str(tmp_path / "results.json")) if row.work == training.WORK]
    assert [row.contender for row in measured] == ["ours", SHIPPED, NO_LOSS]
    for row in measured:
        assert row.note is None and row.median_us > 0 and row.bytes is None and row.gb_per_s is None
        assert (row.variance, row.data, row.latent, row.buffer_sets) == ("gaussian", "16x48", "16x5", 1)
    steps = printed.split("## Time of whole training steps")[1].split("##")[0]
    assert "shipped | no-loss" in steps and "eager" not in steps and "GB/s" not in steps
    assert (tmp_path / "speedup.png").exists()


def test_a_contender_that_differs_stops_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "ALL_CASES", (VAE,))
    wrong: Callable = lambda self: self.fused(elbo_ext)._replace(loss=torch.zeros((), requires_grad=True))
    monkeypatch.setattr(models.DemoVAE, "shipped", wrong)
    assert main(["--cases", "small", "--contenders", "ours,shipped", "--out", str(tmp_path)]) == 2
    assert "shipped computes something else than the reference in case small: its loss" in capsys.readouterr().err
