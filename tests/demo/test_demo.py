"""The demo: a short training by its command line, what it writes, and how it fails."""

import contextlib
import io
import json
import math
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

import elbo_ext
from elbo_ext import reference
from elbo_ext.demo import __main__ as demo
from elbo_ext.demo import training, vae
from elbo_ext.demo.command_line import OutputFolder
from elbo_ext.demo.data import load_images, split

FILES = ["learning_curves.png", "reconstructions.png", "results.json", "samples.png"]
SMALL = ["--epochs", "4", "--hidden", "48", "--latent", "6", "--iw-samples", "60"]

# A child process imports the package that is tested here, from any folder, and does without a second thread.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.path.dirname(elbo_ext.__path__[0]), os.environ.get("PYTHONPATH")])
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def run_main(capsys, *argv: str) -> tuple[int, str, str]:
    code = demo.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- the run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gaussian", "bernoulli"])
def finished(request, tmp_path_factory, one_thread):
    """A short run, the Gaussian's in a process of its own: (folder, results, stdout, stderr)."""
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    options = [*SMALL, "--likelihood", request.param, "--out", str(out)]
    if request.param == "gaussian":
        command = [sys.executable, "-m", "elbo_ext.demo", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
        code, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = demo.main(options)
        printed, errors = stdout.getvalue(), stderr.getvalue()
    assert code == 0, errors
    return out, json.loads((out / "results.json").read_text()), printed, errors


def test_files(finished):
    out, _, _, errors = finished
    assert sorted(os.listdir(out)) == FILES and os.listdir(out.parent) == ["out"]
    for name in FILES[:2] + FILES[3:]:
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert "Traceback" not in errors and "log-likelihood" in errors  # the progress bar


def test_training_improves_the_test_elbo(finished):
    """88 steps gain 11 nats and more with either likelihood; 5 leave room for another random stream."""
    _, results, _, _ = finished
    assert results["test"]["elbo"] > results["untrained"]["test"]["elbo"] + 5
    losses = results["history"]["fused_losses"]
    assert len(losses) == 4 * (1438 // 64) and np.mean(losses[-22:]) < np.mean(losses[:22]) - 5


def test_importance_weighted_estimate_is_not_below_the_elbo(finished):
    _, results, _, _ = finished
    test = results["test"]
    assert test["num_samples"] == 60
    assert test["log_px"] >= test["elbo"]
    assert abs(test["kl_monte_carlo"] - test["kl"]) < 5 * test["kl_monte_carlo_error"]


def test_fused_and_reference_curves_agree(finished):
    _, results, _, _ = finished
    fused, plain = (np.array(results["history"][f"{name}_losses"]) for name in ("fused", "reference"))
    difference = np.abs(fused - plain) / np.maximum(np.abs(plain), 1)
    compared = results["fused_against_reference"]
    assert compared["steps"] == compared["all_steps"] == len(fused) == len(plain)
    assert compared["largest_relative_difference"] == pytest.approx(difference.max()) and compared["agrees"]
    assert difference.max() <= 1e-4


def test_results_are_consistent(finished):
    out, results, printed, _ = finished
    entries = [results[key] for key in ("train", "test")] + list(results["untrained"].values())
    for entry in entries + results["history"]["fused"] + results["history"]["reference"]:
        assert entry["elbo"] == pytest.approx(entry["log_likelihood"] - entry["kl"], abs=1e-4)
        assert entry["kl"] >= 0
    for part in ("loss_part_of_a_step", "whole_training_step"):
        times = results[part]
        assert times["speedup"] == pytest.approx(times["eager"]["median_us"] / times["fused"]["median_us"])
        assert all(0 < times[name]["p10_us"] <= times[name]["median_us"] for name in ("fused", "eager"))
    assert results["data"]["train_images"] == 1438 and results["data"]["test_images"] == 359
    assert results["options"]["epochs"] == 4 and results["options"]["out"] == str(out)
    assert results["versions"]["torch"] == torch.__version__
    assert all(results["checks"].values())
    assert (results["recon_logvar"] is None) == (results["options"]["likelihood"] == "bernoulli")
    for number in ("elbo", "log_likelihood", "kl", "log_px"):
        assert f"{results['test'][number]:.2f}" in printed
    assert f"{results['loss_part_of_a_step']['eager']['median_us']:.0f} us" in printed


def test_own_data_and_an_existing_folder(tmp_path, capsys):
    """Colour images with labels next to them; other files in the folder stay, old results are replaced."""
    images = np.random.default_rng(0).integers(0, 256, (60, 6, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(60))
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "results.json").write_text("old")
    options = ["--epochs", "2", "--batch-size", "7", "--hidden", "8", "--latent", "2", "--iw-samples", "3"]
    code, printed, _ = run_main(
        capsys, "--data", str(tmp_path / "x.npz"), *options, "--compare-epochs", "0", "--out", str(out)
    )
    assert code == 0
    assert "48 training and 12 test images of 6 x 5 x 3" in printed and "divided by 255" in printed
    assert "against the reference" not in printed
    assert sorted(os.listdir(out)) == sorted([*FILES, "notes.txt"])
    assert (out / "notes.txt").read_text() == "mine"
    results = json.loads((out / "results.json").read_text())
    assert results["history"]["reference_losses"] == [] and results["data"]["shape"] == [6, 5, 3]


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_random_state_alone():
    train_data, _ = split(load_images(), 64, seed=0)
    losses = {}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        with vae.seeded(train_data.device, seed):
            model = vae.VAE(train_data, 16, 4, "gaussian")
        history = vae.train(model, train_data, elbo_ext, epochs=1, batch_size=64, learning_rate=1e-3, seed=seed)
        losses[name] = history.losses
    assert losses["first"] == losses["again"] != losses["other"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_hand_written_formula_computes_the_same(likelihood):
    """What the kernels are timed against is the same work: equal values for equal z."""
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(9, 4, generator=generator), torch.randn(9, 4, generator=generator)
    recon, x = torch.randn(9, 30, generator=generator), torch.rand(9, 30, generator=generator)
    more = {"recon_logvar": torch.tensor(-1.5)} if likelihood == "gaussian" else {}
    _, kl = vae.eager_rsample_kl(mu, logvar)
    eager = vae.eager_elbo_loss(recon, x, kl=kl, likelihood=likelihood, **more)
    expected = reference.elbo_loss(recon, x, mu, logvar, likelihood=likelihood, **more)
    torch.testing.assert_close(tuple(eager), tuple(expected))


def test_importance_weighting_is_exact_for_a_linear_model():
    """With a linear decoder p(x) is Gaussian in closed form: the estimate closes in on it from the ELBO."""
    torch.manual_seed(0)
    latent, pixels = 2, 5
    x = torch.randn(40, pixels)
    model = vae.VAE(x, 8, latent, "gaussian")
    model.decoder = torch.nn.Linear(latent, pixels)
    model.center, model.scale = torch.tensor(0.0), torch.tensor(1.0)
    with torch.no_grad():
        model.recon_logvar.fill_(0.3)
        weight, bias = model.decoder.weight.double(), model.decoder.bias.double()
    covariance = weight @ weight.T + math.exp(0.3) * torch.eye(pixels, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x.double()).mean().item()
    bounds = [vae.evaluate(model, x, elbo_ext, num_samples=count, seed=3) for count in (1, 10, 20_000)]
    assert bounds[0]["log_px"] < bounds[1]["log_px"] + 0.05 and bounds[0]["elbo"] < exact
    assert bounds[2]["log_px"] == pytest.approx(exact, abs=0.01)


def test_relative_differences_near_zero():
    difference = vae.relative_differences([100.01, 1e-9, 5.0, 7.0], [100.0, 0.0, 5.0])
    np.testing.assert_allclose(difference, [1e-4, 1e-9, 0], atol=1e-12)


# --- how it fails -------------------------------------------------------------------------------------------


def assert_one_sentence(code: int, printed: str, error: str, message: str) -> None:
    assert code == 2 and printed == ""
    assert message in error and error.startswith("elbo_ext.demo: error: ")
    assert error.endswith(".\n") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number of 1 or more"),
        (["--epochs", "2.5"], "argument --epochs: '2.5' is not a whole number of 1 or more"),
        (["--latent", "-1"], "argument --latent: '-1' is not a whole number of 1 or more"),
        (["--hidden", "many"], "argument --hidden: 'many' is not a whole number of 1 or more"),
        (["--batch-size", "0"], "argument --batch-size: '0' is not"),
        (["--threads", "0"], "argument --threads: '0' is not"),
        (["--threads", "1000000"], "--threads 1000000 is more than this machine's"),
        (["--iw-samples", "0"], "argument --iw-samples: '0' is not"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number of 0 or more"),
        (["--seed", "99999999999999999999"], "argument --seed: '99999999999999999999' is not"),
        (["--learning-rate", "0"], "argument --learning-rate: '0' is not a finite number above 0"),
        (["--learning-rate", "nan"], "argument --learning-rate: 'nan' is not a finite number above 0"),
        (["--likelihood", "poisson"], "argument --likelihood: invalid choice: 'poisson'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--device", "gpu"], "--device 'gpu' is not a device; use cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device 'meta' is not supported; use cpu, cuda or cuda:N"),
        (["--batch-size", "1500"], "holds 1797 images, but batches of 1500 need at least 1875"),
        (["--data", "missing.npy"], "cannot read 'missing.npy': No such file or directory"),
        (["--hidden", "100000000000"], "there is not enough memory for this model and data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option(capsys, options, message):
    code, printed, error = run_main(capsys, *options)
    assert_one_sentence(code, printed, error, message)
    assert os.listdir() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_no_cuda(capsys):
    assert_one_sentence(*run_main(capsys, "--device", "cuda"), "sees no CUDA GPU")


@pytest.mark.parametrize(
    "array, options, message",
    [
        (np.full((99, 4), np.nan), [], "holds 396 values that are NaN, infinite or too large"),
        (
            np.linspace(0, 2, 400).reshape(100, 4),
            ["--likelihood", "bernoulli"],
            "run from 0 to 2; use --likelihood",
        ),
        (np.zeros((0, 4)), [], "there is no image in it"),
        (np.ones((100, 4)), [], "there is nothing to learn"),
        (np.zeros((10, 4)), [], "holds 10 images, but batches of 64 need at least 80"),
    ],
    ids=["nan", "bernoulli", "empty", "constant", "few"],
)
def test_bad_data(tmp_path, capsys, array, options, message):
    np.save(tmp_path / "x.npy", array)
    assert_one_sentence(*run_main(capsys, "--data", str(tmp_path / "x.npy"), *options), message)
    assert os.listdir() == []


def test_bad_out(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert_one_sentence(*run_main(capsys, "--out", str(tmp_path / "file")), "is not a folder")
    assert_one_sentence(*run_main(capsys, "--out", str(tmp_path / "file" / "x")), "cannot be written: Not a directory")
    assert_one_sentence(*run_main(capsys, "--out", ""), "--out '' is not a folder")
    assert_one_sentence(*run_main(capsys, "--out", "x" * 300), "cannot be written: File name too long")
    (tmp_path / "out" / "samples.png").mkdir(parents=True)
    assert_one_sentence(*run_main(capsys, "--out", str(tmp_path / "out")), "samples.png in it is a folder")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir() == [] and os.listdir(tmp_path / "out") == ["samples.png"]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_read_only_out(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    for out in (tmp_path / "locked", tmp_path / "locked" / "x"):
        assert_one_sentence(*run_main(capsys, "--out", str(out)), "cannot be written: Permission denied")


def test_command_exit_code(tmp_path):
    """The same through a real process: nothing but the sentence on stderr."""
    (tmp_path / "digits.npy").write_text("not an array")
    command = [sys.executable, "-m", "elbo_ext.demo", "--data", str(tmp_path / "digits.npy"), "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert_one_sentence(done.returncode, done.stdout, done.stderr, "is none of .npy, .npz and MNIST's idx")
    assert os.listdir() == []


def test_diverged_training(tmp_path, capsys):
    code, _, error = run_main(capsys, *SMALL, "--learning-rate", "1e30", "--out", str(tmp_path / "out"))
    assert code == 2 and not (tmp_path / "out").exists()
    last = error.splitlines()[-1]
    assert last.startswith("elbo_ext.demo: error: the training diverged in epoch 1:") and "Traceback" not in error


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """The folder vanishes between the check and the end, and a file has its name."""
    output = OutputFolder(str(tmp_path / "a" / "out"))
    (tmp_path / "a").write_text("mine")
    with pytest.raises(vae.DemoError, match="cannot be written"):
        output.write({"results.json": b"{}"})
    assert (tmp_path / "a").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a", "cwd"]


@pytest.mark.parametrize("exit_code, failure", [(1, None), (130, KeyboardInterrupt())])
def test_failed_check_and_interrupt(capsys, monkeypatch, exit_code, failure):
    def run(options):
        if failure:
            raise failure
        return {"checks": {"fused_agrees_with_reference": False, "log_px_not_below_elbo": True}}

    monkeypatch.setattr(training, "run", run)
    code, _, error = run_main(capsys)
    assert code == exit_code and error.count("\n") == 1
    assert ("failed: fused agrees with reference" in error) or ("interrupted" in error)
