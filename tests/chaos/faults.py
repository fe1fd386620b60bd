"""Faults of processes and disks, and strangers: what each does to a run, and how the run has to take it.

An act returns when the run is up again or goes on; it raises `Wrong` where the run ended in another way than it should.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from live import WORDS, Live
from outsiders import OUTSIDERS

REFUSED = "no checkpoint after step "
"""How a run ends whose checkpoint has no room."""

# --- processes ------------------------------------------------------------------------------------------------------


def signalled(live: Live, _: random.Random, role: str, number: int, first: bool = False) -> None:
    """One process of a role gets a signal."""
    try:
        live.process(role, first).send_signal(number)
    except psutil.NoSuchProcess:
        live.process(role, first).send_signal(number)


def everybody_killed(live: Live, _: random.Random) -> None:
    """Signal 9 to every process at once, the launcher too."""
    for process in live.look():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    live.killed()
    live.resume()


def two_killed(live: Live, chance: random.Random) -> None:
    """Two roles die at the same time."""
    for role in chance.sample([role for role in live.roles if role in WORDS], 2):
        signalled(live, chance, role, signal.SIGKILL)


def launcher_killed(live: Live, _: random.Random) -> None:
    """Signal 9 to the launcher: everything goes with it."""
    live.killed()
    live.resume()


def stopped(live: Live, _: random.Random, number: int) -> None:
    """An orderly stop, and a start that goes on."""
    live.stop(number)
    live.resume()


def stopped_twice(live: Live, chance: random.Random) -> None:
    """Ctrl-C twice: everything ends at once."""
    assert live.launch is not None
    live.look()
    live.launch.interrupt()
    time.sleep(chance.uniform(0.0, 0.3))
    live.launch.interrupt()
    live.ended(130)
    live.resume()


# --- disks ----------------------------------------------------------------------------------------------------------


def full_disk(live: Live, _: random.Random) -> None:
    """The disk of the run's folder fills up: the next checkpoint ends the run."""
    live.sealed(1)
    live.disk.fill(live.look())
    live.ended(1, REFUSED)
    live.disk.free()
    live.resume()


def full_for_a_moment(live: Live, chance: random.Random) -> None:
    """The same, but somebody makes room again, perhaps before a checkpoint is due."""
    live.sealed(1)
    live.disk.fill(live.look())
    time.sleep(chance.uniform(0.0, 0.5))
    live.disk.free()
    if not live.saves_again(REFUSED):
        live.ended(1, REFUSED)
        live.resume()


def read_only(live: Live, _: random.Random) -> None:
    """The folder of checkpoints cannot be written any more: a file stands where the next one belongs."""
    newest = live.sealed(1)[-1]
    step = int(newest.name.removeprefix("step_"))
    live.look()
    for ahead in range(step + 1, step + 60):
        path = newest.parent / f"step_{ahead:08d}"
        if not path.exists():
            path.symlink_to("/proc/1/no-such-folder")
    live.ended(1, REFUSED)
    for link in newest.parent.glob("step_*"):
        if link.is_symlink():
            link.unlink()
    live.resume()


# --- what lies on a disk --------------------------------------------------------------------------------------------


def flip_bit(path: Path, chance: random.Random) -> None:
    """Change one bit of a file."""
    place = chance.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ (1 << chance.randrange(8))
        file.seek(place)
        file.write(bytes([byte]))


def cut_short(path: Path, chance: random.Random) -> None:
    """Lose the end of a file."""
    os.truncate(path, chance.randrange(path.stat().st_size))


def removed(path: Path, _: random.Random) -> None:
    """Lose a file."""
    path.unlink()


def damaged(live: Live, chance: random.Random, pattern: str, harm: Callable[[Path, random.Random], None]) -> None:
    """A file of the newest checkpoint is harmed while nobody runs: the run goes on from the one before, and says so."""
    live.sealed(2)
    live.killed()
    newest = live.sealed(2)[-1]
    harm(chance.choice(sorted(newest.glob(pattern))), chance)
    live.resume()
    assert live.launch is not None
    live.launch.wait_for_text("going back to step ", 60.0)
    for aside in live.folder.glob("checkpoints/*.damaged"):
        shutil.rmtree(aside)


def damaged_under_way(live: Live, chance: random.Random) -> None:
    """A bit of the newest checkpoint flips while the run goes on, and then the learner dies."""
    for _ in range(20):
        newest = live.sealed(2)[-1]
        try:
            flip_bit(newest / "frontier.msgpack", chance)
            break
        except OSError:  # pruned meanwhile
            continue
    signalled(live, chance, "learner", signal.SIGKILL)
    live.step_after(time.time() + 0.5)
    for aside in live.folder.glob("checkpoints/*.damaged"):
        shutil.rmtree(aside)


def half_a_row(live: Live, chance: random.Random, name: str) -> None:
    """The machine lost its power in the middle of a row."""
    live.killed()
    with (live.folder / name).open("ab") as file:
        file.write(b'{"step": 1234, "vers'[: chance.randrange(1, 20)])
    live.resume()


def leftover(live: Live, _: random.Random) -> None:
    """A checkpoint that was being written when everything ended."""
    newest = live.sealed(1)[-1]
    live.killed()
    newest = live.sealed(1)[-1]
    half = newest.with_name(f"step_{int(newest.name[5:]) + 1:08d}")
    shutil.copytree(newest, half, dirs_exist_ok=True)
    (half / "complete.json").unlink(missing_ok=True)
    live.resume()


def outsider(live: Live, chance: random.Random, name: str) -> None:
    """Somebody who is not of the run knocks at its doors."""
    OUTSIDERS[name](live.plan(), chance)
