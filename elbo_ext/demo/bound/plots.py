"""The figures of python -m elbo_ext.demo bound: one per statement, from a `Finding`, as PNG bytes.

Each is titled with what was measured. Bands and bars are two standard errors of the draws of z, for the data given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import FUSED, REFERENCE, STYLE, TEST, png
from .models import ZERO_VARIANCE, Finding

GREEN, PURPLE, GREY, GOLD = "#2e8b57", "#7b4fa3", "#8a8a8a", "#c9a227"
ESTIMATOR_STYLES: dict[str, dict[str, Any]] = {
    "score function": {"color": REFERENCE, "marker": "v"},
    "score function, baseline": {"color": GREY, "marker": "^"},
    "SGVB A": {"color": FUSED, "marker": "o"},
    "SGVB B": {"color": GREEN, "marker": "s"},
    "STL": {"color": TEST, "marker": "D"},
    "IWAE": {"color": PURPLE, "marker": "P"},
    "DReG": {"color": GOLD, "marker": "X"},
}


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _title(figure: Figure, finding: Finding, text: str) -> bytes:
    """The PNG, titled with its finding; a statement that does not hold says so."""
    failed = [check.statement for check in finding.checks.values() if not check.holds]
    text = f"DOES NOT HOLD: {'; '.join(failed)}" if failed else text
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return png(figure)


def _counts(axes: Axes, counts: Sequence[int], label: str = "samples K") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts[:: 1 + len(counts) // 7], labels=[str(k) for k in counts[:: 1 + len(counts) // 7]])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _band(axes: Axes, x: Sequence[float], value: Sequence[float], error: Sequence[float], **style: Any) -> None:
    middle, width = np.array(value), 2 * np.array(error)
    axes.plot(x, middle, **style)
    axes.fill_between(x, middle - width, middle + width, color=style["color"], alpha=0.2, lw=0)


# --- (a) ----------------------------------------------------------------------------------------------------


def bound_over_counts(finding: Finding) -> bytes:
    """The bounds of both models over K, and how far IWAE's is from ln p(x) next to the prediction."""
    import matplotlib

    numbers = finding.numbers
    counts, linear, vae = numbers["count"], numbers["linear_gaussian"], numbers["vae"]
    with matplotlib.rc_context(STYLE):
        figure = _figure(14, 4.4)
        axes = figure.subplots(1, 3)
        for panel, entry, title in (
            (axes[0], linear, "Linear Gaussian: ELBO, ln p(x) exact"),
            (axes[1], vae, "VAE on digits: ln p(x) from many samples"),
        ):
            log_px, elbo = entry["log_px"], entry["elbo"]
            for level, error, color, label in (
                (log_px, entry["log_px_error"], REFERENCE, "ln p(x)"),
                (elbo, entry["elbo_error"], TEST, "ELBO"),
            ):
                panel.axhspan(level - 2 * error, level + 2 * error, color=color, alpha=0.2, lw=0)
                panel.axhline(level, color=color, lw=1.4, ls="--", label=label)
            _band(panel, counts, entry["iwae"], entry["iwae_error"], color=FUSED, marker="o", ms=4, label="IWAE(K)")
            _counts(panel, counts)
            panel.set(title=title, ylabel="nats per example")
            panel.legend(loc="center right")
        axes[2].errorbar(
            counts, linear["gap"], 2 * np.array(linear["gap_error"]), color=FUSED, fmt="o", ms=4, label="measured"
        )
        axes[2].plot(
            counts, linear["predicted_gap"], color=REFERENCE, lw=1.2, ls="--", label="Var[w] / (2 K p(x)²), exact"
        )
        axes[2].set_yscale("log")
        _counts(axes[2], counts)
        axes[2].set(title="Linear Gaussian: ln p(x) - IWAE(K)", ylabel="nats per example")
        axes[2].legend(loc="lower left")
        return _title(
            figure,
            finding,
            f"IWAE(K) rises from the ELBO to ln p(x): the VAE gains {vae['iwae'][-1] - vae['elbo']:.2f} of "
            f"{vae['log_px'] - vae['elbo']:.2f} nats by K = {counts[-1]}, and what is left falls as 1 / K",
        )


# --- (b) ----------------------------------------------------------------------------------------------------


def gradient_variance(finding: Finding) -> bytes:
    """Variance of each estimator's gradient over K and over sigma, and the signal-to-noise ratio over K."""
    import matplotlib

    numbers = finding.numbers
    counts, ratios = numbers["count"], numbers["sigma_ratio"]
    distance, ratio = numbers["distance_over_count"], numbers["sigma_ratio_over_count"]
    with matplotlib.rc_context(STYLE):
        figure = _figure(15, 8.2)
        grid = figure.subplots(2, 3, width_ratios=(1, 1.15, 1))
        for row, parameter in zip(grid, ("mu", "logvar"), strict=True):
            over_count, over_sigma = numbers[parameter]["over_count"], numbers[parameter]["over_sigma"]
            seen = [v for entry in over_sigma.values() for v in entry["variance"] if v > ZERO_VARIANCE]
            floor = min(seen) / 20
            for name, style in ESTIMATOR_STYLES.items():
                look = {**style, "ms": 4.5, "lw": 1.4}
                entry = over_count[name]
                error = 2 * np.array(entry["variance_error"])
                row[0].errorbar(entry["count"], entry["variance"], error, label=name, **look)
                row[2].errorbar(entry["count"], entry["snr"], 2 * np.array(entry["snr_error"]), **look)
                values = np.maximum(over_sigma[name]["variance"], floor)
                row[1].errorbar(ratios, values, 2 * np.array(over_sigma[name]["variance_error"]), **look)
            for name, predicted in numbers[parameter]["predicted_over_count"].items():
                look = {"color": REFERENCE, "lw": 0.8, "ls": ":", "zorder": 5}
                row[0].plot(counts, predicted, label="closed form (A, B, STL)" if name == "STL" else None, **look)
                row[1].plot(ratios, np.maximum(numbers[parameter]["predicted_over_sigma"][name], floor), **look)
            row[1].axvline(1, color=REFERENCE, lw=0.8, ls="--")
            row[1].annotate("zero", (1, floor), (6, 3), textcoords="offset points")
            label = f"variance of the gradient by {parameter} (nats²)"
            title = f"Mean off by {distance:g} sigma of the posterior, sigma x {ratio:g}"
            row[0].set(yscale="log", ylabel=label, title=title)
            count = numbers["count_over_sigma"]
            row[1].set(yscale="log", ylabel=label, title=f"The posterior's mean, K = {count}")
            row[1].set_xscale("log", base=2)
            row[1].set_xticks((0.25, 0.5, 1, 2, 4), labels=("1/4", "1/2", "1", "2", "4"))
            row[1].set_xlabel("sigma of q / sigma of the posterior")
            row[2].set(
                yscale="log", ylabel=f"|mean| / standard deviation, by {parameter}", title="Signal-to-noise ratio"
            )
            low = min(v for entry in over_count.values() for v in entry["snr"] if v > 0)
            row[2].set_ylim(bottom=low / 2)
            _counts(row[0], counts)
            _counts(row[2], counts)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return _title(
            figure,
            finding,
            "Variance of the gradient: score function > with baseline > reparameterized off the posterior, none at it "
            "for STL, DReG and the baseline;\n"
            "with K the signal-to-noise ratio of the gradient falls for IWAE and rises for DReG",
        )


# --- (c) ----------------------------------------------------------------------------------------------------


def gap_over_training(finding: Finding) -> bytes:
    """ELBO and gap over the training of q, diagonal and full, and over that of the VAE."""
    import matplotlib

    linear, vae = finding.numbers["linear_gaussian"], finding.numbers["vae"]
    floor = linear["diagonal_floor"]
    with matplotlib.rc_context(STYLE):
        figure = _figure(15, 4.4)
        left, middle, right = figure.subplots(1, 3)
        for name, color, label in (("diagonal", TEST, "diagonal q"), ("full", FUSED, "full covariance")):
            steps = range(1, len(linear[name]["elbo"]) + 1)
            left.plot(steps, linear[name]["elbo"], color=color, lw=1.6, label=f"ELBO, {label}")
            middle.plot(steps, linear[name]["gap"], color=color, lw=1.6, label=label)
        left.axhline(linear["log_px"], color=REFERENCE, lw=1.4, ls="--", label="ln p(x)")
        end = [*linear["diagonal"]["elbo"], *linear["full"]["elbo"]]
        spread = linear["log_px"] - np.quantile(end, 0.1)
        left.set(
            title="Linear Gaussian: exact ELBO",
            xlabel="step of Adam",
            ylabel="nats per example",
            ylim=(linear["log_px"] - 2 * spread, linear["log_px"] + 0.2 * spread),
        )
        left.legend(loc="lower right")
        middle.axhline(floor, color=REFERENCE, lw=1.2, ls=":", label=f"best diagonal q: {floor:.3f}")
        middle.set(
            yscale="log",
            ylim=(floor / 1e4, None),
            title="ln p(x) - ELBO = KL(q || p(z|x))",
            xlabel="step of Adam",
            ylabel="nats per example",
        )
        middle.legend(loc="upper right")
        epochs = vae["epoch"]
        _band(right, epochs, vae["log_px"], vae["log_px_error"], color=REFERENCE, marker="o", ms=3, label="ln p(x)")
        _band(right, epochs, vae["elbo"], vae["elbo_error"], color=FUSED, marker="o", ms=3, label="ELBO")
        right.fill_between(epochs, vae["elbo"], vae["log_px"], color=FUSED, alpha=0.15, lw=0)
        low = min(vae["elbo"][1:])
        right.set(
            title="VAE on digits, test images",
            xlabel="epoch",
            ylabel="nats per image",
            ylim=(low - 0.5, max(vae["log_px"]) + 0.5),
        )
        right.legend(loc="upper left")
        inset = right.inset_axes((0.5, 0.14, 0.47, 0.38))
        inset.errorbar(epochs, vae["gap"], 2 * np.array(vae["gap_error"]), color=TEST, marker="o", ms=2.5, lw=1.2)
        inset.set_title("gap (nats)", fontsize=9)
        inset.set_ylim(bottom=0)
        inset.tick_params(labelsize=8)
        return _title(
            figure,
            finding,
            f"A diagonal q keeps a gap of {floor:.3f} nats, a full covariance closes it; that of the VAE is "
            f"{vae['gap'][-1]:.2f} nats after training, {vae['gap'][0]:.2f} before",
        )


# --- (d) ----------------------------------------------------------------------------------------------------


def amortization(finding: Finding) -> bytes:
    """The two parts of the gap, stacked, for training and test images."""
    import matplotlib

    numbers = finding.numbers
    with matplotlib.rc_context(STYLE):
        figure = _figure(12, 3.4)
        levels, parts = figure.subplots(1, 2)
        for axes in (levels, parts):
            axes.grid(axis="y", visible=False)
            axes.set_axisbelow(True)
            axes.set_yticks(range(len(numbers)), labels=[f"{name} images" for name in numbers])
            axes.set_ylim(len(numbers) - 0.4, -0.6)
        for row, entry in enumerate(numbers.values()):
            for name, color, label in (
                ("elbo_amortized", FUSED, "ELBO, the encoder's q"),
                ("elbo_refined", TEST, "ELBO, q refined for each image"),
                ("log_px", REFERENCE, "ln p(x)"),
            ):
                error = 2 * entry[f"{name}_error"]
                look = {"color": color, "fmt": "o", "ms": 7, "capsize": 3}
                levels.errorbar(entry[name], row, xerr=error, label=None if row else label, **look)
            left = 0.0
            for name, color, label in (
                ("amortization_gap", FUSED, "amortization gap: the encoder"),
                ("approximation_gap", TEST, "approximation gap: the family of q"),
            ):
                gap, error = entry[name], entry[f"{name}_error"]
                look = {"color": color, "alpha": 0.75, "height": 0.5, "error_kw": {"capsize": 3}}
                parts.barh(row, gap, left=left, xerr=2 * error, label=None if row else label, **look)
                parts.text(left + gap / 2, row, f"{gap:.3f}", ha="center", va="center", color="white", weight="bold")
                left += gap
        levels.set(title="The bounds, VAE on digits", xlabel="nats per image")
        parts.set(title="ln p(x) - ELBO in its two parts", xlabel="nats per image")
        for axes in (levels, parts):
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=9)
        shares = [
            f"{entry['amortization_gap'] / (entry['log_px'] - entry['elbo_amortized']):.0%} on {name} images"
            for name, entry in numbers.items()
        ]
        return _title(
            figure, finding, f"What one encoder for all images costs, as part of the gap: {', '.join(shares)}"
        )


# --- (e) ----------------------------------------------------------------------------------------------------


def collapse(finding: Finding) -> bytes:
    """KL of each dimension, the number that is active, and what that costs, over beta."""
    import matplotlib

    rows, latent = finding.numbers["betas"], finding.numbers["latent"]
    betas = [row["beta"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = _figure(15, 4.6)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 0.9, 1))
        image = left.imshow(
            np.log10(np.maximum([row["kl_per_dimension"] for row in rows], 1e-4)).T,
            aspect="auto",
            cmap="Blues",
            vmin=-4,
            vmax=np.log10(max(row["kl_per_dimension"][0] for row in rows)),
        )
        left.grid(visible=False)
        left.set_xticks(range(len(betas)), labels=[f"{beta:g}" for beta in betas])
        left.set_yticks(range(0, latent, 3), labels=[str(n + 1) for n in range(0, latent, 3)])
        left.set(title="KL of each dimension of z (nats)", xlabel="beta", ylabel="dimension, sorted by its KL")
        bar = figure.colorbar(image, ax=left, ticks=range(-4, 1))
        bar.ax.set_yticklabels(["< 0.0001", "0.001", "0.01", "0.1", "1"])
        middle.plot(betas, [row["active"] for row in rows], color=FUSED, marker="o", label="active: Var E[z] > 0.01")
        middle.plot(
            betas, [row["collapsed"] for row in rows], color=TEST, marker="s", label="collapsed: KL < 0.01 for 99 %"
        )
        middle.set(title="Units of z", ylabel=f"dimensions, of {latent}", ylim=(-0.4, 1.35 * latent))
        middle.set_yticks(range(0, latent + 1, 2))
        middle.legend(loc="upper center")
        for name, color, marker, label in (
            ("kl", TEST, "s", "KL"),
            ("mutual_information", GREEN, "^", "mutual information, at most ln N"),
        ):
            right.plot(betas, [row[name] for row in rows], color=color, marker=marker, label=label)
        right.axhline(rows[0]["mutual_information_at_most"], color=GREEN, lw=1, ls=":")
        error = 2 * np.array([row["elbo_error"] for row in rows])
        right.errorbar(betas, [-row["elbo"] for row in rows], error, color=FUSED, marker="o", label="-ELBO")
        right.plot(betas, [-row["log_likelihood"] for row in rows], color=GREY, marker="v", label="-E[ln p(x|z)]")
        right.set(title="What it costs, test images", ylabel="nats per image")
        right.set_ylim(top=1.35 * right.get_ylim()[1])
        right.legend(loc="upper center", ncols=2, fontsize=9)
        for axes in (middle, right):
            axes.set_xscale("log")
            axes.set_xticks(betas[::2], labels=[f"{beta:g}" for beta in betas[::2]])
            axes.minorticks_off()
            axes.set_xlabel("beta")
        at_one = next(row for row in rows if row["beta"] == 1)
        return _title(
            figure,
            finding,
            f"Collapse: active units fall from {rows[0]['active']} at beta = {betas[0]:g} over {at_one['active']} at "
            f"beta = 1 to {rows[-1]['active']} at beta = {betas[-1]:g}, and the KL from {rows[0]['kl']:.1f} nats to "
            f"{rows[-1]['kl']:.1g}",
        )
