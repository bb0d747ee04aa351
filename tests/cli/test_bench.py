"""`stylepipe bench step` prints seconds per kimg as its last line and keeps its figures."""

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
