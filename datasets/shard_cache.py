"""Shards of a remote dataset on a local disk, each downloaded once per node, while the next ones are on their way.

    FOLDER/
      shard-00000.tar        whole and checked; its time of modification is that of its last use
      shard-00001.tar.part   coming, or left by a process that was killed: the next download goes on from there
      shard-00001.tar.lock   flock: held by the process that downloads the shard
      .space.lock            flock: held by the process that makes room

Every process of a node has a ShardCache of its own on the same folder. What they must agree on is told by locks alone,
which end with their process, however it ends: a process that uses a shard holds a shared lock on the file, and only a
file that can be locked exclusively is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path

from stylepipe.datasets.fetching import PART_SUFFIX, RetryPolicy, fetch, part_path, stopped
from stylepipe.datasets.manifest import FileRecord
from stylepipe.datasets.shard_files import ShardFile
from stylepipe.datasets.store import Store
from stylepipe.errors import UserError
from stylepipe.files import locked

_SPACE_LOCK = ".space.lock"
_POLL_S = 0.05
_PATIENCE_S = 5.0
_CLOSING_S = 1.0  # a request under way is not waited for longer

log = logging.getLogger(__name__)


class ShardCache:
    """The shards of one remote dataset in a local folder of their own; may be used by several threads.

    A process reads in windows of shards. It announces each window with `prefetch` while it reads the one before, and
    the shards of both are kept, as is whatever it has open.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[FileRecord],
        folder: Path,
        limit_bytes: int | None,
        *,
        policy: RetryPolicy | None = None,
    ) -> None:
        """Make the folder; download nothing.

        Args:
            store: where the shards are.
            shards: their records; a file may be in a sub-folder, there and here.
            folder: on a local disk; the same for all processes of a node, and for this dataset only.
            limit_bytes: that the shards in the folder may have together; None: no limit. It is exceeded, with a
                warning, rather than waited for where more is in use at a time.
            policy: of trying again.

        Raises:
            UserError: the folder cannot be made or locked.
        """
        self._store = store
        self._shards = tuple(shards)
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._policy = policy
        self._paths = [folder / record.file for record in shards]
        self._numbers = {str(path): number for number, path in enumerate(self._paths)}
        self._lock = threading.Lock()
        self._windows: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())  # current, next
        self._pins: dict[int, ShardFile] = {}  # of the windows; a shared lock on each keeps the file
        self._renewed: dict[int, int] = {}  # the damaged file's number
        self._downloads: dict[int, Future[ShardFile]] = {}  # by one thread each; others wait for it
        self._queue: deque[int] = deque()  # announced, and not begun
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        try:
            for parent in {folder, *(path.parent for path in self._paths)}:
                parent.mkdir(parents=True, exist_ok=True)
            with locked(folder / _SPACE_LOCK, needed=True):
                if limit_bytes is not None:
                    self._remove_for(None, limit_bytes)
        except OSError as error:
            raise _unusable(folder, error) from error

    def open(self, shard: int) -> ShardFile:
        """Return a shard, downloaded now if need be: whole, and checked when it came. It stays as long as it is open.

        Raises:
            RemoteError: the shard cannot be had, now or when it was prefetched (then the next call tries again).
            UserError: it cannot be written.
        """
        with suppress(OSError):  # which the download will meet as well
            if (file := self._pin(shard)) is not None:
                return file
        with self._lock:
            download, stop = self._downloads.get(shard), self._stop
            if is_new := download is None:
                download = self._downloads[shard] = Future()
        if is_new:
            # In a thread of its own, that may be left to a server that stalls; a daemon, as below.
            threading.Thread(target=self._download, args=(shard, download, stop, 0), daemon=True).start()
        try:
            while not wait([download], _POLL_S).done:
                if stop.is_set():
                    raise stopped(self._store, self._shards[shard].file)
            return download.result()
        finally:
            self._forget(shard, download)

    def prefetch(self, shards: Collection[int]) -> None:
        """Announce the next window, and download what lacks of it in the background; errors are raised by `open`."""
        with self._lock:
            self._windows = (self._windows[1], frozenset(shards))
            self._release()
            self._queue = deque(shard for shard in self._queue if self._is_wanted(shard))
            for shard in [shard for shard in shards if shard in self._downloads and self._downloads[shard].done()]:
                del self._downloads[shard]  # it failed before
        for shard in shards:
            with suppress(OSError):
                self._pin(shard)  # what is here shall not make room for what is not
        with self._lock:
            self._queue.extend(shard for shard in shards if shard not in self._pins and shard not in self._queue)
            if self._queue and self._thread is None:
                # A daemon: a download under way is not waited for at exit, and is continued by the next process.
                self._thread = threading.Thread(
                    target=self._work, args=(self._stop,), name="shard prefetch", daemon=True
                )
                self._thread.start()

    def renew(self, shard: int, damaged: ShardFile) -> bool:
        """Remove a shard whose file was damaged here, so that it is downloaded again; False: it is one that came so."""
        found = os.fstat(damaged.descriptor).st_ino
        with self._lock:
            if shard in self._renewed and self._renewed[shard] != found:
                return False
            if shard not in self._renewed:
                self._renewed[shard] = found
                self._pins.pop(shard, None)
                log.warning("%s: is damaged; downloading it again", self._paths[shard])
                with suppress(FileNotFoundError):
                    if self._paths[shard].stat().st_ino == found:
                        self._paths[shard].unlink()
        return True

    def close(self) -> None:
        """Stop downloading and let go of all shards; using the cache takes them up again, and goes on where it was."""
        with self._lock:
            self._stop.set()
            self._stop = threading.Event()
            self._queue.clear()
            self._downloads.clear()
            self._windows = (frozenset(), frozenset())
            self._release()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_CLOSING_S)

    def _is_wanted(self, shard: int) -> bool:
        return any(shard in window for window in self._windows)

    def _release(self) -> None:
        """Let go of shards that are no longer wanted; the caller holds `_lock`."""
        for shard in [shard for shard in self._pins if not self._is_wanted(shard)]:
            _touch(self._pins.pop(shard))

    def _work(self, stop: threading.Event) -> None:
        """Download what is queued, in a thread that ends when nothing is left."""
        put_off: set[int] = set()
        while True:
            with self._lock:
                if stop.is_set():  # the queue is for another thread now
                    return
                if not self._queue:
                    self._thread = None
                    return
                shard = self._queue.popleft()
            with suppress(OSError):  # which the download will meet as well
                if shard not in put_off and not self._is_free(shard):  # another process is at it: take the others first
                    put_off.add(shard)
                    with self._lock:
                        self._queue.append(shard)
                    continue
            with self._lock:
                if not self._is_wanted(shard) or shard in self._pins or shard in self._downloads:
                    continue
                download = self._downloads[shard] = Future()
            self._download(shard, download, stop, patience_s=_PATIENCE_S)
            if download.exception() is None:
                self._forget(shard, download)

    def _download(self, shard: int, download: Future[ShardFile], stop: threading.Event, patience_s: float) -> None:
        """Have a shard on disk and open it, or fail; `download` tells which."""
        record, path = self._shards[shard], self._paths[shard]
        get = partial(fetch, self._store, record.file, path, size=record.bytes, sha256=record.sha256)
        try:
            with self._alone(shard, stop):
                while (file := self._pin(shard)) is None:
                    self._make_room(shard, stop, patience_s)
                    get(policy=self._policy, stop=stop)
            download.set_result(file)
        except OSError as error:
            download.set_exception(_unusable(self._folder, error))
        except BaseException as error:
            download.set_exception(error)

    def _forget(self, shard: int, download: Future[ShardFile]) -> None:
        """Have the next one who asks for a shard begin anew; else its file would stay open."""
        with self._lock:
            if self._downloads.get(shard) is download:
                del self._downloads[shard]

    @contextmanager
    def _alone(self, shard: int, stop: threading.Event) -> Iterator[None]:
        """Hold a shard's lock file, waiting for other processes; raise RemoteError when it is to stop meanwhile."""
        while True:
            with locked(self._lock_path(shard), wait=False, needed=True) as held:
                if held:
                    yield
                    return
            if stop.wait(_POLL_S):
                raise stopped(self._store, self._shards[shard].file)

    def _is_free(self, shard: int) -> bool:
        with locked(self._lock_path(shard), wait=False, needed=True) as held:
            return held

    def _lock_path(self, shard: int) -> Path:
        path = self._paths[shard]
        return path.with_name(f"{path.name}.lock")

    def _pin(self, shard: int) -> ShardFile | None:
        """Open a shard that is on disk, and keep it open while it is in a window; return None if it is not whole."""
        with self._lock:
            if shard in self._pins:
                return self._pins[shard]
        try:
            file = ShardFile(os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        fcntl.flock(file.descriptor, fcntl.LOCK_SH)
        status = os.fstat(file.descriptor)
        if status.st_nlink == 0 or status.st_size != self._shards[shard].bytes:  # removed before it was locked; damaged
            return None
        _touch(file)
        with self._lock:
            if self._is_wanted(shard):
                self._pins[shard] = file
        return file

    def _make_room(self, shard: int, stop: threading.Event, patience_s: float) -> None:
        """Remove the least recently used shards until this one fits, and reserve its place by its `.part`.

        What is in use may be let go within `patience_s`: processes do not come to a new window at the same moment.
        """
        if self._limit_bytes is None:
            return
        last = time.monotonic() + patience_s
        while True:
            with locked(self._folder / _SPACE_LOCK, needed=True):
                excess = self._remove_for(shard, self._limit_bytes)
                if excess <= 0 or time.monotonic() >= last:
                    part_path(self._paths[shard]).touch()
                    break
            if stop.wait(_POLL_S):
                raise stopped(self._store, self._shards[shard].file)
        if excess > 0:
            used = self._limit_bytes + excess
            text = "%s: %d bytes are in use at once, above the limit of %d"
            log.warning(text, self._folder, used, self._limit_bytes)

    def _remove_for(self, shard: int | None, limit_bytes: int) -> int:
        """Remove what nobody uses until a shard, if any, fits; return by how many bytes it does not, or less than 0."""
        found: dict[int, tuple[int, bool]] = {}  # shard: its last use, whether it is a part
        for entry in chain.from_iterable(map(os.scandir, {path.parent for path in self._paths})):
            number = self._numbers.get(entry.path.removesuffix(PART_SUFFIX))
            if number is None or number == shard:
                continue
            try:
                found[number] = (entry.stat().st_mtime_ns, entry.name.endswith(PART_SUFFIX))
            except FileNotFoundError:  # a part that has become whole since it was listed
                found[number] = (time.time_ns(), False)
        # Parts count whole: they will grow.
        used = sum(self._shards[number].bytes for number in (*found, *([] if shard is None else [shard])))
        for number, (_, is_part) in sorted(found.items(), key=lambda item: item[1]):
            if used <= limit_bytes:
                break
            if self._remove_part(number) if is_part else _remove_unused(self._paths[number]):
                used -= self._shards[number].bytes
        return used - limit_bytes

    def _remove_part(self, shard: int) -> bool:
        """Remove what a killed process left of a shard; return False where it is being downloaded."""
        with locked(self._lock_path(shard), wait=False, needed=True) as held:
            if held:
                part_path(self._paths[shard]).unlink(missing_ok=True)
            return held


def _remove_unused(path: Path) -> bool:
    """Remove a shard that no process uses; return False where one does."""
    with locked(path, wait=False, needed=True) as held:
        if held:
            path.unlink()
        return held


def _touch(file: ShardFile) -> None:
    """Note that a shard is used now; the kernel's own clock for files tells moments within milliseconds not apart."""
    with suppress(PermissionError):  # another user's: its last use is when that one used it
        os.utime(file.descriptor, ns=(time.time_ns(),) * 2)


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: cannot be used as a cache ({error.strerror or error}); name a folder on a local disk that can be "
        "written and locked"
    )
