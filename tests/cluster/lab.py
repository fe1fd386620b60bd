"""Several hosts on one machine: each with a network, a hostname, a process table and a /dev/shm of its own.

    with Lab(["h0", "h1"]) as lab:
        process = lab["h1"].start([...])     a process of the host; it ends with the lab
        lab["h1"].cut(); lab["h1"].heal()    a partition: packets vanish, and nobody is told
        lab["h1"].power_off()                every process gone at once, and no packet says so
    lab["h1"].power_on()                 the same host, with nothing running on it

A host is a set of Linux namespaces, kept by a `cat` that ends when this process does. The hosts share the file system,
the clock and the processors. The switch between them is a bridge in a namespace of its own: nothing of the machine's
network is touched, and two labs at once do not meet. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from deadlines import patience

NETWORK = "10.88.0"
TOOLS = ("unshare", "nsenter", "ip")
OWN = ("/dev/shm", "/run")
"""Folders of which each host has one of its own."""


class LabError(Exception):
    """No host can be made here, or a command on one has failed."""


def _ip(namespace: int, *words: str) -> None:
    """Run `ip` in the network namespace of a process."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{namespace}/ns/net", "ip", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class _Keeper:
    """Namespaces, and the `cat` that keeps them; they end when its input does."""

    def __init__(self, *flags: str) -> None:
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise LabError(f"hosts of the lab need {', '.join(missing)}; install util-linux and iproute2")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            ["unshare", *flags, "cat"], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"there?\n")
            self._process.stdin.flush()
        if self._process.stdout.readline() != b"there?\n":
            _, errors = self._process.communicate()
            raise LabError(
                f"hosts of the lab are network namespaces, which cannot be made here: {errors.decode().strip()}; run "
                f"these "
                "tests as root, in a container with CAP_SYS_ADMIN and CAP_NET_ADMIN"
            )
        children = psutil.Process(self._process.pid).children()
        self.pid = children[0].pid if children else self._process.pid
        """Pid, seen from outside, of the `cat`: the first process of the namespaces."""

    def end(self) -> None:
        """Kill everything in the namespaces."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


class Host:
    """One host of a lab."""

    def __init__(self, name: str, address: str, switch: int) -> None:
        self.name = name
        self.address = address
        self._switch = switch
        self._port = f"to-{name}"
        self._names = ""
        self._boot()

    def _boot(self) -> None:
        self._keeper = _Keeper("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
        self._init = self._keeper.pid
        self._off = False
        self._started: list[subprocess.Popen[bytes]] = []
        self.run(["hostname", self.name])
        for folder in OWN:
            self.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder])
        _ip(self._switch, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self._init))
        self.heal()
        _ip(self._switch, "link", "set", self._port, "up")
        number = int(self.address.rpartition(".")[2])
        _ip(self._init, "link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}")  # also after a power cut
        _ip(self._init, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip(self._init, "link", "set", interface, "up")

    def command(self, words: Sequence[str], folder: Path | None = None) -> list[str]:
        """`words` as a command for the outside that runs them on this host, in `folder` or the present one."""
        into = [f"--{space}" for space in ("net", "uts", "ipc", "mount", "pid")]
        return ["nsenter", "--target", str(self._init), *into, f"--wdns={folder or Path.cwd()}", *words]

    def run(self, words: Sequence[str]) -> str:
        """Run a command to its end; returns what it printed."""
        done = subprocess.run(self.command(words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"{self.name}: {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def start(
        self, words: Sequence[str], env: Mapping[str, str], output: Path, folder: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command whose output goes to a file, in `folder` or the present one."""
        with output.open("a") as out:
            process = subprocess.Popen(
                self.command(words, folder),
                env={**os.environ, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def processes(self, *words: str) -> list[psutil.Process]:
        """The host's processes whose command line has all of `words`; never its keeper, nor zombies."""
        mine = Path(f"/proc/{self._init}/ns/pid").stat().st_ino if Path(f"/proc/{self._init}").exists() else None
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or [])
            try:
                here = Path(f"/proc/{process.pid}/ns/pid").stat().st_ino == mine
            except OSError:
                continue
            alive = process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != self._init
            if here and alive and all(word in line for word in words):
                found.append(process)
        return found

    def signal(self, word: str, number: int) -> None:
        """Send a signal to the host's processes whose command line has `word`."""
        for process in self.processes(word):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def has_name(self, text: str) -> None:
        """Give the host an /etc/hosts with this text, for good."""
        self._names = text
        with tempfile.NamedTemporaryFile("w", suffix=".hosts", delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        self.run(["cp", file.name, "/run/hosts"])
        self.run(["mount", "--bind", "/run/hosts", "/etc/hosts"])
        Path(file.name).unlink()

    def hide(self, folder: Path) -> None:
        """Put an empty folder of the host's own in the place of a shared one."""
        self.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(folder)])

    def cut(self) -> None:
        """Begin a partition of this host from all others."""
        _ip(self._switch, "link", "set", self._port, "nomaster")

    def heal(self) -> None:
        """End the partition."""
        _ip(self._switch, "link", "set", self._port, "master", "switch")

    def unplug(self) -> None:
        """Take the interface down: the host's own kernel knows."""
        _ip(self._init, "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Bring the interface up again."""
        _ip(self._init, "link", "set", "eth0", "up")

    def power_off(self) -> None:
        """End every process of the host, with no packet that says so."""
        if self._off:
            return
        self._off = True
        with contextlib.suppress(LabError):
            self.cut()
        self._keeper.end()
        for process in self._started:  # of each the nsenter on the outside is left
            process.wait(patience(30))

    def power_on(self) -> None:
        """Start a host again that was switched off: its name, its addresses, and no process."""
        with contextlib.suppress(LabError):  # it may have gone with the host's own end of the cable
            _ip(self._switch, "link", "del", self._port)
        self._boot()
        self.has_name(self._names)


class Lab:
    """Hosts behind one switch; a context manager."""

    def __init__(self, names: Sequence[str]) -> None:
        self._stack = contextlib.ExitStack()
        self.hosts: dict[str, Host] = {}
        with contextlib.ExitStack() as made:
            switch = _Keeper("--net")
            made.callback(switch.end)
            _ip(switch.pid, "link", "add", "switch", "type", "bridge", "stp_state", "0", "forward_delay", "0")
            _ip(switch.pid, "link", "set", "switch", "up")
            for number, name in enumerate(names, 10):
                self.hosts[name] = host = Host(name, f"{NETWORK}.{number}", switch.pid)
                made.callback(host.power_off)
            self._stack = made.pop_all()
        table = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        for host in self.hosts.values():
            host.has_name(table)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()


def until(true: Callable[[], Any], what: Callable[[], str], deadline_s: float = 60.0) -> None:
    """Look again and again until it is `true`; a failure says `what` was waited for."""
    give_up = time.monotonic() + patience(deadline_s)
    while not true():
        assert time.monotonic() < give_up, f"not within {patience(deadline_s):.0f} s: {what()}"
        time.sleep(0.1)
