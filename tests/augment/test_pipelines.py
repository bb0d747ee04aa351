"""Pipelines by name, and strengths."""

from __future__ import annotations

import pytest

from stylepipe.augment.pipelines import NAMES, PIPELINES, Strengths, strengths_of
from stylepipe.config import AUGMENTATIONS, AugmentConfig
from stylepipe.errors import UserError


def on(strengths: Strengths) -> set[str]:
    return {name for name in NAMES if getattr(strengths, name) == 1}


def test_pipelines_are_the_papers() -> None:
    assert on(PIPELINES["blit"]) == {"xflip", "rotate90", "xint"}
    assert on(PIPELINES["bg"]) == on(PIPELINES["blit"]) | on(PIPELINES["geom"])
    assert on(PIPELINES["bgc"]) == set(NAMES) - {"imgfilter", "noise", "cutout"}
    assert on(PIPELINES["bgcf"]) - on(PIPELINES["bgc"]) == {"imgfilter"}
    assert on(PIPELINES["bgcfnc"]) == set(NAMES)
    for letter, kind in zip("bgcfnc", ("blit", "geom", "color", "filter", "noise", "cutout"), strict=True):
        assert kind.startswith(letter)
        assert on(PIPELINES[kind]) <= on(PIPELINES["bgcfnc"])


def test_a_strength_that_is_named_replaces_the_pipelines() -> None:
    strengths = strengths_of(AugmentConfig(pipe="bgc", hue=0.5, rotate=0, cutout=1))
    assert (strengths.hue, strengths.rotate, strengths.cutout, strengths.xflip, strengths.noise) == (0.5, 0, 1, 1, 0)
    assert set(AUGMENTATIONS) == set(NAMES)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_strength_is_a_share_of_the_probability(value: float) -> None:
    with pytest.raises(UserError, match=f"strength hue {value}: expected 0 to 1"):
        Strengths(hue=value)
