"""What the package returns, and its schedules, in exported programs that are saved and in checkpoints.

Importing this registers them: a NamedTuple with pytree, under a name that the file keeps (torch.export.save), and all of
them as safe to load (torch.load(..., weights_only=True)).
"""

import torch
from torch.utils import _pytree

from . import bounds, diagnostics
from .reference import ELBO

# Private in torch 2.11, 2.13 and 2.15, and what its own NamedTuples are registered with.
for _class in (ELBO, diagnostics.AggregatePosterior, diagnostics.AmortizationGap, diagnostics.LogEvidence):
    _pytree._register_namedtuple(_class, serialized_type_name=f"elbo_ext.{_class.__name__}")

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
