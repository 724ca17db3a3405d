"""The demo's command `counts`: a short run, its numbers against scipy's distributions, its data, and how it fails."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from test_demo import assert_one_sentence

import elbo_ext
from elbo_ext.demo import __main__ as demo
from elbo_ext.demo.counts import command, models
from elbo_ext.demo.counts.data import FEWEST, WORDS, load_counts, split_in_three
from elbo_ext.demo.data import DataError, Images

SMALL = ["--epochs", "2", "--hidden", "24", "--latent", "3", "--iw-samples", "20", "--batch-size", "32"]
SEED = 3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def counts_file(tmp_path_factory):
    """Zero-inflated negative binomial counts [300, 12] of uint8, whose mean varies from example to example."""
    generator = np.random.default_rng(0)
    mean = np.exp(generator.normal(size=(300, 1)) + np.linspace(-0.5, 1, 12))
    counts = generator.negative_binomial(2, 2 / (2 + mean)) * (generator.random((300, 12)) > 0.1)
    path = tmp_path_factory.mktemp("data") / "counts.npy"
    np.save(path, counts.clip(max=255).astype(np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread, counts_file):
    """A short run: (folder, results, stdout, the fitted models by name, the data's three parts)."""
    out = tmp_path_factory.mktemp("counts") / "new" / "out"
    fitted = {}

    def fit(likelihood, *parts, **options):
        fitted[likelihood] = models.fit(likelihood, *parts, **options)
        return fitted[likelihood]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(command, "fit", fit)
        code = demo.main(["counts", *SMALL, "--data", counts_file, "--seed", str(SEED), "--out", str(out)])
    assert code == 0
    parts = split_in_three(load_counts(counts_file), 32, SEED)
    return out, json.loads((out / "counts.json").read_text()), stdout.getvalue(), fitted, parts


# --- the run ------------------------------------------------------------------------------------------------


def test_files_and_table(finished):
    out, results, printed, _, _ = finished
    assert sorted(os.listdir(out)) == sorted(command.OUTPUT_FILES)
    assert (out / "counts.png").read_bytes().startswith(b"\x89PNG")
    written = (out / "counts.txt").read_text()
    assert written == command.table(results) + "\n" and written in printed
    assert results["checks"] == {"kernels_agree_with_reference": True} and results["options"]["seed"] == SEED
    rows = {line[:33].strip(): line[34:].split() for line in written.splitlines()}
    for name, label in models.LIKELIHOODS.items():
        entry = results["models"][name]
        elbo, bound, _, error, *gain, zeros, percent, epoch = rows[label]
        assert [float(elbo), float(bound), float(error)] == [
            round(entry[key], 2) for key in ("elbo", "bound", "bound_error")
        ]
        assert float(zeros) == round(100 * entry["zeros_off"], 1) and percent == "%" and int(epoch) == entry["epoch"]
        if name == "poisson":
            assert gain == ["-"] and entry["gain"] == 0
        else:
            assert [float(gain[0]), float(gain[2])] == [round(entry[key], 2) for key in ("gain", "gain_error")]
            assert entry["gain"] == pytest.approx(entry["bound"] - results["models"]["poisson"]["bound"])
        assert [record["epoch"] for record in entry["curve"]] == [1, 2]
        best = max(entry["curve"], key=lambda record: record["validation"])
        assert entry["epoch"] == best["epoch"]


def scipy_log_prob(model, x, log_mean):
    """ln p(x|z) of each element, in float64."""
    mean = np.exp(log_mean)
    if model.likelihood == "poisson":
        return scipy.stats.poisson.logpmf(x, mean)
    theta = np.exp(model.of_features["log_theta"].detach().double().numpy())
    log_prob = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    if model.likelihood == "negative_binomial":
        return log_prob
    gate = scipy.special.expit(model.of_features["gate_logits"].detach().double().numpy())
    return np.log((1 - gate) * np.exp(log_prob) + gate * (x == 0))


@torch.no_grad()
@pytest.mark.parametrize("name", models.LIKELIHOODS)
def test_bounds_are_those_of_scipy(finished, name):
    """The reported model, the draws of the report, everything else by scipy in float64."""
    _, results, _, fitted, (_, _, test) = finished
    model, entry = fitted[name].model, results["models"][name]
    mu, logvar = model.encode(test)
    generator = torch.Generator().manual_seed(SEED + 1)
    assert len(test) * 20 <= models.ROWS  # one block
    z, _, _ = elbo_ext.rsample_with_log_prob(mu, logvar, num_samples=20, generator=generator)
    log_mean = model.decode(z).double().numpy()
    z, mu, std = (t.double().numpy() for t in (z, mu, (logvar / 2).exp()))
    log_weights = scipy_log_prob(model, test.double().numpy(), log_mean).sum(-1)
    log_weights += (scipy.stats.norm.logpdf(z) - scipy.stats.norm.logpdf(z, mu, std)).sum(-1)
    bound = scipy.special.logsumexp(log_weights, axis=0) - np.log(20)
    assert entry["elbo"] == pytest.approx(log_weights.mean(), rel=1e-5)
    assert entry["bound"] == pytest.approx(bound.mean(), rel=1e-5)
    assert entry["bound_error"] == pytest.approx(scipy.stats.sem(bound), rel=1e-4)
    assert entry["elbo"] <= entry["bound"]
    assert models.reference_difference(model, test[:16], num_samples=20, seed=0) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", models.LIKELIHOODS)
def test_predicted_zeros_are_those_of_scipy(finished, name):
    _, results, _, fitted, (_, _, test) = finished
    model, entry = fitted[name].model, results["models"][name]
    z = torch.randn(command.PRIOR_SAMPLES, 3, generator=torch.Generator().manual_seed(SEED))
    zeros = np.exp(scipy_log_prob(model, 0, model.decode(z).double().numpy())).mean(0)
    observed = (test.numpy() == 0).mean(0)
    np.testing.assert_allclose(entry["predicted_zeros"], zeros, rtol=1e-4)
    np.testing.assert_allclose(results["observed_zeros"], observed)
    assert entry["zeros_off"] == pytest.approx(np.abs(zeros - observed).mean(), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", models.LIKELIHOODS)
def test_mean_of_the_model(finished, name):
    """E[x|z] of `pixels` is the mean of the likelihood's own samples."""
    model = finished[3][name].model
    generator, z = np.random.default_rng(1), torch.zeros(1, 3)
    mean = model.decode(z).double().exp().numpy()
    drawn = generator.poisson(np.broadcast_to(mean, (40_000, mean.size)))
    if name != "poisson":
        theta = model.of_features["log_theta"].double().exp().numpy()
        drawn = generator.negative_binomial(theta, theta / (theta + mean), drawn.shape)
    if name == "zero_inflated_negative_binomial":
        drawn = drawn * (generator.random(drawn.shape) > torch.sigmoid(model.of_features["gate_logits"]).numpy())
    difference = drawn.mean(0) - model.pixels(z)[0].numpy()
    assert (np.abs(difference) < 5 * scipy.stats.sem(drawn)).all()


def test_the_best_epoch_is_kept(finished, monkeypatch):
    """Of the validation examples: where the bound falls after the first epoch, the model is that of the first."""
    train, validation, test = finished[4]
    states, values = [], iter([-5.0, -9.0, -6.0, -1.0, -7.0, -2.0])  # validation and test in turn

    def bounds(model, x, **options):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        value = torch.tensor([next(values)])
        return value, value

    monkeypatch.setattr(models, "held_out_bounds", bounds)
    options = {"hidden": 8, "latent": 2, "epochs": 3, "num_samples": 2, "seed": 0, "batch_size": 32}
    fitted = models.fit("poisson", train, validation, test, learning_rate=1e-3, **options)
    assert fitted.epoch == 1 and [record["test"] for record in fitted.curve] == [-9, -1, -2]
    for key, value in fitted.model.state_dict().items():
        assert torch.equal(value, states[0][key])
    assert not torch.equal(states[0]["encoder.0.weight"], states[-1]["encoder.0.weight"])


def test_likelihoods_begin_alike_and_the_same_seed_gives_the_same_numbers(finished):
    train, validation, test = finished[4]
    options = {"hidden": 8, "latent": 2, "epochs": 1, "num_samples": 4, "batch_size": 32, "learning_rate": 1e-3}
    state = torch.get_rng_state()
    first, again, other = (
        models.fit("negative_binomial", train, validation, test, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert first.curve == again.curve != other.curve
    assert torch.equal(torch.get_rng_state(), state)
    untrained = []
    for name in models.LIKELIHOODS:
        torch.manual_seed(0)
        untrained.append(models.CountVAE(train, 8, 2, name))
    for model in untrained[1:]:
        assert torch.equal(model.decoder[-1].weight, untrained[0].decoder[-1].weight)
        assert [p.shape for p in model.likelihood_parameters()] == [(12,)] * len(model.likelihood_parameters())
    assert [len(model.likelihood_parameters()) for model in untrained] == [0, 1, 2]


# --- the data -----------------------------------------------------------------------------------------------


def test_words():
    counts = load_counts("words")
    values = counts.values
    assert values.shape[1] == WORDS and len(values) > 1000 and counts.noun == "docstring"
    assert (values >= 0).all() and torch.equal(values, values.round()) and (values.sum(1) >= FEWEST).all()
    assert (values.var(dim=0) > 1.5 * values.mean(dim=0)).float().mean() > 0.9  # of a Poisson they would be equal
    assert torch.equal(load_counts("words").values, values)


def test_digits():
    from sklearn.datasets import load_digits

    counts = load_counts("digits")
    np.testing.assert_array_equal(counts.values.numpy(), load_digits().data)


def test_bytes_are_not_scaled(counts_file):
    np.testing.assert_array_equal(load_counts(counts_file).values.numpy(), np.load(counts_file))


def test_the_split_is_disjoint():
    counts = Images(torch.arange(200.0).reshape(100, 2), (2,), "rows", "", "example")
    parts = split_in_three(counts, 8, seed=5)
    assert [len(part) for part in parts] == [70, 10, 20]
    assert torch.equal(torch.cat(parts)[:, 0].sort().values, counts.values[:, 0])  # each of them once
    assert not torch.equal(parts[2], split_in_three(counts, 8, seed=6)[2])
    few = Images(torch.arange(6.0).reshape(3, 2), (2,), "rows", "", "example")
    with pytest.raises(DataError, match="'rows' holds 3 examples, of which too few can be held out"):
        split_in_three(few, 1, seed=0)


# --- how it fails -------------------------------------------------------------------------------------------


def assert_refused(capsys, options, message):
    code = demo.main(["counts", *options])
    assert_one_sentence(code, *capsys.readouterr(), message)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number of 1 or more"),
        (["--iw-samples", "0"], "argument --iw-samples: '0' is not a whole number of 1 or more"),
        (["--learning-rate", "nan"], "argument --learning-rate: 'nan' is not a finite number above 0"),
        (["--likelihood", "poisson"], "unrecognized arguments: --likelihood poisson"),
        (["--device", "gpu"], "--device 'gpu' is not a device"),
        (["--data", "missing.npy"], "cannot read 'missing.npy': No such file or directory"),
        (["--data", "digits", "--batch-size", "1500"], "holds 1797 images, but batches of 1500 need at least 2143"),
        (["--data", "digits", "--out", ""], "--out '' is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option(capsys, options, message):
    assert_refused(capsys, options, message)


@pytest.mark.parametrize(
    "array, message",
    [
        (
            np.array([[1.0, 2], [3, 4], [0.5, 1]]),
            "does not hold counts, which are whole and not negative: see its example 2",
        ),
        (np.array([[1, 2], [3, -4]]), "does not hold counts, which are whole and not negative: see its example 1"),
        (
            np.array([[1, np.inf]]),
            "holds 1 value that is NaN, infinite or too large for float32, the first in example 0",
        ),
        (np.arange(5), "examples need at least two dimensions, [examples, features]"),
        (np.arange(40).reshape(20, 2), "holds 20 examples, but batches of 64 need at least 91"),
        (np.ones((100, 2)), "there is nothing to learn"),
    ],
    ids=["fraction", "negative", "infinite", "labels", "few", "constant"],
)
def test_bad_data(tmp_path, capsys, array, message):
    np.save(tmp_path / "x.npy", array)
    assert_refused(capsys, ["--data", str(tmp_path / "x.npy")], message)


def test_diverged_training(counts_file, capsys):
    code = demo.main(["counts", *SMALL, "--data", counts_file, "--learning-rate", "1e30", "--out", "out"])
    assert code == 2 and os.listdir() == []
    assert "error: the training diverged in epoch 1:" in capsys.readouterr().err.splitlines()[-1]
