"""States: whole or not there, and refused with one sentence when they do not fit."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stylepipe.errors import UserError
from stylepipe.run_files import kimg_name
from stylepipe.training.checkpoint import (
    DamagedStateError,
    check_fits,
    digest_of,
    load_state,
    newest_state,
    newest_whole_state,
    prune_states,
    save_state,
    set_aside_damaged,
)
from stylepipe.training.host_copies import HostCopies

TENSORS = {"G.params": torch.arange(1000.0), "step": torch.tensor(3)}
LAYOUT = {"G": {"conv.weight": [10, 10], "conv.bias": [10]}}
INFO = {"tracker_run_id": "abc"}


def save(out, images_seen=40_000):
    return save_state(out, images_seen, TENSORS, LAYOUT, INFO)


def test_names_sort_by_the_image_counter():
    names = [kimg_name(n) for n in (8, 999, 40_000, 1_000_000, 25_000_000)]
    assert names == ["000000.008", "000000.999", "000040.000", "001000.000", "025000.000"]
    assert names == sorted(names)


def test_what_is_saved_is_loaded(tmp_path):
    state = load_state(save(tmp_path))
    assert state.images_seen == 40_000
    assert state.info == INFO
    assert state.layout == LAYOUT
    for name, tensor in TENSORS.items():
        assert torch.equal(state.tensors[name], tensor)
    check_fits(state, LAYOUT)


def test_nothing_but_the_state_is_left(tmp_path):
    save(tmp_path)
    save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state-000040.000"]
    assert sorted(p.name for p in (tmp_path / "state-000040.000").iterdir()) == ["state.json", "state.safetensors"]


def test_newest_and_pruning_go_by_the_image_counter(tmp_path):
    for images_seen in (1_000_000, 500, 30_000):
        save(tmp_path, images_seen)
    (tmp_path / ".state-009999.000.77.tmp").mkdir()  # left by a process that was killed while saving
    assert newest_state(tmp_path).name == "state-001000.000"
    prune_states(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("state-*")) == ["state-000030.000", "state-001000.000"]
    prune_states(tmp_path, keep=0)
    assert len(list(tmp_path.glob("state-*"))) == 2
    assert newest_state(tmp_path / "missing") is None


@pytest.mark.parametrize("keep_bytes", [0, 7, 500, -1])
def test_a_truncated_state_is_refused(tmp_path, keep_bytes):
    path = save(tmp_path)
    content = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(content[:keep_bytes])
    with pytest.raises(UserError, match=r"truncated or damaged"):
        load_state(path)


def test_one_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path)
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-100] ^= 1
    (path / "state.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_state(path)


def test_other_damage_is_answered_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_state(tmp_path / "missing")
    path = save(tmp_path)
    shutil.copytree(path, tmp_path / "a")
    (tmp_path / "a" / "state.safetensors").unlink()
    with pytest.raises(UserError, match=r"state\.safetensors is missing"):
        load_state(tmp_path / "a")
    shutil.copytree(path, tmp_path / "b")
    (tmp_path / "b" / "state.json").write_text("{")
    with pytest.raises(UserError, match="not a readable state"):
        load_state(tmp_path / "b")
    describe(path, format_version=99)
    with pytest.raises(UserError, match="format 99"):
        load_state(path)


def describe(path, **values):
    """Have a state say something else, as whoever writes one would."""
    description = json.loads((path / "state.json").read_text()) | values
    (path / "state.json").write_text(json.dumps(description | {"digest": digest_of(description)}))


def test_no_flipped_bit_of_what_a_state_says_goes_unnoticed(tmp_path):
    path = save(tmp_path)
    content, missed = (path / "state.json").read_bytes(), []
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            (path / "state.json").write_bytes(flipped)
            try:
                state = load_state(path)
            except DamagedStateError:
                continue
            if state.info != INFO or state.layout != LAYOUT:
                missed.append((position, bit))
    assert missed == []


def test_a_state_that_was_renamed_is_no_state_of_its_new_name(tmp_path):
    path = save(tmp_path, 10_000)
    path.rename(tmp_path / "state-000999.000")
    with pytest.raises(DamagedStateError, match=r"is the state of 000010\.000 kimg, and has been renamed"):
        load_state(tmp_path / "state-000999.000")
    (tmp_path / "state-000999.000").rename(tmp_path / "copy")
    assert load_state(tmp_path / "copy").images_seen == 10_000


def test_a_state_of_the_first_format_is_read(tmp_path):
    path = save(tmp_path)
    description = json.loads((path / "state.json").read_text()) | {"format_version": 1}
    del description["digest"]
    (path / "state.json").write_text(json.dumps(description))
    assert load_state(path).layout == LAYOUT


@pytest.mark.parametrize(
    "info", [{"config": None}, {"config": {"network": 3}}, {"rollbacks": "x"}, {"data": 7}, {"alarms": []}]
)
def test_what_a_state_says_is_of_the_right_kinds(tmp_path, info):
    path = save(tmp_path)
    describe(path, info=info)
    with pytest.raises(DamagedStateError, match=f"its (settings have )?{next(iter(info))}|its settings have network"):
        load_state(path)


@pytest.mark.parametrize(
    "other", [{"G": {"conv.weight": [10, 12], "conv.bias": [10]}}, {"G": {"conv.weight": [10, 10]}}, {"D": {"x": [1]}}]
)
def test_a_state_of_other_networks_is_refused(tmp_path, other):
    with pytest.raises(UserError, match="checkpoint of other networks"):
        check_fits(load_state(save(tmp_path)), other)


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    save(tmp_path, 1000)

    def full(*arguments):
        (arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stylepipe.training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2000)
    assert [path.name for path in tmp_path.iterdir()] == ["state-000001.000"]


def test_states_between_snapshots_give_way_to_newer_ones(tmp_path):
    def kept():
        return sorted(int(path.name[6:12]) for path in tmp_path.glob("state-*"))

    for kimg, interim, left in [
        (10, True, [10]),
        (20, True, [20]),
        (30, False, [30]),
        (40, True, [30, 40]),
        (50, True, [30, 50]),
        (60, False, [30, 60]),
        (90, False, [60, 90]),
        (100, True, [60, 90, 100]),
    ]:
        save_state(tmp_path, kimg * 1000, TENSORS, LAYOUT, {"interim": interim})
        prune_states(tmp_path, keep=2)
        assert kept() == left
    # The newest healthy one stays, however old: it is what a divergence goes back to.
    for kimg in (110, 120, 130):
        save_state(tmp_path, kimg * 1000, TENSORS, LAYOUT, {"interim": True, "healthy": False})
        prune_states(tmp_path, keep=2)
        assert kept() == [60, 90, 100, kimg]


def test_damaged_states_are_passed_over_and_set_aside(tmp_path):
    paths = [save(tmp_path, kimg * 1000) for kimg in (10, 20, 30)]
    (paths[1] / "state.json").write_text("[" * 100_000)
    (paths[2] / "state.safetensors").unlink()
    state, wrong = newest_whole_state(tmp_path)
    assert state.path == paths[0]
    assert [str(error).partition(":")[0] for error in wrong] == [str(paths[2]), str(paths[1])]
    assert state.passed_over == (paths[2], paths[1])
    set_aside_damaged(state.passed_over)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-000020.000",
        "damaged-000030.000",
        "state-000010.000",
    ]
    assert newest_whole_state(tmp_path)[1] == []


def test_a_state_of_a_newer_format_is_not_passed_over(tmp_path):
    save(tmp_path, 10_000)
    path = save(tmp_path, 20_000)
    describe(path, format_version=99)
    with pytest.raises(UserError, match="state of format 99, but this stylepipe reads up to 2; upgrade it"):
        newest_whole_state(tmp_path)
    describe(path, format_version=0)
    with pytest.raises(UserError, match="format 0"):
        newest_whole_state(tmp_path)


def test_copies_are_of_the_moment_and_are_not_taken_while_the_last_are_read():
    copies, pool, gate = HostCopies(), ThreadPoolExecutor(1), threading.Event()
    weights = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    expected = weights.clone()
    taken = copies.take({"a": weights, "step": torch.tensor(3)})
    weights.zero_()
    assert torch.equal(taken["a"], expected)
    assert taken["a"].is_contiguous()
    room = taken["a"].data_ptr()
    copies.reader = pool.submit(lambda: (gate.wait(60), taken["a"].clone())[1])
    threading.Timer(0.2, gate.set).start()
    again = copies.take({"a": weights})
    assert copies.reader.done()
    assert torch.equal(copies.reader.result(), expected)
    assert torch.equal(again["a"], weights)
    assert again["a"].data_ptr() == room, "the same room again"
    assert copies.take({"a": torch.ones(5)})["a"].shape == (5,)
    pool.shutdown()
