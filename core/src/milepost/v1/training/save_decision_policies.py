"""Which steps of a training are saved, by the names of the reference, and a bound on what saving may cost.

Decides nothing: the policies are those of `milepost.decisions`, for both faces.
"""

from __future__ import annotations

from milepost.decisions import (
    AnySavePolicy,
    BoundedOverheadPolicy,
    ContinuousCheckpointingPolicy,
    DecisionContext,
    FixedIntervalPolicy,
    InitialSavePolicy,
    PreemptionCheckpointingPolicy,
    SaveCosts,
    SaveDecisionPolicy,
    SpecificStepsPolicy,
)

__all__ = [
    "AnySavePolicy",
    "BoundedOverheadPolicy",
    "ContinuousCheckpointingPolicy",
    "DecisionContext",
    "FixedIntervalPolicy",
    "InitialSavePolicy",
    "PreemptionCheckpointingPolicy",
    "SaveCosts",
    "SaveDecisionPolicy",
    "SpecificStepsPolicy",
]
