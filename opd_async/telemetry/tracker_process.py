"""Hand the figures of one run to one tracker: a process of its own, which the launcher feeds through a pipe.

    launcher (`trackers.py`) -> lines of JSON on stdin -> TensorBoard, Weights & Biases, MLflow or trackio
                             <- lines of JSON on stdout: {"said": text}, {"lost": text}

    python -P tracker_process.py --check wandb online    prints why this tracker cannot be used; nothing where it can

The first line is the setup, the others are {"step": row}, {"evaluation": row}, {"sample": row}, {"rewind": step} and
{"report": report}. At the end of stdin the tracker's run is closed. The file runs by itself, with nothing but the
standard library and the tracker's own package, so that the package may live in another environment (`tracking.python`).

A tracker sees each step once. What it has had stands in a file beside it (`state`): a run that goes on, goes on in the
same run of the tracker, and steps that are taken again are left out, or take the place of the lost ones where the
tracker can take back what it was told (TensorBoard).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

Row = dict[str, Any]
COLUMNS = ("step", "of", "prompt_id", "prompt", "response", "tokens", "finish", "reward", "log_q_minus_log_p")
"""Of the table of samples."""
SHOWN_CHARACTERS = 4000
"""A prompt keeps its end and a response its beginning, up to this length."""
MOST_SAMPLES = 256
MLFLOW_TEXT = 500
"""Most characters of a parameter's value in every store of MLflow."""
MARKDOWN = str.maketrans({"|": "\\|", "\n": "<br>", "\r": ""})


class Sink(Protocol):
    """A run of a tracker."""

    id: str
    """What finds this run again when it goes on."""

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Take figures of a step; `at` in seconds since 1970."""

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Take samples, in the order of `COLUMNS`."""

    def rewind(self, step: int) -> bool:
        """Take back what was told of later steps; False if this tracker cannot."""

    def finish(self, report: Row | None) -> None:
        """Close the run, with its report where it has come to its end."""


class TensorBoard:
    """Event files in a folder of their own, written by the package `tensorboard`; torch is not needed."""

    def __init__(self, setup: Row, known: str | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
        from tensorboard.plugins.text import metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._tensor, self._text = event_pb2, summary_pb2, tensor_pb2, metadata
        self.id = known or _new_folder(Path(setup["folder"]), setup["name"])
        self._writer = EventFileWriter(self.id)
        if known is None:
            self._write(0, [self._as_text("config", _fenced(setup["config"]))], time.time())

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Take scalars."""
        value = self._summary.Summary.Value
        self._write(step, [value(tag=name, simple_value=number) for name, number in values.items()], at)

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Take samples as a table in Markdown, which the tab `Text` shows."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        text = "\n".join(f"| {' | '.join(_cell(one) for one in line)} |" for line in lines)
        self._write(step, [self._as_text("samples", text)], time.time())

    def rewind(self, step: int) -> bool:
        """Say that the run starts again: readers drop what came before at later steps."""
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=step + 1, wall_time=time.time(), session_log=start))
        return True

    def finish(self, report: Row | None) -> None:
        """Write the report as text, and close the file."""
        if report is not None:
            self._write(int(report.get("steps") or 0), [self._as_text("report", _fenced(report))], time.time())
        self._writer.close()

    def _as_text(self, tag: str, text: str) -> Any:
        tensor = self._tensor.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        metadata = self._text.create_summary_metadata(display_name=tag, description="")
        return self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)

    def _write(self, step: int, values: list[Any], at: float) -> None:
        event = self._event.Event(step=step, wall_time=at, summary=self._summary.Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()


class WeightsAndBiases:
    """A run of Weights & Biases; offline, a folder that `wandb sync` sends later."""

    def __init__(self, setup: Row, known: str | None) -> None:
        import wandb

        folder = Path(setup["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=setup["project"],
            name=setup["name"],
            group=setup["group"],
            dir=str(folder),
            config=setup["config"],
            id=known,
            resume="allow" if known else None,
            mode="offline" if setup["offline"] else None,
        )
        self.id = self._run.id

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Add to the step's row."""
        self._run.log(values, step=step)

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Add a table of its own to the step's row."""
        self._run.log({"samples": self._wandb.Table(columns=list(COLUMNS), data=rows)}, step=step)

    def rewind(self, step: int) -> bool:
        """Answer that a row of this tracker stays as it is."""
        return False

    def finish(self, report: Row | None) -> None:
        """Put the report into the summary, and wait until everything is sent."""
        if report is not None:
            self._run.summary["report"] = report
        self._run.finish(exit_code=0 if report is not None else 1)


class MlFlow:
    """A run of MLflow: on the server of MLFLOW_TRACKING_URI; offline, in a folder of files."""

    def __init__(self, setup: Row, known: str | None) -> None:
        if setup["offline"]:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        folder = Path(setup["folder"]).absolute()
        self._client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri() if setup["offline"] else None)
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        project = self._client.get_experiment_by_name(setup["project"])
        number = self._client.create_experiment(setup["project"]) if project is None else project.experiment_id
        tags = {} if setup["group"] is None else {"group": setup["group"]}
        self.id = self._client.create_run(number, run_name=setup["name"], tags=tags).info.run_id
        given = [Param(key, str(value)[:MLFLOW_TEXT]) for key, value in _flat(setup["config"]) if value is not None]
        for begin in range(0, len(given), 100):  # a server takes no more at once
            self._client.log_batch(self.id, params=given[begin : begin + 100])
        self._client.log_dict(self.id, setup["config"], "topology.json")

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Take metrics."""
        now = round(at * 1000)
        self._client.log_batch(
            self.id, metrics=[self._metric(name, number, now, step) for name, number in values.items()]
        )

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Write samples as an artifact, in the form in which MLflow writes tables."""
        self._client.log_dict(self.id, {"columns": COLUMNS, "data": rows}, f"samples/step_{step:08d}.json")

    def rewind(self, step: int) -> bool:
        """Answer that a metric of this tracker stays as it is."""
        return False

    def finish(self, report: Row | None) -> None:
        """Write the report as an artifact, and say how the run has ended."""
        if report is not None:
            self._client.log_dict(self.id, report, "report.json")
        self._client.set_terminated(self.id, "FINISHED" if report is not None else "KILLED")


class Trackio:
    """A run of trackio: where its own variables say; offline, in a folder."""

    def __init__(self, setup: Row, known: str | None) -> None:
        if setup["offline"]:
            for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                os.environ.pop(name, None)
            os.environ["TRACKIO_DIR"] = setup["folder"]
        import trackio

        self._trackio = trackio
        # it finds a run by its name alone
        self.id = known or f"{setup['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._run = trackio.init(
            project=setup["project"],
            name=self.id,
            group=setup["group"],
            config=setup["config"],
            resume="allow" if known else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Add a row of the step."""
        self._run.log(values, step=step)

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Add a table."""
        self._run.log({"samples": self._trackio.Table(columns=list(COLUMNS), data=rows)}, step=step)

    def rewind(self, step: int) -> bool:
        """Answer that a row of this tracker stays as it is."""
        return False

    def finish(self, report: Row | None) -> None:
        """Add the report's figures, and wait until everything is written."""
        if report is not None:
            figures = {f"report/{name}": value for name, value in numbers(report)}
            self._run.log(figures, step=int(report.get("steps") or 0))
        self._run.finish()


SINKS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[MlFlow] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MlFlow,
    "trackio": Trackio,
}


class Feeder:
    """Hands rows to a tracker, each step once."""

    def __init__(self, sink: Sink, state: Path, newest: dict[str, int]) -> None:
        """`newest` is the last step that the tracker has, by what it is of: `step`, or whom an evaluation is of."""
        self._sink = sink
        self._state = state
        self._newest = newest
        self._samples: list[list[Any]] = []
        self._report: Row | None = None
        self._save()

    def take(self, kind: str, row: Any) -> None:
        """Hand on one message of the launcher; raises whatever the tracker raises."""
        if kind == "sample":
            self._samples = [*self._samples, sample_cells(row)][-MOST_SAMPLES:]
        elif kind == "report":
            self._report = row
        elif kind == "rewind":
            if any(step > row for step in self._newest.values()) and self._sink.rewind(row):
                self._newest = {of: min(step, row) for of, step in self._newest.items()}
        elif kind in ("step", "evaluation"):
            self._figures(kind, row)

    def _figures(self, kind: str, row: Row) -> None:
        of = "step" if kind == "step" else f"evaluation {row['evaluation']} {row.get('set', '')}".rstrip()
        step = int(row["step"])
        if step <= self._newest.get(of, -1):
            return
        prefix = "train" if kind == "step" else of.replace(" ", "/")
        values = {f"{prefix}/{name}": value for name, value in numbers(row) if name not in ("step", "time")}
        self._sink.log(step, values, float(row["time"]))
        self._newest[of] = step
        self._save()
        if kind == "step":
            self._table(step)

    def _table(self, step: int) -> None:
        rows, self._samples = self._samples, []
        if rows:
            self._sink.table(step, rows)

    def finish(self) -> None:
        """Hand on what waits, and close the tracker's run."""
        try:
            self._table(max(self._newest.values(), default=0))
        finally:
            self._sink.finish(self._report)

    def _save(self) -> None:
        """Write down what the tracker has: the next launch goes on from there."""
        text = json.dumps({"id": self._sink.id, "newest": self._newest})
        new = self._state.with_name(f"{self._state.name}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(self._state)


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """Yield the figures of a row, keys of inner objects behind a slash; lists and texts are left out."""
    for key, value in _flat(row, "/"):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def _flat(row: Row, joint: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, joint, f"{prefix}{key}{joint}")
        else:
            yield f"{prefix}{key}", value


def sample_cells(row: Row) -> list[Any]:
    """Make a line of the table of a row of `samples.jsonl`."""
    student, teacher = row.get("student_logprobs") or (), row.get("teacher_logprobs") or ()
    differences = [q - p for p, q in zip(student, teacher, strict=False)]  # a row may have one of them only
    mean = math.fsum(differences) / len(differences) if differences else None
    prompt, response = row["prompt"][-SHOWN_CHARACTERS:], row["response"][:SHOWN_CHARACTERS]
    facts = (row.get("evaluation", "training"), row["prompt_id"], prompt, response, row["response_tokens"])
    return [row["step"], *facts, row["finish"], row.get("reward"), mean]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value).translate(MARKDOWN)


def _fenced(value: Row) -> str:
    """Write an object as a block of code in Markdown."""
    return f"```\n{json.dumps(value, indent=1)}\n```"


def _new_folder(parent: Path, name: str) -> str:
    """Make a folder for a new run; one that is there belongs to another."""
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return str(folder)


# --- before the start ------------------------------------------------------------------------------------------------


def problem(kind: str, offline: bool) -> str | None:
    """Say why this tracker cannot be used, None if it can, as far as that is known without a network."""
    package = {"mlflow": "mlflow-skinny"}.get(kind, kind)
    try:
        importlib.import_module(kind)
    except ImportError as error:
        return f"{kind} cannot be imported ({error}); install it (pip install {package}), or name a Python that has it"
    if offline or kind == "tensorboard":
        return None
    return {"wandb": _wandb_problem, "mlflow": _mlflow_problem, "trackio": _trackio_problem}[kind]()


def _wandb_problem() -> str | None:
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online" or wandb.login(prompt=False, verify=False):
        return None
    return "wandb has no login on this machine; run `wandb login`, set WANDB_API_KEY, or write tracking.offline: true"


def _mlflow_problem() -> str | None:
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    return "mlflow has no server; set MLFLOW_TRACKING_URI, or write tracking.offline: true"


def _trackio_problem() -> str | None:
    from huggingface_hub import get_token

    if not os.environ.get("TRACKIO_SPACE_ID") or get_token():
        return None
    return (
        "trackio has no login for the Space of TRACKIO_SPACE_ID; run `hf auth login`, or write tracking.offline: true"
    )


# --- the process -----------------------------------------------------------------------------------------------------


def follow(lines: TextIO, answers: TextIO) -> int:
    """Obey the launcher until its lines end; returns the exit code: 1 if the tracker's run could not be opened."""

    def answer(kind: str, text: str) -> None:
        try:
            print(json.dumps({kind: text}), file=answers, flush=True)
        except OSError:  # the launcher is gone: what it said before is still worth sending
            return

    setup = json.loads(next(lines))
    state = Path(setup["state"])
    try:
        known, newest = _known(state)
        feeder = Feeder(SINKS[setup["kind"]](setup, known), state, newest)
    except BaseException as error:  # the edge of the tracker's code
        answer("dead", _named(error))
        return 1
    for line in lines:
        (message,) = json.loads(line).items()
        try:
            feeder.take(*message)
        except BaseException as error:  # the same
            answer("lost", f"{_named(error)}, for {message[0]} {_number(message[1])}")
    try:
        feeder.finish()
    except BaseException as error:  # the same
        answer("lost", f"{_named(error)}, at the end")
    return 0


def _known(state: Path) -> tuple[str | None, dict[str, int]]:
    """The tracker's run of an earlier launch, and the newest steps that it has."""
    if not state.is_file():
        return None, {}
    found = json.loads(state.read_bytes())
    return str(found["id"]), {str(of): int(step) for of, step in found["newest"].items()}


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _number(row: Any) -> str:
    return str(row.get("step", "") if isinstance(row, dict) else row)


def main(words: list[str]) -> int:
    """Run the command line."""
    if words[:1] == ["--check"]:
        kind, mode = words[1:]
        found = problem(kind, offline=mode == "offline")
        print("" if found is None else f"problem: {found}", flush=True)
        return 0
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print goes to the log
    return follow(sys.stdin, answers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
