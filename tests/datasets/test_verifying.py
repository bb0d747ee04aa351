"""Damage of every kind is found and named, and nothing readable is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stylepipe.cli.main import main
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shards import ShardDataset, open_dataset
from stylepipe.datasets.verifying import find_faults, repair
from stylepipe.errors import UserError


def offset_of(folder: Path, sample: int) -> tuple[Path, int]:
    row = np.load(folder / "index.npy")[sample]
    return folder / f"shard-{row['shard']:05d}.tar", int(row["offset"])


def flip(path: Path, place: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def stored(dataset: ShardDataset) -> list[tuple[bytes, tuple[float, ...]]]:
    return [(dataset.read([i]).tobytes(), tuple(dataset.labels([i])[0])) for i in range(len(dataset))]


def damage_a_pixel(folder: Path) -> list[int]:
    """PNG has CRCs of its own; a bare image does not, and decodes as if nothing were."""
    shard, offset = offset_of(folder, 3)
    flip(shard, offset + 60)
    return [3]


def damage_a_header(folder: Path) -> list[int]:
    shard, offset = offset_of(folder, 3)
    flip(shard, offset - 512 + 5)
    return []


def cut_within_a_sample(folder: Path) -> list[int]:
    shard, offset = offset_of(folder, 22)
    first = int(np.load(folder / "index.npy")["shard"][22])
    shard.write_bytes(shard.read_bytes()[: offset + 40])
    assert first == np.load(folder / "index.npy")["shard"].max()
    return [22]


def lose_a_shard(folder: Path) -> list[int]:
    (folder / "shard-00001.tar").unlink()
    return np.flatnonzero(np.load(folder / "index.npy")["shard"] == 1).tolist()


def empty_a_shard(folder: Path) -> list[int]:
    (folder / "shard-00000.tar").write_bytes(b"")
    return np.flatnonzero(np.load(folder / "index.npy")["shard"] == 0).tolist()


def swap_two_shards(folder: Path) -> list[int]:
    """Nothing is where the index says, but the hashes tell which is which."""
    first, second = folder / "shard-00000.tar", folder / "shard-00001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return []


def lose_the_index(folder: Path) -> list[int]:
    (folder / "index.npy").unlink()
    return []


def damage_the_index(folder: Path) -> list[int]:
    flip(folder / "index.npy", 200)
    return []


def damage_the_index_and_a_header(folder: Path) -> list[int]:
    damage_a_header(folder)
    damage_the_index(folder)
    return [3]


DAMAGE: dict[str, tuple[Callable[[Path], list[int]], str]] = {
    "pixel": (damage_a_pixel, "sample 00000003: its bytes are not those that were stored (CRC-32)"),
    "header": (damage_a_header, "sample 00000003: its header in the tar is damaged"),
    "cut": (cut_within_a_sample, "sample 00000022: the file ends after 40 of its"),
    "lost shard": (lose_a_shard, "shard-00001.tar: cannot be read (No such file or directory)"),
    "empty shard": (empty_a_shard, "shard-00000.tar: has 0 bytes instead of"),
    "swapped": (swap_two_shards, "shard-00000.tar: its SHA-256 is not that of the manifest"),
    "lost index": (lose_the_index, "index.npy: cannot be read (No such file or directory)"),
    "damaged index": (damage_the_index, "index.npy: its SHA-256 is not that of the manifest"),
    "both": (damage_the_index_and_a_header, "no header at byte"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_rest_saved(
    prepared: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = stored(open_dataset(prepared))
    damage, message = DAMAGE[kind]
    lost = damage(prepared)
    with pytest.raises(SystemExit) as exit_code:
        main(["data", "verify", str(prepared), "--repair", str(tmp_path / "saved"), "--workers", "1"])
    assert exit_code.value.code == 1
    told = capsys.readouterr().out
    assert message in told
    assert f"{len(lost)} images lost" in told or kind == "both", "what only its header names cannot be counted"
    expected = [image for sample, image in enumerate(whole) if sample not in lost]
    saved = open_dataset(tmp_path / "saved")
    assert stored(saved) == expected
    assert saved.manifest.classes == ("cats", "dogs")
    assert find_faults(tmp_path / "saved", workers=1, progress=False) == []


def test_a_whole_dataset_has_no_fault(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_faults(prepared, workers=2, progress=False) == []
    assert main(["data", "verify", str(prepared)]) == 0
    assert "23 images, all of them whole" in capsys.readouterr().out


def test_vectors_and_levels_are_saved_too(photos: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))
    labels = [[name, [i / 7, -1.0]] for i, name in enumerate(names)]
    (photos / "dataset.json").write_text(json.dumps({"labels": labels}))
    how = Preparation(16, labels=True, levels=True)
    prepare(photos, tmp_path / "data", how, workers=1, progress=False)
    whole = stored(open_dataset(tmp_path / "data"))
    (tmp_path / "data" / "labels.npy").unlink()  # the tars say the same
    shard, offset = offset_of(tmp_path / "data", 5)
    flip(shard, offset + 60)
    lost = 5
    level, offset = offset_of(tmp_path / "data" / "levels" / "0008", 7)
    flip(level, offset + 20)
    faults = {(fault.file, fault.key) for fault in find_faults(tmp_path / "data", workers=1, progress=False)}
    assert {("labels.npy", ""), ("levels/0008/shard-00000.tar", "00000007")} <= faults
    repair(tmp_path / "data", tmp_path / "saved", workers=1, progress=False)
    saved = open_dataset(tmp_path / "saved")
    assert stored(saved) == whole[:lost] + whole[lost + 1 :]
    assert find_faults(tmp_path / "saved", workers=1, progress=False) == []
    assert len(saved.level(8)) == 22


def test_a_level_of_other_images_is_named(photos: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        how = Preparation(16, levels=True, shuffle_seed=seed)
        prepare(photos, tmp_path / str(seed), how, workers=1, progress=False)
    shutil.rmtree(tmp_path / "0" / "levels")
    shutil.copytree(tmp_path / "1" / "levels", tmp_path / "0" / "levels")
    causes = [fault.cause for fault in find_faults(tmp_path / "0", workers=1, progress=False)]
    assert len(causes) == 2
    assert all("holds no level of the images" in cause for cause in causes)


def test_nothing_to_save_and_nothing_to_read_are_refused(prepared: Path, tmp_path: Path) -> None:
    for shard in prepared.glob("*.tar"):
        shard.unlink()
    with pytest.raises(UserError, match="not one of its 23 images can be saved"):
        repair(prepared, tmp_path / "saved", workers=1, progress=False)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(UserError, match="no such folder"):
        find_faults(tmp_path / "absent")


def test_inspect_tells_what_there_is(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", str(prepared), "--sheet", str(sheet)]) == 0
    told = capsys.readouterr().out
    for line in ("images    23 of 16 px, png", "12  cats", "11  dogs", "left out  0", "levels    -"):
        assert line in told, line
    assert sheet.stat().st_size > 1000
    assert main(["data", "inspect", str(prepared), "--sheet", "sheet.gif"]) == 2


def test_drawn_faces_as_pictures_and_as_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--res", "16", "--count", "5", "--workers", "1"]
    assert main(["data", "faces", str(tmp_path / "a"), *common]) == 0
    assert main(["data", "faces", str(tmp_path / "b"), *common, "--as", "shards", "--levels"]) == 0
    assert main(["data", "faces", str(tmp_path / "c"), *common, "--as", "shards", "--seed", "1"]) == 0
    capsys.readouterr()
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == [f"{i:08d}.png" for i in range(5)]
    prepare(tmp_path / "a", tmp_path / "d", Preparation(16), workers=1, progress=False)
    images = {name: open_dataset(tmp_path / name).read(range(5)) for name in "bcd"}
    assert sorted(image.tobytes() for image in images["b"]) == sorted(image.tobytes() for image in images["d"])
    assert not (images["b"] == images["c"]).all()
    assert find_faults(tmp_path / "b", workers=1, progress=False) == []
    assert main(["data", "faces", str(tmp_path / "e"), *common, "--levels"]) == 2
    assert "a folder of pictures has none" in capsys.readouterr().err
