"""How processes share images, and how rows come together and are kept."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from stylepipe.metrics import stored_rows
from stylepipe.metrics.extraction import Team, Wanted, collect
from stylepipe.metrics.stored_rows import StoredRows, store_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [2, 7, 16, 33])
def test_every_number_is_in_one_share_and_pairs_stay_together(size, count):
    shares = [Team(rank, size).share(count) for rank in range(size)]
    assert sorted(n for share in shares for n in share) == list(range(count))
    for share in shares:
        for n in share:
            assert (n ^ 1) in share or (n ^ 1) >= count
    assert len(shares[0]) == max(map(len, shares))


class Number:
    """Takes the number of an image from its pixels, and notes what it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, images, numbers):
        self.seen.append(list(numbers))
        return {"number": images[:, 0, 0, :1].float()}


def images_of(numbers):
    return torch.tensor(list(numbers), dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)


def test_each_extractor_sees_as_many_as_it_wants_in_one_pass():
    few, many = Number(), Number()
    asked = []

    def source(numbers):
        asked.append(list(numbers))
        return images_of(numbers)

    rows = collect(source, {"few": Wanted(few, 5), "many": Wanted(many, 9)}, batch=4, team=Team(), device=CPU)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert few.seen == [[0, 1, 2, 3], [4]]
    assert rows["few"]["number"][:, 0].tolist() == list(range(5))
    assert rows["many"]["number"][:, 0].tolist() == list(range(9))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [6, 7, 13])
def test_gathered_rows_stand_in_the_order_of_their_numbers(size, count, monkeypatch):
    wanted = {"number": Wanted(Number(), count)}
    own = [
        collect(images_of, wanted, batch=2, team=Team(rank, size), device=CPU)["number"].own["number"]
        for rank in range(size)
    ]
    most = len(own[0])

    def all_gather(parts, mine):
        for part, rows in zip(parts, own, strict=True):
            part[: len(rows)] = rows
        assert len(mine) == most

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    for rank in range(size):
        assert Team(rank, size).gathered(own[rank], count)[:, 0].tolist() == list(range(count))


def test_stored_rows_are_what_was_stored(tmp_path):
    rows = {"64": torch.randn(5, 7), "32": torch.arange(3.0)[:, None]}
    store_rows(tmp_path / "statistics" / "key", rows, {"data": "faces"})
    found = StoredRows(tmp_path / "statistics" / "key", CPU)
    assert sorted(found) == ["32", "64"]
    assert all(torch.equal(found[name], rows[name]) for name in rows)
    store_rows(tmp_path / "statistics" / "key", {"64": torch.zeros(1, 1)}, {})  # another run was sooner: the first stay
    assert torch.equal(StoredRows(tmp_path / "statistics" / "key", CPU)["64"], rows["64"])
    assert [path.name for path in (tmp_path / "statistics").iterdir()] == ["key"]


class Asked(dict):
    """Rows that note which of them were asked for, in which other processes take part."""

    def __init__(self) -> None:
        super().__init__(a=torch.ones(2, 1), b=torch.ones(2, 1))
        self.names: list[str] = []

    def __getitem__(self, name):
        self.names.append(name)
        return super().__getitem__(name)


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_turn_of_gathering(
    tmp_path, caplog, bound_by_permissions
):
    rows, folder = Asked(), tmp_path / "statistics"
    folder.mkdir()
    os.chmod(folder, 0o500)
    store_rows(folder / "key", rows, {})
    assert rows.names == ["a", "b"]
    assert "cannot be written (Permission denied); it is measured again the next time" in caplog.text


@pytest.mark.parametrize("fails", ["at once", "half-way"])
def test_a_disk_that_fails_takes_no_turn_of_gathering_away(tmp_path, caplog, monkeypatch, fails):
    rows, save = Asked(), np.save

    def failing(path, array):
        if fails == "at once" or path.stem == "b":
            raise OSError(errno.EROFS, "Read-only file system")
        save(path, array)

    if fails == "at once":  # before any is asked for, as on a read-only mount
        monkeypatch.setattr(stored_rows, "atomic_path", failing_context)
    monkeypatch.setattr(np, "save", failing)
    store_rows(tmp_path / "key", rows, {})
    assert rows.names == ["a", "b"]
    assert "cannot be written (Read-only file system)" in caplog.text
    assert not list(tmp_path.iterdir())


@contextmanager
def failing_context(path):
    raise OSError(errno.EROFS, "Read-only file system")
    yield path
