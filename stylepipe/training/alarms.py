"""What in a run's statistics a person should be called for."""

from __future__ import annotations

from collections.abc import Mapping

from stylepipe.training.engine import IN_A_ROW

# As shares of the data's diversity. Runs on faces that go well stay above 0.4 once they are there, and reach 0.7 to 1;
# collapsed ones fall below 0.1 (docs/results.md). Between the two marks an alarm neither begins nor ends.
DIVERSE, COLLAPSED = 0.4, 0.25
NOISE = 1.2  # more diverse than this is what has not begun to look like the data
PATIENCE_KIMG = 50  # a generator that begins with all images alike has so long to become diverse


class Alarms:
    """Looks at the statistics of one tick after the other; an alarm is raised when its cause begins, and then is kept.

    Args:
        state: of the alarms where the run goes on, as `state` gave it; None or empty for a new run.
    """

    def __init__(self, state: Mapping[str, bool] | None = None) -> None:
        state = state or {}
        self._diverse, self._collapsed = bool(state.get("diverse")), bool(state.get("collapsed"))
        self._skipping = bool(state.get("skipping"))

    @property
    def state(self) -> dict[str, bool]:
        """What resuming needs."""
        return {"diverse": self._diverse, "collapsed": self._collapsed, "skipping": self._skipping}

    def look(self, stats: Mapping[str, float]) -> dict[str, str]:
        """Return the alarms that begin with this tick: what happened, by name."""
        found = {"not_finite": self._not_finite(stats), "mode_collapse": self._mode_collapse(stats)}
        return {name: text for name, text in found.items() if text}

    def _not_finite(self, stats: Mapping[str, float]) -> str:
        shares = {phase: share for phase, share in _of_phases(stats, "not_finite") if share > 0}
        began = bool(shares) and not self._skipping
        # A lazy phase that fails has not always run since the last tick: then its count says that it is not over.
        self._skipping = bool(shares) or any(count > 0 for _, count in _of_phases(stats, IN_A_ROW))
        if not began:
            return ""
        which = ", ".join(f"{share:.1%} of {phase}" for phase, share in shares.items())
        return (
            f"updates with inf or NaN gradients were skipped: {which} since the last log line; one now and then "
            f"does no harm; if they stay, lower the learning rates, strengthen regularization, or try --precision fp32"
        )

    def _mode_collapse(self, stats: Mapping[str, float]) -> str:
        if "Diversity/pairwise" not in stats:
            return ""
        pairwise, nearest = stats["Diversity/pairwise"], stats["Diversity/nearest"]
        lowest = min(pairwise, nearest)
        self._diverse = self._diverse or DIVERSE < lowest < NOISE or stats["Progress/kimg"] > PATIENCE_KIMG
        if lowest > DIVERSE:
            self._collapsed = False
        if self._collapsed or not self._diverse or lowest >= COLLAPSED:
            return ""
        self._collapsed = True
        return (
            f"mode collapse: generated images at fixed latents differ from one another {pairwise:.2f} times as much as "
            f"the data's, and from the one most like them {nearest:.2f} times; look at the newest grid; to go on from "
            f"before, give --resume STATE with another --out, and stronger regularization or lower learning rates"
        )


def divergence_in(stats: Mapping[str, float], updates: int) -> str:
    """Return what has diverged, if the last `updates` updates of a phase were all skipped; else nothing."""
    for phase, count in _of_phases(stats, IN_A_ROW):
        if count >= updates:
            return f"the last {count:.0f} updates of {phase} had inf or NaN gradients, so none of them was made"
    return ""


def _of_phases(stats: Mapping[str, float], last: str) -> list[tuple[str, float]]:
    """Return (phase, value) of the statistics Gradient/<phase>/<last>."""
    return [
        (name.removeprefix("Gradient/").removesuffix(f"/{last}"), value)
        for name, value in stats.items()
        if name.startswith("Gradient/") and name.endswith(f"/{last}")
    ]
