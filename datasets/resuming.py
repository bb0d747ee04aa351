"""A folder that is filled over a long time and appears when it is whole: what a killed process did is gone on from.

    .OUT.partial/           where it is filled, beside OUT
      plan.json             what is being made; another plan begins anew
      progress.json         how far it is, with its CRC-32: written whole, now and then, after all files have reached
                            the disk
      ...                   the files of the writers, and what is only ever appended to

Files may be longer than progress.json says. They are cut to that when the work goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stylepipe.errors import UserError
from stylepipe.files import atomic_path, flush, locked
from stylepipe.parsing import parse_json

log = logging.getLogger(__name__)

PLAN_FILE, PROGRESS_FILE = "plan.json", "progress.json"
MARK_EVERY_S = 20.0  # at most this much work is done again


class Work:
    """The folder of some work, and how far that is.

    Attributes:
        folder: to be filled.
        progress: what the last `mark` of an earlier process said; None where the work begins.
    """

    def __init__(self, folder: Path, progress: Mapping[str, Any] | None) -> None:
        self.folder, self.progress = folder, progress
        self._marked = time.monotonic()

    def due(self) -> bool:
        """Tell whether it is time for the next mark."""
        return time.monotonic() - self._marked > MARK_EVERY_S

    def mark(self, progress: Mapping[str, Any]) -> None:
        """Note how far the work is. What it speaks of has reached the disk already."""
        with atomic_path(self.folder / PROGRESS_FILE) as temporary:
            temporary.write_text(json.dumps({"crc32": _crc(progress), "progress": progress}))
        self._marked = time.monotonic()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out` when the block ends well; what was done otherwise is not kept.

    Raises:
        UserError: as for `resumable_folder`.
    """
    with resumable_folder(out, "", lambda folder, progress: False) as work:
        yield work.folder


@contextmanager
def resumable_folder(out: Path, plan: str, can_go_on: Callable[[Path, Mapping[str, Any]], bool]) -> Iterator[Work]:
    """Yield the work for a new folder `out`, begun or gone on with; it becomes `out` when the block ends well.

    Where that does not happen, whatever the reason, the work stays for a later call as far as it was marked.

    Args:
        out: must not exist, or be empty.
        plan: tells what is being made from anything else.
        can_go_on: tells whether what earlier work left is sound, given the folder and its progress.

    Raises:
        UserError: `out` is not free, is being written, or cannot be.
    """
    folder = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out}: exists already; name a new folder, or remove this one first")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=False) as held:
            if not held:
                raise UserError(f"{out}: another process is writing it; wait for that, or name another folder")
            work = Work(folder, _taken_up(folder, plan, can_go_on))
            try:
                yield work
            except BaseException:
                if (folder / PROGRESS_FILE).exists():
                    log.warning("what is done is kept in %s; the same command goes on from there", folder)
                else:
                    shutil.rmtree(folder)
                raise
            (folder / PLAN_FILE).unlink()
            (folder / PROGRESS_FILE).unlink(missing_ok=True)
            flush(folder)
            os.replace(folder, out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); make room or name another place"
        ) from error


def _taken_up(
    folder: Path, plan: str, can_go_on: Callable[[Path, Mapping[str, Any]], bool]
) -> Mapping[str, Any] | None:
    """Return the progress to go on from, or None with the folder emptied but for the plan."""
    progress = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        if (folder / PLAN_FILE).read_text() == plan:
            marked = parse_json((folder / PROGRESS_FILE).read_bytes())
            if marked["crc32"] == _crc(marked["progress"]):
                progress = marked["progress"]
    if progress is not None and can_go_on(folder, progress):
        return dict(progress)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / PLAN_FILE).write_text(plan)
    return None


def _crc(progress: object) -> int:
    return zlib.crc32(json.dumps(progress).encode())
