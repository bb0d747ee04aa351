"""What in a run's statistics a person should be called for."""

from __future__ import annotations

from collections.abc import Mapping

from stylepipe.training.engine import IN_A_ROW

# As shares of the data's diversity. Runs on faces that go well stay above 0.4 once they are there, and reach 0.7 to 1;
# collapsed ones fall below 0.1 (docs/results.md). Between the two marks an alarm neither begins nor ends.
DIVERSE, COLLAPSED = 0.4, 0.25
PATIENCE_KIMG = 50  # a generator that begins with all images alike has so long to become diverse


class Alarms:
    """Looks at the statistics of one tick after the other; an alarm is raised when its cause begins, and then is kept.

    Args:
        state: of the alarms where the run goes on, as `state` gave it; None or empty for a new run.
    """

    def __init__(self, state: Mapping[str, bool] | None = None) -> None:
        self._diverse, self._collapsed, self._skipping = False, False, False
        for name, value in (state or {}).items():
            setattr(self, f"_{name}", bool(value))

    @property
    def state(self) -> dict[str, bool]:
        """What resuming needs."""
        return {"diverse": self._diverse, "collapsed": self._collapsed, "skipping": self._skipping}

    def look(self, stats: Mapping[str, float]) -> dict[str, str]:
        """Return the alarms that begin with this tick: what happened, by name."""
        found = {"not_finite": self._not_finite(stats), "mode_collapse": self._mode_collapse(stats)}
        return {name: text for name, text in found.items() if text}

    def _not_finite(self, stats: Mapping[str, float]) -> str:
        shares = {name.split("/", 1)[1].removesuffix("/not_finite"): share for name, share in stats.items()
                  if name.endswith("/not_finite") and share > 0}  # fmt: skip
        began, self._skipping = bool(shares) and not self._skipping, bool(shares)
        if not began:
            return ""
        which = ", ".join(f"{share:.1%} of {phase}" for phase, share in shares.items())
        return f"updates with inf or NaN gradients were skipped: {which} since the last log line"

    def _mode_collapse(self, stats: Mapping[str, float]) -> str:
        if "Diversity/pairwise" not in stats:
            return ""
        pairwise, nearest = stats["Diversity/pairwise"], stats["Diversity/nearest"]
        lowest = min(pairwise, nearest)
        self._diverse = self._diverse or lowest > DIVERSE or stats["Progress/kimg"] > PATIENCE_KIMG
        if lowest > DIVERSE:
            self._collapsed = False
        if self._collapsed or not self._diverse or lowest >= COLLAPSED:
            return ""
        self._collapsed = True
        return (
            f"mode collapse: generated images at fixed latents differ from one another {pairwise:.2f} times as much as "
            f"the data's, and from the one most like them {nearest:.2f} times; look at the newest grid, and go on from "
            f"an older state with stronger regularization or a lower learning rate"
        )


def diverged(stats: Mapping[str, float], updates: int) -> str:
    """Return what has diverged, if the last `updates` updates of a phase were all skipped; else nothing."""
    for name, count in stats.items():
        if name.endswith(f"/{IN_A_ROW}") and count >= updates:
            phase = name.split("/", 1)[1].removesuffix(f"/{IN_A_ROW}")
            return f"the last {count:.0f} updates of {phase} had inf or NaN gradients, so none of them was made"
    return ""
