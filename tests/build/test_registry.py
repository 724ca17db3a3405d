"""The registry and the C++ terms say the same of the likelihoods."""

import inspect

import elbo_ext
from elbo_ext import _C, likelihoods, reference
from elbo_ext.likelihoods import LIKELIHOODS, TERMS


def test_terms() -> None:
    """Number, inputs, and the forms of each input: Python's registry against the constants of csrc/terms."""
    declared = {name: (term.number, [list(forms) for forms in term.numbered_forms]) for name, term in TERMS.items()}
    assert declared == {name: (number, inputs) for name, (number, inputs) in _C.terms().items()}


def test_every_likelihood_has_its_functions() -> None:
    """Under the names of its forms, in both modules, and its entry under its name in elbo_ext.likelihoods."""
    for name, likelihood in LIKELIHOODS.items():
        forms = {form for forms in (*likelihood.forms_of_inputs, *likelihood.floors_of_inputs) for form in forms}
        assert set(likelihood.numbers) == set(likelihood.with_numbers({})) <= set(likelihood.inputs)
        forms = forms - set(likelihood.numbers) | set(likelihood.options)
        for module in (elbo_ext, reference):
            assert f"{name}_log_prob" in module.__all__
        parameters = inspect.signature(getattr(elbo_ext, f"{name}_log_prob")).parameters
        assert forms | {"weight", "batch_dims", "reduction"} == set(parameters)
        assert getattr(likelihoods, likelihood.class_name) is likelihood
        assert likelihood.class_name in likelihoods.__all__
        assert likelihood.decoder in likelihood.inputs
        assert len(likelihood.masked) == len(likelihood.inputs)
