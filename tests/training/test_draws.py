"""Draws are functions of seed, purpose and position, and have the distribution they promise."""

import pytest
import torch

from stylepipe.training.draws import Draws

CPU = torch.device("cpu")


def test_a_draw_belongs_to_its_position_whatever_the_batch():
    draws = Draws(3, CPU)
    whole = draws.normal("z", range(8), 16)
    torch.testing.assert_close(draws.normal("z", [5, 2], 16), whole[[5, 2]], rtol=0, atol=0)
    noise = draws.image_noise("noise", range(8), [3, 4, 4])
    torch.testing.assert_close(draws.image_noise("noise", [7, 0], [3, 4, 4]), noise[[7, 0]], rtol=0, atol=0)
    assert torch.equal(draws.uniform("u", [6]), draws.uniform("u", range(8))[6:7])
    assert torch.equal(draws.uniforms("u", [6], 5), draws.uniforms("u", range(8), 5)[6:7])
    assert torch.equal(draws.uniforms("u", range(8), 5)[:, 0], draws.uniform("u", range(8)))


@pytest.mark.parametrize("draw", [lambda d, p, n: d.normal(p, [n], 8), lambda d, p, n: d.image_noise(p, [n], [8])])
def test_seed_purpose_and_position_each_matter(draw):
    base = draw(Draws(0, CPU), "a", 0)
    assert torch.equal(base, draw(Draws(0, CPU), "a", 0))
    for other in (draw(Draws(1, CPU), "a", 0), draw(Draws(0, CPU), "b", 0), draw(Draws(0, CPU), "a", 1)):
        assert not torch.equal(base, other)


def test_far_positions_are_as_good_as_near_ones():
    far = 10**12
    z = Draws(0, CPU).normal("z", range(far, far + 400), 64)
    assert abs(float(z.mean())) < 0.02
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    assert torch.unique(z, dim=0).shape[0] == 400


def test_neighbours_are_independent():
    z = Draws(0, CPU).normal("z", range(300), 64)
    correlation = (z[:-1] * z[1:]).mean()
    assert abs(float(correlation)) < 0.03


def test_integers_are_in_range_and_even():
    numbers = Draws(0, CPU).integers("c", range(3000), 3)
    assert set(numbers) == {0, 1, 2}
    assert all(800 < numbers.count(k) < 1200 for k in range(3))


def test_the_numbers_themselves_are_pinned():
    """A change here changes every training in progress: it needs a new state format."""
    z = Draws(7, CPU).normal("z", [42], 3)
    assert z[0].tolist() == pytest.approx(PINNED, abs=1e-6)


PINNED = [1.4103469848632812, 2.269559860229492, -2.61316180229187]
