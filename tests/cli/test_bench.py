"""`stylepipe bench step` and `bytes` print their figure as the last line and keep it; a file is tried beforehand."""

import json
import re

import pytest

from stylepipe.cli.main import main

STEP = ["bench", "step", "--res", "16", "--batch-size", "4", "--repeats", "2"]
STEP += ["--network.channel-base", "64", "--network.channel-max", "4"]


def test_the_last_line_is_the_figure_and_the_file_holds_it(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main([*STEP, "--json", str(path)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    match = re.fullmatch(r"([0-9]+\.[0-9]+) s/kimg", lines[-1])
    figures = json.loads(path.read_text())
    assert float(match[1]) == pytest.approx(figures["s_per_kimg"], abs=0.01)
    phases = figures["phase_seconds"]
    amortised = phases["G/main"] + phases["G/path_length"] / 4 + phases["D/main"] + phases["D/r1"] / 16
    assert figures["s_per_kimg"] == pytest.approx(amortised / 4 * 1000)
    assert figures["res"] == 16
    assert figures["batch_size"] == 4


@pytest.mark.parametrize(
    ("more", "named"), [(["--repeats", "0"], "--repeats 0"), (["--json", "/nowhere/x.json"], "--json /nowhere/x.json")]
)
def test_mistakes_are_named(more, named, capsys):
    assert main([*STEP, *more]) == 2
    assert named in capsys.readouterr().err


def test_a_folder_is_no_file_for_figures(tmp_path, capsys):
    assert main(["bench", "bytes", "--json", str(tmp_path)]) == 2
    assert f"--json {tmp_path}: cannot write there (Is a directory)" in capsys.readouterr().err


@pytest.mark.slow
def test_bytes_amortise_the_lazy_phases(tmp_path, capsys):
    path = tmp_path / "bytes.json"
    assert main(["bench", "bytes", "--res", "16", "--precision", "fp32", "--json", str(path)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    figures = json.loads(path.read_text())["bytes_per_image"]["16"]
    intervals = {"G/main": 1, "G/path_length": 4, "D/main": 1, "D/r1": 16}
    assert [phase["name"] for phase in figures["with_kernels"]] == list(intervals)

    def step(form, kind):
        phases = figures[form]
        return sum((p["loss"][kind] + p["gradient"][kind]) / intervals[p["name"]] for p in phases) / 1e6

    expected = [step("without_kernels", "passes"), step("with_kernels", "passes"), step("with_kernels", "convolutions")]
    assert [float(number) for number in last.removeprefix("  16 px a step").split()] == pytest.approx(
        expected, abs=0.06
    )
    assert expected[1] < expected[0]


def test_data_is_timed_beside_the_usual_ways(tmp_path, capsys):
    assert main(["data", "faces", str(tmp_path / "faces"), "--res", "64", "--count", "24", "--as", "shards"]) == 0
    path = tmp_path / "data.json"
    command = ["bench", "data", str(tmp_path / "faces"), "--workers", "1", "--seconds", "0.05", "--repeats", "1"]
    capsys.readouterr()
    assert main([*command, "--batch-size", "4", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "24 images of 64 px; JPEG by " in lines[0]
    names = ["decoders alone", "stylepipe", "webdataset", "folder"]
    assert [re.sub(r" {2,}.*", "", line.strip()) for line in lines[1:]] == [f"1 x {name}" for name in names]
    rates = json.loads(path.read_text())["images_per_second"]
    assert list(rates) == [f"1 x {name}" for name in names]
    for line, rate in zip(lines[1:], rates.values(), strict=True):
        share = rate / rates["1 x decoders alone"]
        assert line.split()[-3:] == [f"{rate:.1f}", "images/s", f"{share:.1%}"]


def test_data_that_cannot_be_timed(tmp_path, capsys):
    assert main(["bench", "data", str(tmp_path)]) == 2
    assert "is empty; expected a dataset" in capsys.readouterr().err
    assert main(["bench", "data", str(tmp_path), "--workers", "0"]) == 2
    assert "--workers, --batch-size and --seconds" in capsys.readouterr().err


def test_saving_is_timed_beside_training(tmp_path, capsys):
    path = tmp_path / "saving.json"
    saving = ["bench", "saving", *STEP[2:], "--folder", str(tmp_path), "--json", str(path), "--state-kimg", "2"]
    assert main(saving) == 0
    figures = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path], "what was written is removed"
    assert figures["bytes"] > 50_000
    assert figures["written_s"] > 0
    noticed = figures["held_s"] + figures["slower_s"]
    assert figures["share"] == pytest.approx(noticed / (500 * figures["step_s"]))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"{figures['share']:.3%} of the training's time, at one state in 2 kimg"
