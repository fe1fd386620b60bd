"""Faults of what lives on: processes that stand still or are slow, engines that somebody with the key has changed."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from deadlines import patience
from live import KEY, Live, Wrong, hang_s

STANDS_S, RUNS_S = 1.2, 0.04
"""A slow process has the processor for so long, in turns."""
SLOW_FOR_S = 12.0


def frozen(live: Live, chance: random.Random, role: str) -> None:
    """A role stands still for a moment, as on a machine that swaps."""
    process = live.process(role)
    try:
        process.suspend()
        time.sleep(chance.uniform(0.2, 1.5))
        process.resume()
    except psutil.NoSuchProcess:
        return


def hung(live: Live, _: random.Random, role: str) -> None:
    """A role stands still for good: it is named, killed and started again."""
    process = live.settled(role)
    before = live.said(" hangs")
    process.suspend()
    try:
        process.wait(patience(10.0) + 3 * hang_s())
    except psutil.TimeoutExpired:
        process.resume()
        raise Wrong(f"{role} stood still, and nobody killed it:\n{live.text()[-2000:]}") from None
    if live.said(" hangs") == before:
        raise Wrong(f"{role} stood still and ended, and nobody said that it hangs:\n{live.text()[-2000:]}")


def launcher_frozen(live: Live, _: random.Random) -> None:
    """The launcher stands still for longer than it lets others: it takes nobody else for hung afterwards."""
    assert live.launch is not None
    before, launcher = live.said(" hangs"), psutil.Process(live.launch.process.pid)
    launcher.suspend()
    time.sleep(hang_s() + 2.0)
    launcher.resume()
    live.step_after(time.time())
    if live.said(" hangs") > before:
        raise Wrong(f"the launcher stood still, and others were killed for it:\n{live.text()[-2000:]}")


@contextmanager
def _slowed(process: psutil.Process) -> Iterator[None]:
    """Let a process have a thirtieth of its time."""
    over = threading.Event()

    def turns() -> None:
        try:
            while not over.is_set():
                process.suspend()
                over.wait(STANDS_S)
                process.resume()
                over.wait(RUNS_S)
        except psutil.NoSuchProcess:  # somebody took it for hung
            return

    thread = threading.Thread(target=turns)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def slow(live: Live, _: random.Random, role: str) -> None:
    """An engine becomes many times slower for a while; where it has peers at work it is named, or taken for hung."""
    with _slowed(live.settled(role)):
        time.sleep(SLOW_FOR_S)
        live.alive()


# --- engines that somebody changes ----------------------------------------------------------------------------------


def _post(live: Live, role: str, route: str, **body: Any) -> None:
    """What somebody who has the key asks of the first engine of a role."""
    plan = live.plan()
    url = (plan.student_engines if role == "student-engine" else plan.teacher_engines)[0]
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + route, json.dumps(body).encode(), headers)
    try:
        urllib.request.urlopen(request, timeout=patience(30.0)).close()
    except urllib.error.HTTPError as error:
        with error:
            raise Wrong(f"{url}{route} answered {error.code}: {error.read()[:300]!r}") from None


def teacher_paused(live: Live, _: random.Random) -> None:
    """Somebody pauses a teacher: it goes on."""
    with live.will_say("was paused by somebody"):
        _post(live, "teacher-engine", "/pause_generation", mode="retract")


def student_paused(live: Live, _: random.Random) -> None:
    """Somebody pauses a student engine: the next weights, or the watch, let it go on."""
    _post(live, "student-engine", "/pause_generation", mode="in_place")


def teacher_relabelled(live: Live, chance: random.Random) -> None:
    """Somebody gives a teacher's weights another name: it is replaced."""
    with live.will_say("it began with"):
        _post(live, "teacher-engine", "/update_weight_version", new_version=f"by hand {chance.random()}")


def student_relabelled(live: Live, chance: random.Random) -> None:
    """Somebody gives a student's weights another name: it gets the present ones."""
    _post(live, "student-engine", "/update_weight_version", new_version=f"by hand {chance.random()}")


def student_swapped(live: Live, _: random.Random) -> None:
    """Somebody loads a student's first weights: it gets the present ones."""
    path = live.values["models"]["student"]["path"]
    # not flushed: that would be refused while an update holds the engine
    body = {"model_path": path, "weight_version": "default", "flush_cache": False}
    _post(live, "student-engine", "/update_weights_from_disk", **body)


def teacher_swapped(live: Live, _: random.Random) -> None:
    """Somebody loads another teacher: the engine says so, and is replaced."""
    with live.will_say("it began with"):
        _post(live, "teacher-engine", "/update_weights_from_disk", model_path=str(live.other_teacher))


def teacher_swapped_in_silence(live: Live, _: random.Random) -> None:
    """Somebody loads another teacher from files of the same name: canaries find it, and the run ends with its name."""
    files = Path(live.values["models"]["teacher"]["path"]) / "model.safetensors", live.folder.parent / "true"
    live.look()
    shutil.copyfile(*files)
    try:
        shutil.copyfile(live.other_teacher / "model.safetensors", files[0])
        _post(live, "teacher-engine", "/update_weights_from_disk", model_path=str(files[0].parent))
        live.ended(1, "a teacher must stay the same")
    finally:
        files[1].replace(files[0])
    if "suspect tokens since its last good canary" not in live.text():
        raise Wrong(f"nothing is suspect of a teacher that was replaced:\n{live.text()[-2000:]}")
    live.resume()


# --- engines that the run did not start -----------------------------------------------------------------------------


def outside_restarted(live: Live, chance: random.Random) -> None:
    """An engine that the run did not start dies and comes back with its first weights: it gets the present ones."""
    live.external.restart(chance.uniform(0.0, 2.0))


def outside_hung(live: Live, _: random.Random) -> None:
    """An engine that the run did not start stands still for so long that it is named, and goes on."""
    process = live.external.process()
    with live.will_say("the run did not start it"):
        process.suspend()
    process.resume()
