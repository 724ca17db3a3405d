"""What the package returns, and its schedules, in exported programs that are saved, in checkpoints, and rebuilt by torch.

Importing this registers them: a NamedTuple with pytree, under a name that the file keeps (torch.export.save), and all of
them as safe to load (torch.load(..., weights_only=True)).
"""

import functools
from typing import Any

import torch
from torch.utils import _pytree

from . import bounds, diagnostics
from .reference import ELBO


def _takes_an_iterable(named_tuple: Any) -> None:
    """Tensor.__torch_function__ makes results of a subclass of tensors that subclass, and those in a tuple by
    ``type(results)(iterable)``, which torch's own named tuples take."""
    by_fields = named_tuple.__new__

    @functools.wraps(by_fields)
    def by_fields_or_iterable(cls: Any, *fields: Any, **named: Any) -> Any:
        return cls._make(fields[0]) if len(fields) == 1 and not named else by_fields(cls, *fields, **named)

    named_tuple.__new__ = by_fields_or_iterable


# Private in torch 2.11, 2.13 and 2.15, and what its own NamedTuples are registered with.
for _class in (ELBO, diagnostics.AggregatePosterior, diagnostics.AmortizationGap, diagnostics.LogEvidence):
    _pytree._register_namedtuple(_class, serialized_type_name=f"elbo_ext.{_class.__name__}")
    _takes_an_iterable(_class)

torch.export.register_dataclass(diagnostics.CollapseReport, serialized_type_name="elbo_ext.CollapseReport")

torch.serialization.add_safe_globals([
    ELBO,
    diagnostics.AggregatePosterior,
    diagnostics.AmortizationGap,
    diagnostics.CollapseReport,
    diagnostics.LogEvidence,
    bounds.CosineSchedule,
    bounds.CyclicalSchedule,
    bounds.LinearSchedule,
    bounds.LogisticSchedule,
])  # fmt: skip
