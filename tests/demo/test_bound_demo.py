"""The demo's command `bound`: a quick run, its numbers against theory, whether its checks can fail, and its errors."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import elbo_ext
from elbo_ext import bounds
from elbo_ext.demo import __main__ as demo
from elbo_ext.demo.bound import command as bound_demo
from elbo_ext.demo.bound import models as bound_models
from elbo_ext.demo.bound import plots as bound_plots
from elbo_ext.demo.bound.experiments.amortization import amortization
from elbo_ext.demo.bound.experiments.bound_over_counts import bound_over_counts, chi_square
from elbo_ext.demo.bound.experiments.collapse import collapse
from elbo_ext.demo.bound.experiments.gap_over_training import gap_over_training
from elbo_ext.demo.bound.experiments.gradient_variance import (
    ESTIMATORS,
    gradient_moments,
    gradient_variance,
    pathwise_variances,
)
from elbo_ext.demo.bound.models import QUICK, Check, Finding
from elbo_ext.demo.data import load_images, split

FILES = sorted([*bound_demo.FIGURES.values(), "bound.json"])

# A child process imports the package that is tested here, from any folder, and does without a second thread.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.path.dirname(elbo_ext.__path__[0]), os.environ.get("PYTHONPATH")])
)

pytestmark = pytest.mark.usefixtures("one_thread")


def read(out) -> dict:
    def refuse(token: str):
        raise AssertionError(f"{token} is not JSON")

    return json.loads((out / "bound.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker_id):
    """A quick run in a process of its own, one for all of pytest's workers: (folder, results, stdout, stderr)."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    out, told = shared / "bound" / "out", shared / "bound.told"
    with open(shared / "bound.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            command = [sys.executable, "-m", "elbo_ext.demo", "bound", "--quick", "--seed", "3", "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
            assert done.returncode == 0, done.stderr
            told.write_text(json.dumps([done.stdout, done.stderr]))
    return out, read(out), *json.loads(told.read_text())


# --- the run ------------------------------------------------------------------------------------------------


def test_files_and_table(finished):
    out, results, printed, errors = finished
    assert sorted(os.listdir(out)) == FILES
    for name in bound_demo.FIGURES.values():
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    assert errors == ""  # no bars without a terminal
    for name, statement in results["statements"].items():
        assert results["checks"][name] is statement["holds"] is True
        assert statement["statement"] in printed and statement["measured"] in printed
    assert results["options"]["seed"] == 3 and results["versions"]["torch"] == torch.__version__


def test_bounds_are_in_order(finished):
    _, results, _, _ = finished
    for model in ("linear_gaussian", "vae"):
        entry = results["bound_over_counts"][model]
        iwae, error = np.array(entry["iwae"]), np.array(entry["iwae_error"])
        assert (np.diff(iwae) > -5 * (error[1:] + error[:-1])).all()
        assert entry["elbo"] < iwae[-1] - 5 * error[-1]
        assert (iwae < entry["log_px"] + 5 * (error + entry["log_px_error"])).all()
    linear = results["bound_over_counts"]["linear_gaussian"]
    counts = np.array(results["bound_over_counts"]["count"])
    assert linear["log_px_error"] == linear["elbo_error"] == 0
    np.testing.assert_allclose(linear["gap"], linear["log_px"] - np.array(linear["iwae"]), atol=0.05)
    np.testing.assert_allclose(linear["gap"][-1], linear["predicted_gap"][-1], rtol=0.3)
    np.testing.assert_allclose(counts * linear["predicted_gap"], linear["predicted_gap"][0])


def test_gradient_variances(finished):
    """Over K the variance of a mean of K terms falls as 1 / K, that of DReG as 1 / K^3; the SNR is of those."""
    _, results, _, _ = finished
    part = results["gradient_variance"]
    for parameter in ("mu", "logvar"):
        curves = part[parameter]["over_count"]
        for name in ("score function", "SGVB A", "SGVB B", "STL"):
            scaled = np.array(curves[name]["variance"]) * curves[name]["count"]
            np.testing.assert_allclose(scaled, scaled.mean(), rtol=0.35)
        variance, counts = curves["DReG"]["variance"], curves["DReG"]["count"]
        assert -3.5 < math.log(variance[-1] / variance[-3]) / math.log(counts[-1] / counts[-3]) < -2.5
        # At K = 1 these are one and the same.
        for a, b in (("IWAE", "SGVB A"), ("DReG", "STL")):
            errors = curves[a]["variance_error"][0] + curves[b]["variance_error"][0]
            assert abs(curves[a]["variance"][0] - curves[b]["variance"][0]) < 5 * errors
        over_sigma = part[parameter]["over_sigma"]
        landing = part["sigma_ratio"].index(1)
        for name in ("STL", "DReG"):
            variances = np.array(over_sigma[name]["variance"])
            assert variances[landing] < 1e-20 < 1e-6 < np.delete(variances, landing).min()


def test_gaps(finished):
    _, results, _, _ = finished
    linear, vae = (results["gap_over_training"][model] for model in ("linear_gaussian", "vae"))
    for q in ("diagonal", "full"):
        np.testing.assert_allclose(np.add(linear[q]["elbo"], linear[q]["gap"]), linear["log_px"], rtol=1e-10)
    assert linear["diagonal"]["gap"][-1] == pytest.approx(linear["diagonal_floor"], rel=0.01)
    assert linear["full"]["gap"][-1] < 1e-3 < linear["diagonal_floor"]
    assert vae["epoch"][0] == 0 and vae["epoch"][-1] == QUICK.epochs
    np.testing.assert_allclose(np.subtract(vae["log_px"], vae["elbo"]), vae["gap"], atol=1e-9)
    for entry in results["amortization"].values():
        whole = entry["log_px"] - entry["elbo_amortized"]
        assert entry["amortization_gap"] + entry["approximation_gap"] == pytest.approx(whole)
        # Other draws, and the same images: 5 errors, and those of 16 samples per image, which are paired.
        measured, error = entry["amortization_gap"], entry["amortization_gap_error"]
        assert entry["amortization_gap_of_diagnostics"] == pytest.approx(measured, abs=5 * error + 0.05)


def test_collapse(finished):
    _, results, _, _ = finished
    rows = results["collapse"]["betas"]
    assert [row["beta"] for row in rows] == sorted(QUICK.betas)
    for row in rows:
        assert row["kl"] == pytest.approx(sum(row["kl_per_dimension"]), rel=1e-5)
        assert row["kl_per_dimension"] == sorted(row["kl_per_dimension"], reverse=True)
        assert row["mutual_information"] < min(row["mutual_information_at_most"], row["kl"] + 0.1)
    assert rows[0]["kl"] > 4 > 1 > rows[1]["kl"] > 0.01 > rows[2]["kl"]
    # The ELBO is what beta = 1 maximizes.
    assert max(rows, key=lambda row: row["elbo"])["beta"] == 1


@pytest.mark.parametrize("name", bound_demo.FIGURES)
def test_titles_are_not_cut_off(finished, monkeypatch, name):
    _, results, _, _ = finished
    monkeypatch.setattr(bound_plots, "png", lambda figure: figure)
    figure = getattr(bound_plots, name)(Finding(results[name]))
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # puts everything in its place
    assert len(figure.get_suptitle()) > 40
    for text in (figure._suptitle, *(axes._left_title for axes in figure.axes)):
        box, page = text.get_window_extent(), figure.bbox
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_random_state_alone():
    def measure(seed: int) -> list:
        size = bound_models.Size(4, 50, 2**10, 5, 1, 8, 64, (1.0,))
        train_data, test_data = ((part > 0.5).float() for part in split(load_images(), 64, seed))
        digits = bound_models.train_digits(train_data, test_data, size, seed)
        return [
            digits.training,
            bound_over_counts(digits, size, seed).numbers,
            gradient_variance(size, seed, torch.device("cpu")).numbers,
            gap_over_training(digits, size, seed).numbers,
            amortization(digits, size, seed).numbers,
            collapse(train_data, test_data, size, seed).numbers,
        ]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = measure(1), measure(1), measure(2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# --- the numbers against another way to them ----------------------------------------------------------------


@pytest.mark.parametrize("shift, widen", [(0.0, 0.3), (0.4, 0.8), (-1.0, 1.5), (0.2, -3.0)])
def test_chi_square(shift, widen):
    """Of one latent dimension, by numerical integration; infinite where q is too narrow."""
    model = bounds.LinearGaussian(torch.tensor([[1.0], [0.5], [-0.7]], dtype=torch.float64), std=0.8)
    x = torch.tensor([[0.3, 1.0, -0.5], [2.0, 0.1, 0.0]], dtype=torch.float64)
    mu, logvar = model.best_diagonal(x)
    mu, logvar = mu + shift, logvar + widen
    measured = chi_square(model, x, mu, logvar)
    if widen < -math.log(2):
        assert measured.isinf().all()
        return
    z = torch.linspace(-30, 30, 200_001, dtype=torch.float64).reshape(-1, 1, 1)
    log_posterior = model.log_joint(x, z.expand(-1, 2, 1)) - model.log_evidence(x)
    log_q = elbo_ext.gaussian_log_prob(z, mu, logvar, batch_dims=2)
    integral = torch.trapezoid(torch.exp(2 * log_posterior - log_q), z[:, 0, 0], dim=0)
    torch.testing.assert_close(measured, integral - 1, rtol=1e-8, atol=1e-8)


def gradients_by_quadrature(estimator, log_likelihood, mu, logvar):
    """Mean and variance of the gradients by mu and logvar at K = 1, exact: they are polynomials of the noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    grid = torch.tensor(list(itertools.product(nodes, repeat=len(mu))))
    share = torch.tensor([math.prod(w) for w in itertools.product(weights / weights.sum(), repeat=len(mu))])
    leaves = [t.expand(len(grid), -1).clone().requires_grad_() for t in (mu, logvar)]
    value = estimator(log_likelihood, *leaves, num_samples=1, noise=grid.unsqueeze(0), reduction="sum")
    for gradient in torch.autograd.grad(value, leaves):
        mean = share @ gradient
        yield mean, (share @ (gradient - mean).square()).sum().item()


@pytest.fixture(scope="module")
def orthogonal():
    """A model with a diagonal posterior, ln p(x|z), and a q near it."""
    model = bound_models.linear_gaussian(6, 3, 0, orthogonal=True)
    torch.manual_seed(0)
    x = bound_models.data_of(model, 1)[0]
    mu, logvar = model.best_diagonal(x)
    return model, x, mu + torch.tensor([0.3, -0.2, 0.5]), logvar + torch.tensor([0.6, -0.4, 0.1])


def test_closed_forms_of_the_pathwise_variances(orthogonal):
    model, x, mu, logvar = orthogonal
    likelihood = partial(model.log_likelihood, x)
    predicted = pathwise_variances(model, x, mu, logvar)
    for name, variances in predicted.items():
        exact = gradients_by_quadrature(ESTIMATORS[name], likelihood, mu, logvar)
        for (_, variance), closed_form in zip(exact, variances.values(), strict=True):
            assert closed_form == pytest.approx(variance, rel=1e-10)


def test_measured_moments_of_the_score_function(orthogonal):
    model, x, mu, logvar = orthogonal
    likelihood = partial(model.log_likelihood, x)
    estimator = ESTIMATORS["score function"]
    torch.manual_seed(1)
    measured = gradient_moments(estimator, likelihood, mu, logvar, 1, 40_000)
    exact = gradients_by_quadrature(estimator, likelihood, mu, logvar)
    for moments, (mean, variance) in zip(measured.values(), exact, strict=True):
        assert ((moments.mean - mean).abs() < 5 * moments.mean_error).all()
        assert abs(moments.variance.value - variance) < 5 * moments.variance.error < 0.3 * variance
        assert moments.snr(mean).value == pytest.approx(mean.norm().item() / variance**0.5, rel=0.1)


def test_evidence_of_a_model_that_knows_it():
    model = bound_models.linear_gaussian(8, 3, 0)
    torch.manual_seed(0)
    x = bound_models.data_of(model, 10)
    mu, logvar = model.best_diagonal(x)
    q = mu, (logvar + 0.5).expand_as(mu)
    likelihood = partial(model.log_likelihood, x)
    weights = bound_models.log_weights(likelihood, *q, 20_000)
    log_px = bound_models.evidence(weights)
    assert abs(log_px.value - model.log_evidence(x).mean().item()) < 5 * log_px.error < 0.05
    draws = bound_models.repeated(partial(bounds.sgvb_b, likelihood), *q, 3, 8000)
    assert draws.shape == (8000, 10)
    elbo = bound_models.estimate(draws)
    assert abs(elbo.value - model.elbo(x, *q).mean().item()) < 5 * elbo.error < 0.1


# --- the checks can fail ------------------------------------------------------------------------------------


def too_steep(*arguments, **options):
    return 1.1 * bounds.sgvb_b(*arguments, **options)


@pytest.mark.parametrize(
    "name, wrong, noticed",
    [
        ("STL", bounds.sgvb_a, {"variance_as_predicted", "zero_variance_at_posterior"}),
        ("SGVB B", too_steep, {"variance_as_predicted", "gradients_unbiased"}),
        ("DReG", bounds.iwae, {"signal_to_noise", "zero_variance_at_posterior"}),
        ("IWAE", bounds.sgvb_a, {"gradients_unbiased"}),
        ("score function, baseline", bounds.sgvb_b, {"score_function_noisier", "zero_variance_at_posterior"}),
    ],
)
def test_a_wrong_gradient_is_noticed(monkeypatch, name, wrong, noticed):
    monkeypatch.setitem(ESTIMATORS, name, wrong)
    size = dataclasses.replace(QUICK, largest_count=16, repetitions=2000)
    finding = gradient_variance(size, 0, torch.device("cpu"))
    assert noticed <= {key for key, check in finding.checks.items() if not check.holds}


def test_a_wrong_bound_is_noticed(monkeypatch):
    train_data, test_data = ((part > 0.5).float() for part in split(load_images(), 64, 0))
    size = bound_models.Size(16, 10, 2**14, 5, 1, 16, 256, ())
    digits = bound_models.train_digits(train_data, test_data, size, 0)
    assert all(check.holds for check in bound_over_counts(digits, size, 0).checks.values())
    right = bounds.iwae

    def without_the_mean(log_likelihood, mu, logvar, *, num_samples, **options):  # logsumexp alone
        return right(log_likelihood, mu, logvar, num_samples=num_samples, **options) + math.log(num_samples)

    monkeypatch.setattr(bounds, "iwae", without_the_mean)
    finding = bound_over_counts(digits, size, 0)
    assert not any(check.holds for check in finding.checks.values())


def test_a_failed_check_is_told(capsys, monkeypatch, finished):
    _, results, _, _ = finished
    check = Check("one is two", "1", False)
    assert "(a) one is two" in bound_demo.table({"a": Finding({}, {"x": check})}).splitlines()[3]
    assert bound_demo.table({"a": Finding({}, {"x": check})}).splitlines()[3].endswith(" NO")
    titles = []
    monkeypatch.setattr(bound_plots, "png", lambda figure: titles.append(figure.get_suptitle()))
    bound_plots.amortization(Finding(results["amortization"], {"x": check}))
    assert titles == ["DOES NOT HOLD: one is two"]
    monkeypatch.setattr(bound_demo, "run", lambda options: {"checks": {"one_is_two": False, "else": True}})
    assert demo.main(["bound"]) == 1
    assert capsys.readouterr().err == "elbo_ext.demo: failed: one is two.\n"


# --- how it fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number of 0 or more"),
        (["--threads", "0"], "argument --threads: '0' is not a whole number of 1 or more"),
        (["--threads", "1000000"], "--threads 1000000 is more than this machine's"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["--device", "gpu"], "--device 'gpu' is not a device; use cpu, cuda or cuda:N"),
        (["--out", ""], "--out '' is not a folder"),
    ],
    ids=" ".join,
)
def test_bad_option(capsys, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    code = demo.main(["bound", *options])
    printed, error = capsys.readouterr()
    assert code == 2 and printed == ""
    assert message in error and error.startswith("elbo_ext.demo: error: ")
    assert error.endswith(".\n") and error.count("\n") == 1
    assert os.listdir() == []


def test_out_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "out" / "collapse.png").mkdir(parents=True)
    assert demo.main(["bound", "--out", str(tmp_path / "out")]) == 2
    assert "collapse.png in it is a folder" in capsys.readouterr().err


def test_bound_comes_first_or_is_no_command(capsys):
    assert demo.main(["--epochs", "3", "bound"]) == 2
    assert "unrecognized arguments: bound" in capsys.readouterr().err
    with contextlib.suppress(SystemExit):
        demo.main(["bound", "--help"])
    assert "--quick" in capsys.readouterr().out
