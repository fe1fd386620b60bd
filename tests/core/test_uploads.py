"""Copies of checkpoints in a store: what is there when, what a failed or late one leads to, and the way back.

The store is a folder, by fsspec's `file://`; clients that fail or hang are small programs in the place of the transfer.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from deadlines import patience
from small_runs import small_topology

from opd_async.checks.uploads import upload_problems
from opd_async.errors import InputError, OpdError
from opd_async.run import checkpoints
from opd_async.run.remote import Store, carry_out, get_newest, put_checkpoint, without_keys
from opd_async.run.uploads import COMMAND, Uploads, settle, transfer

TOPOLOGY = (
    "name: run\nengines:\n  student: {api_key: secret-1, urls: [a]}\n  more: [{admin_api_key: secret-2}]\nlr: 0.0001\n"
)


def checkpoint(run: Path, step: int) -> Path:
    """A sealed checkpoint of a run with records."""
    folder = checkpoints.step_folder(run / "checkpoints", step)
    (folder / "learner").mkdir(parents=True)
    (folder / "learner" / "shard.bin").write_bytes(bytes([step % 256]) * 5000)
    (folder / "frontier.msgpack").write_text(f"frontier {step}")
    checkpoints.seal(folder, step)
    (run / "topology.yaml").write_text(TOPOLOGY)
    (run / "inputs.json").write_text("{}")
    (run / "metrics.jsonl").write_text("{}\n" * step)
    return folder


def store(folder: Path) -> Store:
    return Store(f"file://{folder}")


def test_a_checkpoint_comes_back_whole_and_without_keys(tmp_path: Path) -> None:
    run, there, back = tmp_path / "run", tmp_path / "store" / "run", tmp_path / "elsewhere" / "run"
    for step in (5, 10, 15):
        put_checkpoint(run, store(there), checkpoint(run, step).name, keep=2)
    assert store(there).steps() == ["step_00000010", "step_00000015"]
    assert "secret" not in (there / "topology.yaml").read_text()
    assert get_newest(store(there), back) == "step_00000015"
    assert checkpoints.newest(back / "checkpoints").step == 15
    assert (back / "metrics.jsonl").read_text() == "{}\n" * 15
    assert sorted(path.name for path in back.parent.iterdir()) == ["run"], "nothing is left beside it"


def test_a_cut_off_upload_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, there = tmp_path / "run", tmp_path / "store"
    put_checkpoint(run, store(there), checkpoint(run, 5).name, keep=2)
    put = Store.put

    def cut_off(self: Store, path: Path, name: str) -> None:
        if name.endswith("shard.bin"):
            raise OSError("the line is dead")
        put(self, path, name)

    monkeypatch.setattr(Store, "put", cut_off)
    with pytest.raises(OSError, match="the line is dead"):
        put_checkpoint(run, store(there), checkpoint(run, 10).name, keep=2)
    assert get_newest(store(there), tmp_path / "back") == "step_00000005"
    assert store(there).cut_off() == ["step_00000010"]
    monkeypatch.undo()
    put_checkpoint(run, store(there), checkpoint(run, 15).name, keep=2)
    left = sorted(path.name for path in (there / "checkpoints").iterdir())
    assert left == ["step_00000005", "step_00000015"], "what was cut off has gone too"


def test_a_fetch_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, there = tmp_path / "run", tmp_path / "store"
    put_checkpoint(run, store(there), checkpoint(run, 5).name, keep=2)
    monkeypatch.setattr(Store, "get_folder", lambda *_: (_ for _ in ()).throw(OSError("the line is dead")))
    with pytest.raises(OSError, match="the line is dead"):
        get_newest(store(there), tmp_path / "back" / "run")
    assert list((tmp_path / "back").iterdir()) == []


def test_an_export_that_is_replaced_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, there = tmp_path / "run", tmp_path / "store"
    (run / "export").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (run / "export" / name).write_text(name)
    carry_out(["export", str(run), f"file://{there}", "export"])
    assert {path.name for path in (there / "export").iterdir()} == {"config.json", "model.safetensors"}
    monkeypatch.setattr(Store, "put", lambda *_: (_ for _ in ()).throw(OSError("the line is dead")))
    with pytest.raises(OSError, match="the line is dead"):
        carry_out(["export", str(run), f"file://{there}", "export"])
    assert not (there / "export" / "config.json").exists(), "no reader takes it for a model"


def test_keys_leave_a_topology_wherever_they_are() -> None:
    text = without_keys(TOPOLOGY)
    assert "secret" not in text and "urls" in text and "lr: 0.0001" in text


class Sent:
    """Uploads of a run, with a program in the place of the transfer."""

    def __init__(self, run: Path, command: Sequence[str], deadline_s: float = patience(60.0)) -> None:
        self.said: list[str] = []
        self.counts: Counter[str] = Counter()
        self.uploads = Uploads(
            run,
            f"file://{run.parent}/store",
            keep=2,
            deadline_s=deadline_s,
            say=self.said.append,
            count=lambda result: self.counts.update([result]),
            command=command,
        )

    async def all_of(self, *folders: Path) -> None:
        async with asyncio.timeout(patience(60)), asyncio.TaskGroup() as group:
            sending = group.create_task(self.uploads.run())
            for folder in folders:
                self.uploads.offer(folder)
            await self.uploads.finish()
            sending.cancel()


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_checkpoint_and_export_are_sent_by_a_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = checkpoint(run, 5)
    (run / "export").mkdir()
    (run / "export" / "config.json").write_text("{}")
    sent = Sent(run, COMMAND)
    asyncio.run(sent.all_of(folder, run / "export"))
    assert sent.counts == {"done": 2} and sent.said == []
    assert store(tmp_path / "store").steps() == ["step_00000005"]
    assert (tmp_path / "store" / "export" / "config.json").is_file()


def test_the_newest_is_sent_where_several_wait(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folders = [checkpoint(run, step) for step in (5, 10, 15)]
    sent = Sent(run, COMMAND)
    asyncio.run(sent.all_of(*folders))
    assert sent.counts == {"skipped": 2, "done": 1}
    assert store(tmp_path / "store").steps() == ["step_00000015"]


def test_what_is_being_sent_stays_until_it_is_there(tmp_path: Path) -> None:
    """Each copy takes as long as two checkpoints, of which the run keeps one."""
    run, go = tmp_path / "run", tmp_path / "go"
    text = (
        f"import pathlib, sys, time; from opd_async.run.remote import main\n"
        f"while not pathlib.Path({str(go)!r} + sys.argv[4]).exists(): time.sleep(.02)\n"
        f"main()"
    )
    sent = Sent(run, program(text))

    async def saved() -> None:
        async with asyncio.timeout(patience(60)), asyncio.TaskGroup() as group:
            sending = group.create_task(sent.uploads.run())
            for step in (1, 2, 3, 4):
                sent.uploads.offer(folder := checkpoint(run, step))
                checkpoints.prune(run / "checkpoints", 1, sent.uploads.under_way())
                await asyncio.sleep(0)
                if step == 1:
                    while sent.uploads.under_way() != folder:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
            left = sorted(path.name for path in (run / "checkpoints").iterdir())
            assert left == ["step_00000001", "step_00000004"]
            for name in ("step_00000001", "step_00000004"):
                go.with_name(f"go{name}").touch()
            await sent.uploads.finish()
            sending.cancel()

    asyncio.run(saved())
    assert sent.counts == {"skipped": 2, "done": 2} and sent.said == []
    assert sent.uploads.under_way() is None
    assert store(tmp_path / "store").steps() == ["step_00000001", "step_00000004"]


def test_what_fails_is_said_and_tried_again_at_the_end(tmp_path: Path) -> None:
    sent = Sent(tmp_path / "run", program("import sys; sys.exit('AccessDenied: not yours')"))
    asyncio.run(sent.all_of(checkpoint(tmp_path / "run", 5)))
    assert sent.counts == {"failed": 2}
    assert f"step_00000005 is not in file://{tmp_path}/store: AccessDenied: not yours; the run goes on" in sent.said[0]
    assert sent.said[-1].endswith("step_00000005 by hand")


def test_a_store_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    sent = Sent(tmp_path / "run", program("import time; time.sleep(600)"), deadline_s=0.2)
    asyncio.run(sent.all_of(checkpoint(tmp_path / "run", 5)))
    assert sent.counts == {"failed": 2} and "not done within 0.2 s" in sent.said[0]


def test_a_transfer_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    text = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    async def cancelled() -> None:
        task = asyncio.create_task(transfer([], 60.0, program(text)))
        async with asyncio.timeout(patience(30)):
            while not (mark.exists() and mark.read_text()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not Path(f"/proc/{mark.read_text()}").exists()


def test_a_store_that_takes_nothing_is_found_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = small_topology(tmp_path, f"checkpoint.upload=file://{tmp_path}/file")
    [problem] = upload_problems(refused)
    assert problem.startswith(f"checkpoint.upload: file://{tmp_path}/file/small: cannot be written: ")
    [unknown] = upload_problems(small_topology(tmp_path, "checkpoint.upload=s4://bucket"))
    assert "s4" in unknown
    assert list(upload_problems(small_topology(tmp_path, f"checkpoint.upload=file://{tmp_path}/new"))) == []
    assert list((tmp_path / "new" / "small").iterdir()) == []
    assert list(upload_problems(small_topology(tmp_path))) == []


def test_the_way_back_says_what_is_missing(tmp_path: Path) -> None:
    topology = small_topology(tmp_path, f"checkpoint.upload=file://{tmp_path}/new")
    said: list[str] = []
    with pytest.raises(InputError, match="no whole checkpoint is there; start the run without --resume"):
        asyncio.run(settle(topology, tmp_path / "run", said.append, True))
    assert said and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    asyncio.run(settle(topology, tmp_path / "run", said.append, True))
    assert len(said) == 1, "a folder that is there is not looked for elsewhere"


def test_another_runs_copies_are_not_touched(tmp_path: Path) -> None:
    topology = small_topology(tmp_path, f"checkpoint.upload=file://{tmp_path}/store")
    asyncio.run(settle(topology, tmp_path / "new", print, False))
    put_checkpoint(tmp_path / "run", store(tmp_path / "store" / "small"), checkpoint(tmp_path / "run", 50).name, keep=2)
    with pytest.raises(InputError, match=r"holds step_00000050 of a run already; choose another name"):
        asyncio.run(settle(topology, tmp_path / "new", print, False))


def test_what_a_run_has_gone_back_from_leaves_the_store(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "store"
    for step in (10, 30, 40, 20):
        put_checkpoint(run, store(there), checkpoint(run, step).name, keep=2)
    assert store(there).steps() == ["step_00000020"], "10 had made room for 40, 30 and 40 are of a lost time"


def test_a_file_that_arrives_short_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    there = store(tmp_path / "store")
    monkeypatch.setattr(type(there._system), "put_file", lambda self, path, name: Path(name).write_bytes(b"123"))
    with pytest.raises(OpdError, match="file has 3 bytes there instead of 5"):
        there.put(tmp_path / "file", "file")


def test_an_upload_is_written_as_an_address(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.upload"):
        small_topology(tmp_path, "checkpoint.upload=bucket/runs")
    assert small_topology(tmp_path, "checkpoint.upload=s3://b/r").checkpoint.upload == "s3://b/r"
