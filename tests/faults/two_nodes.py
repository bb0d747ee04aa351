"""Train on two nodes of one machine: network namespaces joined by a cable, with own addresses, names and disks.

    python tests/faults/two_nodes.py

trains without a fault, with the cable pulled, and with all processes of a node killed, each time to the end, and prints
what the nodes said and how far the result is from that of one process. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import psutil
from harness import (
    TINY,
    Training,
    accelerate,
    images_seen,
    largest_relative_difference,
    newest_whole_state,
    plain,
    prepare_faces,
    read_state,
    state_folders,
    stats_of,
    wait_until,
)

KIMG = 0.128
STALL_MINUTES = 0.25
RANK_LIMIT_S = 90.0  # for the ranks to end after a fault: what they may stall, and room for a busy machine
LAUNCHER_LIMIT_S = 30.0  # and then for the launchers
LINK_LOST = "link lost"
FAULTS = ("first node lost", "second node lost", LINK_LOST)
RENDEZVOUS = ("static", "c10d")
OPTIONS = [
    *TINY,
    *("--data", "faces16", "--res", 16, "--batch-size", 8, "--batch-gpu", 4, "--kimg", KIMG, "--out", "run"),
    *("--growth.start-res", 8, "--growth.stable-kimg", 0.032, "--growth.fade-kimg", 0.032),
    *("--snapshot-kimg", 0.032, "--tick-kimg", 0.008, "--grid-kimg", 10, "--stall-minutes", STALL_MINUTES),
]
_PREFIX = "stylepipe"
_INTERFACE = "cable"
_FOR_PEOPLE = re.compile(r"error( \(process \d+\))?: ")
# Names the host as well, in the launchers' and training's own view of the system alone.
_AS_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        number: 0 or 1, also its machine rank.
        namespace: name of its network.
        host, address: what the other one knows it by.
        disk: the folder that its trainings run in.
    """

    number: int
    namespace: str
    host: str
    address: str
    disk: Path


class TwoNodes:
    """Two nodes that exist within this context; processes, networks and names are gone behind it, however it ends.

    Args:
        folder: a new one for their disks.
        rendezvous: how launchers find one another. With static, accelerate's default, ranks are machine ranks; with
            c10d rank 0 is where the host's name sorts first, and each launcher asks that one without end.
        shared_disk: whether both nodes have the same.
    """

    def __init__(self, folder: Path, rendezvous: str = "static", shared_disk: bool = False) -> None:
        self._rendezvous = rendezvous
        folder.mkdir()
        names = [f"{_PREFIX}-{os.getpid()}-{number}" for number in (0, 1)]
        disks = [folder / "disk0", folder / ("disk0" if shared_disk else "disk1")]
        self.nodes = [
            Node(number, names[number], f"node{number}", f"10.77.0.{number + 1}", disks[number]) for number in (0, 1)
        ]
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{n.address} {n.host}\n" for n in self.nodes))
        faces = prepare_faces(folder, 16)
        for disk in {node.disk for node in self.nodes}:
            shutil.copytree(faces, disk / "faces16")
        self._port = 29500
        self._trainings: list[Training] = []

    def __enter__(self) -> TwoNodes:
        _remove_forgotten()
        try:
            for node in self.nodes:
                _ip("netns", "add", node.namespace)
            ends = [part for node in self.nodes for part in ("name", _INTERFACE, "netns", node.namespace)]
            _ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
            for node in self.nodes:
                _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", _INTERFACE)
                _ip("-n", node.namespace, "link", "set", "lo", "up")
                _ip("-n", node.namespace, "link", "set", _INTERFACE, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def start(self) -> tuple[Training, Training]:
        """Start a training that both nodes take part in; return its two launchers."""
        self._port += 1  # what a killed launcher listened on may be taken for a while
        first, second = (self._start_on(node) for node in self.nodes)
        return first, second

    def link(self, up: bool) -> None:
        """Plug the cable in at the second node, or pull it out."""
        _ip("-n", self.nodes[1].namespace, "link", "set", _INTERFACE, "up" if up else "down")

    def _start_on(self, node: Node) -> Training:
        launcher = ["--num_machines", "2", "--machine_rank", str(node.number)]
        launcher += ["--rdzv_backend", self._rendezvous]
        launcher += ["--main_process_ip", self.nodes[0].address, "--main_process_port", str(self._port)]
        inside = ["ip", "netns", "exec", node.namespace, "unshare", "--uts", "sh", "-c", _AS_HOST, "sh"]
        cores = sorted(os.sched_getaffinity(0))
        training = Training(
            [*inside, node.host, str(self._hosts), *accelerate(*OPTIONS, launcher=launcher)],
            node.disk,
            node.disk / "run",
            core=cores[node.number % len(cores)],  # each would take all of them
            environment={"GLOO_SOCKET_IFNAME": _INTERFACE, "TP_SOCKET_IFNAME": _INTERFACE},
        )
        self._trainings.append(training)
        return training

    def _remove(self) -> None:
        for training in self._trainings:
            training.kill_all()
        for node in self.nodes:
            with suppress(subprocess.CalledProcessError):  # was not made
                _ip("netns", "delete", node.namespace)


def why_not() -> str | None:
    """Return what is missing for two nodes on this machine, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"needs the command {tool}, to make network namespaces"
    name = f"{_PREFIX}-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"needs network namespaces: {error.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


@dataclass(frozen=True)
class Outcome:
    """What came of a training on two nodes.

    Attributes:
        out: folder of the run, on the disk of the node that has rank 0.
        went_on_from: images seen where each start of it began.
        newest: images seen of the newest whole state that the fault had left; None without a fault.
        seconds: of each node, from the fault until its rank had ended.
        messages: of each node, the last line it said that is meant for people; empty where there is none.
        codes: of each node, the launcher's exit code; None where it had to be killed.
    """

    out: Path
    went_on_from: list[int | None]
    newest: int | None = None
    seconds: list[float] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)


def train(nodes: TwoNodes, fault: str | None = None) -> Outcome:
    """Train to the end on two nodes; after a fault, one of FAULTS, both are started again."""
    before = Outcome(Path(), []) if fault is None else _interrupt(nodes, fault)
    both = nodes.start()
    for training in both:
        assert training.wait(300) == 0, training.output
    main = next(training for training in both if training.went_on_from is not None)
    return replace(before, out=main.out, went_on_from=[*before.went_on_from, main.went_on_from])


def _interrupt(nodes: TwoNodes, fault: str) -> Outcome:
    """Train until a fault comes, and see both ranks end, and the launchers."""
    both = nodes.start()
    main = _main_of(both)
    main.wait_for_images(72)  # between two states
    began = time.monotonic()
    if fault == LINK_LOST:
        nodes.link(False)
    else:
        both[FAULTS.index(fault)].kill_all()
    seconds: dict[int, float] = {}
    while len(seconds) < 2 and time.monotonic() - began < RANK_LIMIT_S:
        for number, training in enumerate(both):
            if number not in seconds and not training.ranks():
                seconds[number] = time.monotonic() - began
        time.sleep(0.05)
    for number, training in enumerate(both):
        assert number in seconds, f"{fault}: node{number} trains on for {RANK_LIMIT_S:g} s; it said:\n{training.output}"
    codes = [_code(training) for training in both]
    for training in both:
        training.kill_all()
    nodes.link(True)
    return Outcome(
        main.out,
        [main.went_on_from],
        newest_whole_state(main.out),
        [seconds[0], seconds[1]],
        [_message(training.output) for training in both],
        codes,
    )


def train_alone(folder: Path) -> Path:
    """Train the same in one process, on one core as each node's; return the folder of the run."""
    shutil.copytree(prepare_faces(folder, 16), folder / "disk" / "faces16")
    core = min(os.sched_getaffinity(0))
    with Training(plain(*OPTIONS), folder / "disk", folder / "disk" / "run", core=core) as training:
        assert training.wait(300) == 0, training.output
    return training.out


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each fault and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory(prefix="stylepipe-nodes-") as temporary:
        alone = train_alone(Path(temporary, "alone"))
        for rendezvous in RENDEZVOUS:
            for fault in (None, *FAULTS):
                with TwoNodes(Path(temporary, f"{rendezvous} {fault}"), rendezvous) as nodes:
                    rows.append(row(rendezvous, fault, train(nodes, fault), alone))
                print("\n".join(f"{name}: {value}" for name, value in rows[-1].items()), end="\n\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def row(rendezvous: str, fault: str | None, outcome: Outcome, alone: Path) -> dict[str, object]:
    """Describe a run on two nodes beside that of one process."""
    last = state_folders(outcome.out)[-1]
    difference, tensor = largest_relative_difference(read_state(last), read_state(alone / last.name))
    return {
        "run": f"two nodes, {rendezvous}: {fault or 'no fault'}",
        "world size": sorted({line["world_size"] for line in stats_of(outcome.out)}),
        "kimg": images_seen(outcome.out) / 1000,
        "went on from (images)": outcome.went_on_from,
        "largest relative difference to one process": f"{difference:.1e} ({tensor})",
        "ranks ended after (s)": [round(seconds, 1) for seconds in outcome.seconds],
        "launchers' exit codes": ["had to be killed" if code is None else code for code in outcome.codes],
        "messages": outcome.messages,
    }


def _main_of(both: Sequence[Training]) -> Training:
    """Return the training of the node that has rank 0, which need not be the first."""
    found: list[Training] = []

    def found_it() -> bool:
        found.extend(training for training in both if 0 in training.ranks())
        return bool(found)

    wait_until(found_it, "rank 0", 120)
    return found[0]


def _code(training: Training) -> int | None:
    try:
        return training.wait(LAUNCHER_LIMIT_S)
    except AssertionError:
        return None


def _message(output: str) -> str:
    """Return the last line of an output that speaks to people, or nothing."""
    return next((line for line in reversed(output.splitlines()) if _FOR_PEOPLE.match(line)), "")


def _remove_forgotten() -> None:
    """Remove the networks of processes that were killed before they could do it themselves."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        found = re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", name)
        if found and not psutil.pid_exists(int(found[1])):
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
