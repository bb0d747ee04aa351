"""How often a training that diverged was rolled back, and with what penalties it goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stylepipe.training.phase import Recipe

ROLLBACK_FACTOR = 2.0  # of penalties, each time
MAX_ROLLBACKS = 4  # in a row


class Rollbacks:
    """Counts the rollbacks of a run, and has its recipe regularize accordingly.

    Args:
        recipe: what is trained.
        history: what the state to go on from says of it; empty where the count begins.

    Attributes:
        count: in all.
        penalties: the recipe's penalties now, for people.
    """

    def __init__(self, recipe: Recipe, history: Mapping[str, Any]) -> None:
        self._recipe = recipe
        self.count: int = history.get("rollbacks", 0)
        self._in_a_row: int = history.get("rollbacks_in_a_row", 0)
        self.penalties = recipe.regularize(ROLLBACK_FACTOR**self.count)

    @property
    def history(self) -> dict[str, int]:
        """What states are to say of it."""
        return {"rollbacks": self.count, "rollbacks_in_a_row": self._in_a_row}

    @property
    def exhausted(self) -> bool:
        """Whether to give up."""
        return self._in_a_row == MAX_ROLLBACKS

    def add(self) -> None:
        """Count one more; the penalties rise."""
        self.count += 1
        self._in_a_row += 1
        self.penalties = self._recipe.regularize(ROLLBACK_FACTOR**self.count)

    def end_the_row(self) -> None:
        """Note that training has gone well since."""
        self._in_a_row = 0

    def way_out(self, out: Path, healthy: Path | None, *, stops: bool) -> str:
        """Return what the user can do about a divergence that ends the training.

        Args:
            out: the run's folder.
            healthy: the state to go on from, if there is one.
            stops: no rollback was asked for.
        """
        again = f"start the same command with --out {out}"
        if healthy is None:
            way = "no healthy state was saved before; start anew in another --out"
        elif self.exhausted:
            way = f"it was rolled back {MAX_ROLLBACKS} times in a row, up to {self.penalties}; {again}"
        else:
            way = f"{again} to go on from {healthy.name}"
        remedies = ["a lower --optim.g-lr and --optim.d-lr", "stronger regularization"]
        if stops:
            remedies.append("--on-divergence rollback")
        return f"{way}, with {', or '.join(remedies)}"
