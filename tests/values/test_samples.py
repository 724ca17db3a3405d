"""The table of samples: no case of the standard set is missing, and one row is enough to have it."""

from fnmatch import fnmatch

import pytest

from elbo_ext.likelihoods import LIKELIHOODS
from samples import DTYPES, LAYOUTS, REDUCTIONS, ROW_LENGTHS, SAMPLES, STANDARD, WEIGHTS, Case, differentiable, standard

# The prefix of a likelihood's samples is its name, but for the longest.
OF_ELEMENTS = [name for name, likelihood in LIKELIHOODS.items() if not likelihood.over_classes]
TERMS = [*(name.replace("zero_inflated_negative_binomial", "zinb") for name in OF_ELEMENTS), "kl"]
FUNCTIONS = {*TERMS, "rsample", "rsample_kl", "log_prob", "elbo"}
IDS = {sample.id for sample in SAMPLES}
# What they do without, being the slowest of all: loops and sums over rows are the same for every term.
WITHOUT = {
    "poisson": ("layout-all-*",),  # nothing would have a gradient
    "zinb": ("layout-all-*", "row-*[3-9]", "sum-*"),
    "student_t": ("layout-all-*", "row-*[3-9]", "sum-*"),
}


def missing(prefix: str, names: list[str]) -> list[str]:
    expected = [name for name in names if not any(fnmatch(name, pattern) for pattern in WITHOUT.get(prefix, ()))]
    return [name for name in expected if f"{prefix}-{name}" not in IDS]


@pytest.mark.parametrize("prefix", sorted(FUNCTIONS))
def test_every_function_has_the_cases_that_all_have(prefix: str) -> None:
    names = ["plain", "empty-batch", "empty-event", "1-dim-batch"]
    names += [*(f"layout-{name}" for name in LAYOUTS), *(f"row-{n}" for n in ROW_LENGTHS)]
    assert missing(prefix, names) == []


@pytest.mark.parametrize("prefix", TERMS)
def test_every_term_has_the_cases_of_its_options(prefix: str) -> None:
    names = [f"batch_dims-{dims}-{reduction}" for dims in range(4) for reduction in REDUCTIONS]
    names += [f"weight-{name}" for name in WEIGHTS] + [f"layout-all-{name}" for name in LAYOUTS]
    names += [f"sum-{n}" for n in ROW_LENGTHS] + ["crossed", "empty-elementwise", "0-dim"]
    assert missing(prefix, names) == []


def test_one_row_is_enough() -> None:
    """What a row without any option gives: nearly a hundred cases and more, of which some are for expensive tests."""

    def row(c: Case) -> dict:
        return dict(x=c.unit(), logits=c.normal())

    samples = standard("new", "bernoulli_log_prob", row)
    assert len({sample.id for sample in samples}) == len(samples) > 100
    assert 10 < sum(sample.core for sample in samples) < 40
    for sample in samples:
        for dtype in DTYPES:
            arguments = sample.make(dtype)
            assert differentiable(arguments)[:2] == ["x", "logits"]
            if not sample.id.startswith("new-mixed"):
                assert {arguments["x"].dtype, arguments["logits"].dtype} == {dtype}
    by_id = {sample.id: sample.make(DTYPES[0]) for sample in samples}
    assert by_id["new-layout-transposed"]["x"].stride() == (85, 255, 17, 1)
    assert by_id["new-mixed-float64-x"]["x"].dtype == DTYPES[1] != by_id["new-mixed-float64-x"]["logits"].dtype
    assert by_id["new-broadcast-logits-channel"]["logits"].shape == (3, 1, 1)


def test_a_group_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AssertionError, match="no group of cases {'layouts'}"):
        standard("new", "rsample", lambda c: dict(mu=c.normal(), **c.scale()), layouts=lambda c: {})


def test_ids_are_unique_within_the_standard_set() -> None:
    assert len({sample.id for sample in STANDARD}) == len(STANDARD)
