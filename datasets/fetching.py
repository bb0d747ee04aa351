"""Downloading a file of a remote dataset: tried again, continued where it stopped, whole and right or not there."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from stylepipe.datasets.store import RemoteError, Store
from stylepipe.errors import UserError
from stylepipe.files import flush_entry

T = TypeVar("T")

PART_SUFFIX = ".part"

_HASHED_AT_ONCE = 1 << 20
_LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is not waited for longer at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a download is tried, and how long it waits in between.

    Attributes:
        tries: without getting further in the file, before giving up.
        first_wait_s: after the first failure; it doubles with each, less up to a half at random, so that processes
            that failed together do not come back together.
        longest_wait_s: what the doubling stops at. A server's Retry-After may be longer.
    """

    tries: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def wait_s(self, failures: int, error: RemoteError) -> float:
        """Return the seconds to wait after this many failures."""
        backoff = min(self.first_wait_s * 2.0 ** (failures - 1), self.longest_wait_s)
        backoff *= random.SystemRandom().uniform(0.5, 1)  # leaves the seeded generator alone
        return max(backoff, min(error.retry_after_s or 0.0, _LONGEST_RETRY_AFTER_S))


def fetch(
    store: Store,
    name: str,
    to: Path,
    *,
    size: int,
    sha256: str,
    policy: RetryPolicy | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Download a file, so that it is whole and right at `to` or not there at all.

    What has come is kept at `to` + ".part" when it fails or is killed, and the next call goes on from there (of a store
    without ranges, from zero). Only one may run for a path at a time; see shard_cache.py.

    Args:
        store: where it is.
        name: which file.
        to: its path here, in a folder that exists.
        size: its bytes, as the manifest says.
        sha256: its hash, as hexadecimal text.
        policy: of trying again.
        stop: when it is set, the download is given up after the piece under way.

    Raises:
        RemoteError: it cannot be had, is stopped, or differs from the manifest, twice from first byte to last.
        UserError: it cannot be written.
    """
    part = part_path(to)
    complete = partial(_complete, store, name, part, size, policy or RetryPolicy(), stop or threading.Event())
    try:
        if complete() != sha256:
            log.warning(
                "%s: SHA-256 differs from the manifest; downloading it once more from the start", store.url(name)
            )
            part.unlink()
            if (found := complete()) != sha256:
                part.unlink()
                raise RemoteError(
                    f"{store.url(name)}: the remote file differs from the manifest (SHA-256 {found[:12]}... instead of "
                    f"{sha256[:12]}..., twice); copy the dataset there again, or start anew if it has been replaced",
                    retry=False,
                )
        os.replace(part, to)
        flush_entry(to.parent)
    except OSError as error:
        raise UserError(
            f"{to}: cannot be written ({error.strerror or error}); make room, name another place (STYLEPIPE_CACHE), or "
            f"let less of the data be here at a time (--data-cache-gb)"
        ) from error


def patiently(ask: Callable[[], T], policy: RetryPolicy) -> T:
    """Return what a request gives, tried again as the policy says; raise RemoteError."""
    failures = 0
    while True:
        try:
            return ask()
        except RemoteError as error:
            failures += 1
            if not error.retry or failures >= policy.tries:
                raise
            time.sleep(policy.wait_s(failures, error))


def part_path(to: Path) -> Path:
    """Return where a file is while it is not whole."""
    return to.with_name(to.name + PART_SUFFIX)


def _complete(store: Store, name: str, part: Path, size: int, policy: RetryPolicy, stop: threading.Event) -> str:
    """Download what `part` lacks and flush it to the disk; return its SHA-256. Raise RemoteError."""
    part.touch()
    with open(part, "r+b") as file:
        if not store.ranged:
            file.truncate(0)
        digest = hashlib.sha256()
        while data := file.read(_HASHED_AT_ONCE):
            digest.update(data)
        furthest, failures, since = file.tell(), 0, time.monotonic()
        while file.tell() < size:
            try:
                _append(store, name, file, digest, size, stop)
            except RemoteError as error:
                if stop.is_set():
                    raise
                if file.tell() > furthest:  # a long file over a bad line is not given up while it grows
                    furthest, failures, since = file.tell(), 0, time.monotonic()
                failures += 1
                if not error.retry or failures >= policy.tries:
                    raise _given_up(error, failures, time.monotonic() - since) from None
                wait_s = policy.wait_s(failures, error)
                log.warning("%s; try %d of %d in %.1f s", error, failures + 1, policy.tries, wait_s)
                if stop.wait(wait_s):
                    raise stopped(store, name) from None
                if not store.ranged:
                    file.seek(0)
                    file.truncate()
                    digest = hashlib.sha256()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _append(store: Store, name: str, file: IO[bytes], digest: hashlib._Hash, size: int, stop: threading.Event) -> None:
    """Go through the file once, from where it is to its end; raise RemoteError, with the file as far as it came."""
    with closing(store.pieces(name, file.tell(), size)) as pieces:
        for data in pieces:
            if file.tell() + len(data) > size:
                raise RemoteError(
                    f"{store.url(name)}: more than the {size:,} bytes of the manifest came; "
                    "copy the dataset there again",
                    retry=False,
                )
            file.write(data)
            file.flush()  # what has come outlives this process
            digest.update(data)
            if stop.is_set() and file.tell() < size:
                raise stopped(store, name)
    if file.tell() < size:
        raise RemoteError(f"{store.url(name)}: ended after {file.tell():,} of {size:,} bytes")


def stopped(store: Store, name: str) -> RemoteError:
    """Return what is raised where a download is stopped; nobody is to see it."""
    return RemoteError(f"{store.url(name)}: stopped", retry=False)


def _given_up(error: RemoteError, tries: int, seconds: float) -> RemoteError:
    tried = f"{tries} tries in {seconds:.1f} s" if tries > 1 else f"1 try in {seconds:.1f} s"
    remedy = "; check the network and the server, then start again: what has come is kept" if error.retry else ""
    return RemoteError(
        f"{error} ({tried}){remedy}", status=error.status, retry=error.retry, retry_after_s=error.retry_after_s
    )
