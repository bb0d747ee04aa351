"""The command line's front door: commands, exit codes, what a mistake looks like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import stylepipe
from stylepipe.cli import main as front
from stylepipe.errors import UserError


def command_that(monkeypatch: pytest.MonkeyPatch, action: Callable[[list[str]], None]) -> None:
    """Let `stylepipe train` do something else."""
    module = ModuleType("stylepipe.cli.train")
    module.main = action  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stylepipe.cli.train", module)


def fail_with(error: BaseException) -> Callable[[list[str]], None]:
    def action(argv: list[str]) -> None:
        raise error

    return action


def test_help_lists_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, purpose in front.COMMANDS.items():
        assert any(name in line and purpose in line and len(line) < 100 for line in lines)


def test_no_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main([]) == 2
    assert "usage: stylepipe COMMAND" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["--version"]) == 0
    assert capsys.readouterr().out == f"stylepipe {stylepipe.__version__}\n"


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["trian", "--res", "64"]) == 2
    assert capsys.readouterr().err == "error: unknown command trian: did you mean train?\n"
    assert front.main(["zzz"]) == 2
    assert (
        "expected one of train, prepare, data, sample, evaluate, report, ema, convert, bench" in capsys.readouterr().err
    )


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    command_that(monkeypatch, seen.append)
    assert front.main(["train", "--res", "64"]) == 0
    assert front.run("train", ("--help",)) == 0
    assert seen == [["--res", "64"], ["--help"]]


def test_a_mistake_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("STYLEPIPE_DEBUG", raising=False)
    command_that(monkeypatch, fail_with(UserError("--res 65: expected a power of two; try 64")))
    assert front.main(["train"]) == 2
    assert capsys.readouterr().err == "error: --res 65: expected a power of two; try 64\n"
    monkeypatch.setenv("STYLEPIPE_DEBUG", "1")
    with pytest.raises(UserError):
        front.main(["train"])


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command_that(monkeypatch, fail_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        front.main(["train"])


def test_ctrl_c_exits_as_shells_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    command_that(monkeypatch, fail_with(KeyboardInterrupt()))
    assert front.main(["train"]) == 130


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(
        "import sys, types\n"
        "talk = types.ModuleType('stylepipe.cli.train')\n"
        "talk.main = lambda argv: [print('x' * 1000) for _ in range(1000)]\n"
        "sys.modules['stylepipe.cli.train'] = talk\n"
        "from stylepipe.cli.main import main\n"
        "sys.exit(main(['train']))\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from stylepipe.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_every_command_has_its_module_and_every_script_its_command(root: Path) -> None:
    modules = {path.stem for path in (root / "stylepipe" / "cli").glob("*.py")}
    assert set(front.COMMANDS) <= modules
    assert {path.stem for path in (root / "launch").glob("*.py")} <= set(front.COMMANDS)


@pytest.mark.parametrize("script", ["train", "sample"])
def test_a_missing_install_is_one_sentence(root: Path, script: str) -> None:
    command = [sys.executable, "-I", "-S", root / "launch" / f"{script}.py"]  # -S: without site-packages
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "has no stylepipe; run `make setup`" in done.stderr
