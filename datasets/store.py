"""Bytes by name from where a prepared dataset lies: a web server, an object store, or a command's standard output.

fsspec and its packages do the talking. They differ in what they do silently: the one for http takes the whole file
where a server ignores ranges, and none compares lengths. So every answer is checked here, and every failure is a
RemoteError that says which file, what happened and whether trying again makes sense; fetching.py then tries again.
"""

from __future__ import annotations

import inspect
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from types import MethodType
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from stylepipe.errors import UserError

if TYPE_CHECKING:
    from aiohttp import ClientResponse

RANGE_BYTES = 8 << 20  # enough to hide a round trip, little to fetch again
STALL_S = 60.0

_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_PIPE = "pipe:"
_PIPE_BYTES = 1 << 20
_STDERR_SHOWN = 300  # characters

# Worth another try though they name a fault of the request: timeout, too early, too many requests.
_PASSING_STATUSES = {408, 425, 429}
_SHELL_CANNOT_RUN = {126, 127}
_WITHOUT_RANGES = (
    "the server ignores Range requests and sends the whole file; use one that answers them (nginx, Apache, an object "
    "store), or read through a command: pipe:curl --silent --fail --location URL/{}"
)
_REMEDIES = {
    401: "check the credentials and the location",
    403: "check the credentials and that they may read this file",
    404: "check the location and that the whole dataset was copied there",
    416: "the remote file is shorter than the manifest says; copy the dataset there again",
}


class RemoteError(UserError):
    """Tells which remote file could not be had, and why.

    Attributes:
        status: that of HTTP, the exit status of a command, or None where there was no answer.
        retry: whether the same request may succeed later.
        retry_after_s: the seconds that the server asks to wait, if it does.
    """

    def __init__(
        self, message: str, *, status: int | None = None, retry: bool = True, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry = retry
        self.retry_after_s = retry_after_s


class Store(Protocol):
    """Where the files of a dataset are. May be used by several threads; connects when it is first asked.

    Attributes:
        ranged: it can start within a file, so that a download is continued rather than started again.
    """

    ranged: bool

    def url(self, name: str) -> str:
        """Return where a file is, for messages: without passwords and query strings."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes [start, end) of a file, all of them or a RemoteError; `end` None: up to its end."""

    def pieces(self, name: str, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield the bytes [start, end) of a file in pieces of at most RANGE_BYTES; raise RemoteError.

        A store that is not ranged starts at 0 and goes to the end of the file, wherever that is.
        """

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None where it is not told; raise RemoteError."""


def open_store(location: str, *, stall_s: float = STALL_S) -> Store:
    """Return the store at a location, without connecting to it.

    Args:
        location: a folder as http(s)://HOST/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH or
            hf://datasets/USER/NAME[@REVISION][/PATH]; or pipe:COMMAND, a shell command that writes a file to its
            standard output, with `{}` where the file's name belongs (else it is the last word, or joined to a last
            `/` or `=`). Credentials and options are those of fsspec and the packages it uses: environment variables,
            the clouds' own files, ~/.config/fsspec; of http also ~/.netrc and a query string, which every file gets.
        stall_s: seconds without a byte after which a request is given up. Of hf://, HF_HUB_DOWNLOAD_TIMEOUT is used.

    Raises:
        UserError: the location is none of these, or its package is not installed.
    """
    scheme, separator, rest = location.partition("://")
    if location.startswith(_PIPE):
        if not location.removeprefix(_PIPE).strip():
            raise UserError(f"{location}: expected a command, such as 'pipe:ssh host cat /data/faces/{{}}'")
        return PipeStore(location.removeprefix(_PIPE), stall_s)
    if not separator or scheme not in _PACKAGES:
        raise UserError(
            f"{redacted(location)}: no location that data can be read from; expected http://, https://, s3://, gs://, "
            "hf:// or pipe:COMMAND (a local folder is named by its path alone)"
        )
    if not rest.strip("/"):
        raise UserError(f"{location}: names no host or bucket; expected {scheme}://NAME/PATH")
    if find_spec(_PACKAGES[scheme]) is None:
        raise UserError(
            f"{scheme}:// needs the package {_PACKAGES[scheme]}, which is not installed; "
            "install it with: pip install 'stylepipe[remote]'"
        )
    return FsspecStore(location, stall_s)


class FsspecStore:
    """A folder on a web server or in an object store; see `open_store`."""

    ranged = True

    def __init__(self, location: str, stall_s: float = STALL_S) -> None:
        self._location = location
        self._stall_s = stall_s
        self._connected: Any = None
        self._connecting = threading.Lock()

    def url(self, name: str) -> str:
        """Return where a file is, for messages."""
        return redacted(self._address(name))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes [start, end) of a file; raise RemoteError."""
        limits: dict[str, Any] = {} if start == 0 and end is None else {"start": start, "end": end}
        if self._scheme == "hf":
            limits["cache_type"] = "none"  # fsspec's default reads 5 MiB more than it is asked for
        data: bytes = self._ask("cat_file", name, **limits)
        if end is not None and len(data) > end - start:
            raise self._refused(name, HTTPStatus.OK, _WITHOUT_RANGES)
        if end is not None and len(data) < end - start:
            raise RemoteError(
                f"{self.url(name)}: {len(data):,} bytes came from {start:,} on instead of {end - start:,}"
            )
        return data

    def pieces(self, name: str, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield the bytes [start, end) of a file, one request a piece; raise RemoteError."""
        for at in range(start, end, RANGE_BYTES):
            yield self.read(name, at, min(at + RANGE_BYTES, end))

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None where it is not told; raise RemoteError."""
        size: int | None = self._ask("info", name).get("size")
        return size

    @property
    def _scheme(self) -> str:
        return self._location.partition("://")[0]

    def _address(self, name: str) -> str:
        if self._scheme not in ("http", "https"):
            return f"{self._location.rstrip('/')}/{name}"
        path, question, query = self._location.partition("?")
        return f"{path.rstrip('/')}/{quote(name)}{question}{query}"

    def _ask(self, method: str, name: str, **arguments: Any) -> Any:
        try:
            return getattr(self._file_system(), method)(self._address(name), **arguments)
        except Exception as error:  # every package raises others
            failure = self._failure(name, error)
        # Not from the cause: its message shows the query string.
        raise failure

    def _file_system(self) -> Any:
        with self._connecting:
            if self._connected is None:
                try:
                    self._connected = _connect(self._scheme, self._stall_s)
                except ImportError as error:
                    raise UserError(
                        f"{self._scheme}:// cannot be read with the installed packages ({error}); "
                        "install those that fit: pip install 'stylepipe[remote]'"
                    ) from error
            return self._connected

    def _failure(self, name: str, error: Exception) -> UserError:
        """Return what a failed request is to the user; the status is somewhere in the chain of exceptions."""
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for one in chain:
            if isinstance(one, _HttpError):
                return self._refused(name, one.status, one.remedy, one.headers)
            if isinstance(one, UserError):
                return one
        for one in chain:
            if (answer := _status_of(one)) is not None:
                return self._refused(name, answer[0], headers=answer[1])
        if isinstance(error, FileNotFoundError):
            return self._refused(name, HTTPStatus.NOT_FOUND)
        if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # as gcsfs says it
            return self._refused(name, HTTPStatus.FORBIDDEN)
        if any(isinstance(one, TimeoutError) or "Timeout" in type(one).__name__ for one in chain):
            return RemoteError(f"{self.url(name)}: stalled, no byte came for {self._stall_s:g} s")
        message = f"{self.url(name)}: {type(error).__name__}: {redacted(str(error)) or 'no detail'}"
        # Wrong addresses, certificates, missing credentials and an interpreter that is ending do not mend themselves.
        lasting = isinstance(error, ValueError | RuntimeError) or "Credentials" in type(error).__name__
        return RemoteError(message, retry=not lasting)

    def _refused(self, name: str, status: int, remedy: str | None = None, headers: Any = None) -> RemoteError:
        known = status in HTTPStatus.__members__.values()
        said = f"HTTP {status} {HTTPStatus(status).phrase}" if known else f"HTTP {status}"
        remedy = remedy or _REMEDIES.get(status)
        return RemoteError(
            f"{self.url(name)}: {said}" + (f"; {remedy}" if remedy else ""),
            status=status,
            retry=status >= 500 or status in _PASSING_STATUSES,
            retry_after_s=_seconds((headers or {}).get("retry-after")),
        )


class PipeStore:
    """A shell command that writes a file to its standard output; see `open_store`."""

    ranged = False

    def __init__(self, command: str, stall_s: float = STALL_S) -> None:
        self._command = command.strip()
        self._stall_s = stall_s

    def url(self, name: str) -> str:
        """Return the command that gives a file, for messages."""
        return redacted(_PIPE + self._command_for(name))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return a whole file; raise RemoteError, also when asked for a part of one."""
        if start or end is not None:
            raise RemoteError(f"{self.url(name)}: a command gives whole files only, no ranges", retry=False)
        return b"".join(self.pieces(name, 0, 0))

    def pieces(self, name: str, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield what the command writes, whatever `end` is; raise RemoteError when it fails or stalls."""
        assert start == 0
        with (
            tempfile.TemporaryFile() as errors,  # a pipe that nobody empties would stop the command
            subprocess.Popen(
                self._command_for(name),
                shell=True,
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a process group of its own, to be ended as a whole
            ) as process,
        ):
            try:
                while data := self._next(name, process):
                    yield data
                status = process.wait(self._stall_s)
            except subprocess.TimeoutExpired:
                message = f"{self.url(name)}: the command does not end, {self._stall_s:g} s after its last byte"
                raise RemoteError(message) from None
            finally:
                if process.returncode is None:  # later its number may be another's
                    os.killpg(process.pid, signal.SIGKILL)
            if status:
                message = f"{self.url(name)}: exit status {status}, {_said(errors)}"
                raise RemoteError(message, status=status, retry=status not in _SHELL_CANNOT_RUN)

    def size(self, name: str) -> int | None:
        """Return None: a command does not tell."""
        return None

    def _command_for(self, name: str) -> str:
        name = shlex.quote(name)
        if "{}" in self._command:
            return self._command.replace("{}", name)
        return self._command + ("" if self._command.endswith(("/", "=")) else " ") + name

    def _next(self, name: str, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], self._stall_s)[0]:
            raise RemoteError(f"{self.url(name)}: stalled, no byte came for {self._stall_s:g} s")
        return os.read(process.stdout.fileno(), _PIPE_BYTES)


def redacted(text: str) -> str:
    """Return text for messages: passwords and query strings of its URLs, and tokens of headers, as ***."""
    text = re.sub(r"(?<=://)[^/\s'\"]+@", "***@", text)
    text = re.sub(r"\?[^\s'\"()<>]+", "?***", text)
    return re.sub(r"(?i)\b(bearer|basic)\s+[^\s'\"]+", r"\1 ***", text)


class _HttpError(Exception):
    """An HTTP answer that is not what was asked for, found before its body is read."""

    def __init__(self, status: int, headers: Any, remedy: str | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.remedy = remedy


async def _check_answer(response: ClientResponse) -> None:
    """Raise _HttpError for an error, for a whole file where a part was asked for, and for another part."""
    status, headers = response.status, response.headers
    if status >= 400:
        raise _HttpError(status, headers)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", response.request_info.headers.get("Range", ""))
    if asked is None:
        return
    if status != HTTPStatus.PARTIAL_CONTENT:
        raise _HttpError(status, headers, _WITHOUT_RANGES)
    sent = re.fullmatch(r"bytes (\d+)-(\d+)/.*", headers.get("Content-Range", ""))
    if sent is not None and sent[1] != asked[1]:
        raise _HttpError(status, headers, f"the server sent bytes from {sent[1]} on where {asked[1]} was asked for")
    if sent is not None and asked[2] and int(sent[2]) < int(asked[2]):
        size = int(sent[2]) + 1
        remedy = (
            f"the remote file has {size:,} bytes, fewer than the manifest says; copy the dataset there again, or start "
            f"anew if it has been replaced"
        )
        raise _HttpError(status, headers, remedy)


def _connect(scheme: str, stall_s: float) -> Any:
    """Return a file system of fsspec, with the user's options and ours, that tries once (hf: as it always does)."""
    fsspec = import_module("fsspec")
    kind: Any = fsspec.get_filesystem_class(scheme)
    if scheme == "gs":
        # Not the one that gcsfs registers: it asks by gRPC for the kind of the bucket first, and where a firewall stops
        # that, 60 s before every read.
        kind = import_module("gcsfs.core").GCSFileSystem
    users = fsspec.config.apply_config(kind, {})
    options = _options(scheme, stall_s)
    for option in options:
        if isinstance(users.get(option), dict):  # a MinIO's addressing style goes with our timeouts
            options[option] = {**users[option], **options[option]}
    file_system = kind(skip_instance_cache=True, **options)
    # fetching.py tries again, and counts.
    if scheme == "s3":
        file_system.retries = 1
    elif scheme == "gs" and hasattr(kind, "_request"):  # it is decorated with retries, 31 s of them
        file_system._request = MethodType(inspect.unwrap(kind._request), file_system)
    return file_system


def _options(scheme: str, stall_s: float) -> dict[str, Any]:
    """Return the file system's options: a limit on silence and none on the whole."""
    if scheme == "s3":
        timeouts = {"connect_timeout": stall_s, "read_timeout": stall_s}
        return {"config_kwargs": {**timeouts, "retries": {"max_attempts": 0}}}
    if scheme == "hf":
        return {}
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
    if scheme == "gs":
        return {"requests_timeout": timeout}
    session = {"timeout": timeout, "raise_for_status": _check_answer, "trust_env": True}
    # No compression: the bytes of the file, and lengths that are theirs.
    return {"client_kwargs": {**session, "skip_auto_headers": ["Accept-Encoding"]}}


def _status_of(error: BaseException) -> tuple[int, Any] | None:
    """Return HTTP status and headers of an error, as botocore, httpx and gcsfs keep them, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        metadata = response.get("ResponseMetadata", {})
        status, headers = metadata.get("HTTPStatusCode"), metadata.get("HTTPHeaders")
    else:
        status, headers = getattr(response, "status_code", None), getattr(response, "headers", None)
    if status is None and type(error).__name__ == "HttpError":  # gcsfs; aiohttp gives a cut body the code 400
        status = getattr(error, "code", None)
    return (int(status), headers) if re.fullmatch("[45][0-9][0-9]", str(status)) else None


def _seconds(retry_after: str | None) -> float | None:
    """Return a Retry-After header, a number of seconds or a date, as seconds from now."""
    if retry_after is None:
        return None
    with suppress(ValueError):
        return max(float(retry_after), 0.0)
    with suppress(ValueError, TypeError):
        return max((parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds(), 0.0)
    return None


def _said(errors: IO[bytes]) -> str:
    """Return the end of what a command wrote to stderr."""
    errors.seek(0)
    text = redacted(errors.read().decode(errors="replace").strip())
    return f"stderr: {text[-_STDERR_SHOWN:]}" if text else "nothing on stderr"
