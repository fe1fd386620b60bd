"""One run under faults: started, broken, resumed, and watched step by step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from audit import left_of, ports_in_use
from deadlines import patience
from external import External
from harness import Launch
from island import Island
from small_disk import SmallDisk

from opd_async.cluster.scratch import PREFIX
from opd_async.plan.plan import Plan

WORDS = {
    "rollout": ("actors.rollout",),
    "teacher": ("actors.teacher",),
    "student-engine": ("actors.engine.server", "student"),
    "teacher-engine": ("actors.engine.server", "teacher"),
    "intake": ("actors.intake",),
    "learner": ("learner.main",),
}
TAIL_BYTES = 1 << 16
SPEED = 0.7
"""Full speed: this share of the median before the fault, over a window of rows."""
WINDOW = 4
SPEED_WITHIN_S = 20.0
KEY = "a-key-of-the-chaos"
"""Of every engine: somebody has it."""


def hang_s() -> float:
    """`supervisor.heartbeat_deadline_s` of a run that starts now: short, and longer on a busy machine."""
    return 6.0 * max(1.0, os.getloadavg()[0] / (2 * (os.cpu_count() or 1)))


def age_s() -> float:
    """Seconds after its start from which a process is surely up and heard."""
    return min(4 * hang_s(), 60.0)


class Wrong(Exception):
    """The run did something else than a fault of this kind deserves."""


class Live:
    """A run of one regime in a folder on a disk of its own."""

    def __init__(
        self, root: Path, values: dict[str, Any], roles: Sequence[str], island: Island, external: External | None
    ) -> None:
        """The run `values` in the folder `root`, on an island, with an engine that it did not start or without."""
        self.values = values
        self.roles = roles
        self.island = island
        self._external = external
        self.folder = Path(values["run_dir"]) / values["name"]
        self.temporary = root / "tmp"
        self.temporary.mkdir(parents=True)
        self._file = root / "run.yaml"
        self._own_teacher(root)
        self._file.write_text(yaml.safe_dump(values))
        self.disk = SmallDisk(self.folder, mib=192)
        self.left: list[str] = []
        self._rates: list[float] = []
        self.launch: Launch | None = None
        self.launched_at = 0.0
        """`time.time` of the last launch."""
        self.family: list[psutil.Process] = []

    def _own_teacher(self, root: Path) -> None:
        """Give the run a copy of its teacher, whose files a fault may replace."""
        path = Path(self.values["models"]["teacher"]["path"])
        self.other_teacher = path.with_name("other")
        self.values["models"]["teacher"]["path"] = str(shutil.copytree(path, root / "teacher"))

    def __enter__(self) -> Live:
        self.disk.__enter__()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.launch is not None:
            self.launch.__exit__()
        self.island.heal()
        self.disk.__exit__()

    @property
    def external(self) -> External:
        """The engine that the run did not start."""
        assert self._external is not None
        return self._external

    # --- start and end -------------------------------------------------------------------------------------------

    def start(self, *options: str) -> None:
        """Launch, with a folder for temporary files of its own: what is left in it is left behind."""
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(self.temporary)
        try:
            self.launched_at = time.time()
            self.launch = Launch(self._file, *options)
        finally:
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before

    def look(self) -> list[psutil.Process]:
        """Note who belongs to the run now."""
        assert self.launch is not None
        self.family = self.launch.family()
        return [psutil.Process(self.launch.process.pid), *self.family]

    def ended(self, code: int, words: str = "") -> None:
        """Wait for the launch to end in this way, and see that it leaves nothing; raises `Wrong`."""
        assert self.launch is not None
        found = self.launch.wait(120.0)
        text = self.launch.text()
        if found != code or words not in text or "a defect of this program" in text:
            raise Wrong(f"ended with {found}, not {code} and {words!r}:\n{text[-3000:]}")
        self._nothing_left()

    def _nothing_left(self) -> None:
        psutil.wait_procs(self.family, timeout=patience(10.0))
        plan = Plan.model_validate_json((self.folder / "plan.json").read_bytes())
        self.left += [*left_of(self.family), *ports_in_use(plan)]
        # the folder of a launcher that was killed goes with the next start
        killed = self.launch is not None and self.launch.process.returncode == -signal.SIGKILL
        temporary = [path for path in self.temporary.iterdir() if not (killed and path.name.startswith(PREFIX))]
        self.left += [f"temporary file: {path}" for path in temporary]

    def killed(self) -> None:
        """Signal 9 to the launcher; raises `Wrong` if anything outlives it."""
        assert self.launch is not None
        self.look()
        self.launch.process.kill()
        self.launch.process.wait()
        self._nothing_left()

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        self.start("--resume")

    def stop(self, number: int = signal.SIGINT) -> None:
        """An orderly end, as by Ctrl-C."""
        assert self.launch is not None
        self.look()
        self.launch.interrupt(number)
        self.ended(130)

    # --- processes and files -------------------------------------------------------------------------------------

    def process(self, role: str, first: bool = False) -> psutil.Process:
        """A role's process, once there is one: the innermost, or the `first` of its family."""
        give_up = time.monotonic() + patience(30.0)
        while time.monotonic() < give_up:
            found = [one for one in self.look()[1:] if _is(one, WORDS[role])]
            if found:
                return found[0] if first else found[-1]
            time.sleep(0.05)
        raise Wrong(f"no process of {role}")

    def settled(self, role: str) -> psutil.Process:
        """A role's process, once it has been up for so long that it is expected to give signs of life."""
        while True:
            process = self.process(role)
            try:
                young_s = age_s() - (time.time() - process.create_time())
            except psutil.NoSuchProcess:
                continue
            if young_s <= 0.0:
                return process
            self.alive()
            time.sleep(min(young_s, 1.0))

    def sealed(self, at_least: int = 1) -> list[Path]:
        """The checkpoints that there are, newest last, once there are so many."""
        give_up = time.monotonic() + patience(60.0)
        while time.monotonic() < give_up:
            found = sorted(marker.parent for marker in (self.folder / "checkpoints").glob("step_*/complete.json"))
            found = [folder for folder in found if not folder.name.endswith(".damaged")]
            if len(found) >= at_least:
                return found
            self.alive()
            time.sleep(0.05)
        raise Wrong(f"no {at_least} checkpoints")

    def saves_again(self, refused: str) -> bool:
        """Whether a checkpoint that is begun from now on is written; False once the launch has said `refused`.

        Raises `Wrong` if neither comes to pass.
        """
        give_up, seen = time.monotonic() + patience(90.0), {folder.name for folder in self.sealed(1)}
        later: set[str] = set()
        while time.monotonic() < give_up:
            over = self.ended_by_itself()
            if refused in self.text():
                return False
            if over:
                break
            later |= {folder.name for folder in self.sealed(1)} - seen
            if len(later) > 1:  # the first may have been under way
                return True
            time.sleep(0.05)
        self.alive()
        raise Wrong(f"no checkpoint was written, and none refused:\n{self.text()[-3000:]}")

    def plan(self) -> Plan:
        """The plan of the launch."""
        return Plan.model_validate_json((self.folder / "plan.json").read_bytes())

    # --- watching ------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """The last rows of steps."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:  # the first may be cut
                continue
        return [row for row in rows if "evaluation" not in row]

    def text(self) -> str:
        """What the launch has printed."""
        assert self.launch is not None
        return self.launch.text()

    def said(self, words: str) -> int:
        """How often the launch has printed `words`."""
        return self.text().count(words)

    @contextmanager
    def will_say(self, words: str) -> Iterator[None]:
        """What is done in the block makes the launch print `words` once more; raises `Wrong` if it does not."""
        before, give_up = self.said(words), time.monotonic() + patience(20.0)
        yield
        while self.said(words) == before:
            self.alive()
            if time.monotonic() > give_up:
                raise Wrong(f"{words!r} was not printed:\n{self.text()[-3000:]}")
            time.sleep(0.05)

    def ended_by_itself(self) -> bool:
        """Whether the launch is over."""
        assert self.launch is not None
        return self.launch.process.poll() is not None

    def alive(self) -> None:
        """Raise `Wrong` if the launch has ended by itself."""
        assert self.launch is not None
        if self.ended_by_itself():
            code, text = self.launch.process.returncode, self.launch.text()
            raise Wrong(f"the run ended by itself with {code}:\n{text[-3000:]}")

    def step_after(self, moment: float, deadline_s: float = 90.0) -> float:
        """Seconds from `moment` (`time.time`) to the first step that is done later; raises `Wrong` for none.

        A step that an earlier launch has finished does not count.
        """
        give_up = time.monotonic() + patience(deadline_s)
        while time.monotonic() < give_up:
            later = [row["time"] for row in self.rows() if row["time"] > max(moment, self.launched_at)]
            if later:
                return float(min(later) - moment)
            self.alive()
            time.sleep(0.05)
        raise Wrong(f"no step in {patience(deadline_s):.0f} s after the fault")

    def speed_after(self, moment: float) -> float | None:
        """Seconds from `moment` until steps are as fast as before it; None if they are not soon."""
        usual = statistics.median(self._rates) if self._rates else 0.0
        give_up = time.monotonic() + SPEED_WITHIN_S
        while time.monotonic() < give_up:
            later = [row for row in self.rows() if row["time"] > max(moment, self.launched_at)]
            for index in range(WINDOW, len(later)):
                part = later[index - WINDOW : index + 1]
                if _rate(part) >= SPEED * usual:
                    self._rates.append(_rate(part))
                    return float(part[0]["time"] - moment)
            self.alive()
            time.sleep(0.1)
        return None

    def measure(self) -> None:
        """Note how fast the run is now."""
        rows = self.rows()
        if len(rows) > WINDOW:
            self._rates.append(_rate(rows[-WINDOW - 1 :]))


def _rate(rows: list[dict[str, Any]]) -> float:
    """Tokens per second over some rows that follow one another."""
    return float(sum(row["tokens"] for row in rows[1:]) / max(rows[-1]["time"] - rows[0]["time"], 1e-3))


def _is(process: psutil.Process, words: tuple[str, ...]) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return all(word in line for word in words)
