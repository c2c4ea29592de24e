"""The port through which candidates are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate


class Predictor(Protocol):
    """Predicts many candidates of one problem at once."""

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One prediction for each candidate, in order; a candidate that cannot run gets an infeasible prediction."""
        ...
