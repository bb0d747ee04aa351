"""What labels do beside the networks: those of generated images and grids, and the mean style of each class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from stylepipe.config import Config
from stylepipe.errors import UserError
from stylepipe.training.draws import Draws
from stylepipe.training.phase import Record

LabelSource = Callable[[Sequence[int]], Tensor]


class Labels:
    """Draws labels from those of the data, so that each comes as often as there.

    Args:
        draws: of the training.
        c_dim: label dimensions; 0 without labels.
        labels_at: gives the data's labels at positions in 0..count - 1, [N, c_dim] float32 on the host.
        count: how many there are to draw from.
        vectors: labels are no classes, of which exactly one entry is 1, but any vectors.
    """

    def __init__(
        self, draws: Draws, c_dim: int, labels_at: LabelSource | None, count: int, vectors: bool = False
    ) -> None:
        self.c_dim = c_dim
        self._draws, self._labels_at, self._count, self._vectors = draws, labels_at, count, vectors

    def drawn_by(self, draws: Draws) -> Labels:
        """Return the same labels, drawn by others."""
        return Labels(draws, self.c_dim, self._labels_at, self._count, self._vectors)

    def draw(self, purpose: str, positions: Sequence[int]) -> Tensor:
        """Return labels for generated images, [N, c_dim] float32."""
        if self.c_dim == 0:
            return torch.zeros(len(positions), 0, device=self._draws.device)
        assert self._labels_at is not None
        return self._draws.to_device(self._labels_at(self._draws.integers(purpose, positions, self._count)))

    def classes_of_rows(self, rows: int) -> list[int]:
        """Return the class that each row of a grid shows, or nothing where there are no classes.

        All classes, as many rows each as there is room for; of more classes than rows, a choice drawn from the seed.
        """
        if self.c_dim == 0 or self._vectors:
            return []
        if self.c_dim <= rows:
            return [number for number in range(self.c_dim) for _ in range(rows // self.c_dim)]
        order = self._draws.uniform("grid/class", range(self.c_dim)).argsort()
        return sorted(order[:rows].tolist())

    def grid(self, columns: int, rows: int) -> tuple[list[int], Tensor]:
        """Lay out a grid of generated images: the latent's number and the label of each place, row by row.

        With labels, each row has one label, a class or a vector drawn from the data, and the same latents as the rows
        of other labels.

        Returns:
            Numbers of latents from 0 on, and labels [N, c_dim] float32; N may be less than columns * rows.
        """
        row = list(range(columns))
        if self.c_dim == 0:
            return list(range(columns * rows)), self.draw("grid/c", range(columns * rows))
        classes = self.classes_of_rows(rows)
        if not classes:
            return row * rows, self.draw("grid/c", range(rows)).repeat_interleave(columns, dim=0)
        earlier = [classes[:i].count(number) for i, number in enumerate(classes)]
        latents = [columns * first + number for first in earlier for number in row]
        c = one_hot(torch.tensor(classes), self.c_dim).float()
        return latents, self._draws.to_device(c.repeat_interleave(columns, dim=0))


def check_labels(config: Config, classes: Sequence[str] | None) -> None:
    """Refuse options that need classes where the labels are vectors (`classes` is None).

    Raises:
        UserError: names the option.
    """
    if not config.cond or classes is not None:
        return
    remedy = "the labels of this data are vectors; leave it out, or label the photographs with class numbers"
    if config.network.class_w_avg:
        raise UserError(f"--network.class-w-avg: expected classes, and {remedy}")
    if config.loss.acgan_weight > 0:
        raise UserError(f"--loss.acgan-weight {config.loss.acgan_weight:g}: expected classes, and {remedy}")


def note_class_styles(record: Record, w: Tensor, c: Tensor) -> None:
    """Offer the sums of w [N, w_dim] over each class of c [N, c_dim], and how many they are, to `Phase.after`."""
    record.average("class_w_sum", c.T @ w)
    record.average("class_count", c.sum(dim=0))


def follow_class_styles_(class_w_offset: Tensor, w_avg: Tensor, averages: Mapping[str, Tensor], weight: float) -> None:
    """Move the offset of each class that the step drew, and of no other, towards where the mean of what it drew lies.

    Averages of sums and of counts divide to the mean over all micro-batches and processes, however they share the
    images. What is inf or NaN moves nothing: the optimizer skips such a step as well.

    Args:
        class_w_offset: [c_dim, w_dim] float32, how far the mean style of each class is from w_avg; changed.
        w_avg: [w_dim] float32, the mean style of all, which has followed the same step.
        averages: of what `note_class_styles` offered.
        weight: share of the way.
    """
    count = averages["class_count"].unsqueeze(1)
    drawn = count > 0
    mean = averages["class_w_sum"] / torch.where(drawn, count, 1)
    moved = class_w_offset.lerp(mean - w_avg, weight)
    class_w_offset.copy_(torch.where(drawn & moved.isfinite(), moved, class_w_offset))
