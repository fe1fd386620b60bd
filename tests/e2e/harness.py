"""Whole runs as a user starts them: the launcher in a process of its own, judged by what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml
from deadlines import patience

from opd_async.run.trained import read_trained

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 256
STOP = 2
MAX_RESPONSE = 200
SLOTS = 8
DEADLINES = {
    "start_deadline_s": patience(60),
    "stop_deadline_s": patience(10),
    "heartbeat_deadline_s": patience(30),
    "step_deadline_s": patience(120),
}
"""No run of these tests ends because the machine is slow."""


def make_inputs(folder: Path, student_layers: int = 2) -> Path:
    """Random Qwen3 models that stop with probability near 1/256 per token, and 40 prompts."""
    make_model(folder / "student", hidden=32, layers=student_layers, seed=1)
    make_model(folder / "teacher", hidden=48, layers=2, seed=2)
    rows = [{"prompt": f"t{10 + i} t{20 + i} t{30 + i}", "label": "x"} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_model(
    folder: Path, *, hidden: int, layers: int, seed: int, rows: int = VOCAB, words: dict[int, str] | None = None
) -> Path:
    """A random Qwen3 with `rows` ids, of which the first 256 are tokens t0, t1, ... or those of `words`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {(words or {}).get(i, f"t{i}"): i for i in range(min(VOCAB, rows))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"t{STOP}", pad_token="t0")
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=STOP,
        bos_token_id=None,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def topology(inputs: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A run whose responses last many steps; `changes` are `section__key=value`."""
    values: dict[str, Any] = {
        "name": "run",
        "run_dir": str(runs),
        "models": {"student": {"path": str(inputs / "student")}, "teacher": {"path": str(inputs / "teacher")}},
        "data": {"train": {"path": str(inputs / "prompts.jsonl")}},
        "engines": {
            side: {"context_tokens": 256, "kv_tokens": 8192, "max_running": 32} for side in ("student", "teacher")
        },
        "rollout": {
            "slots": SLOTS,
            "chunk_tokens": 16,
            "stream_interval": 4,
            "sampling": {"max_response_tokens": MAX_RESPONSE},
            "resend_after_s": 5.0,
        },
        "teacher": {"batch_tokens": 512},
        "schedule": {"steps": 8, "rule": "deadline", "tokens_per_step": 256, "max_staleness": 1},
        "learner": {"micro_batch_tokens": 2048, "optimizer": {"lr": 1e-3}},
        "checkpoint": {"every_steps": 3, "export_hf": False},
        "supervisor": {"restarts": 3, "backoff_s": 0.2, **DEADLINES},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    return values


def write_topology(values: dict[str, Any], path: Path) -> Path:
    """The topology as a file."""
    path.write_text(yaml.safe_dump(values))
    return path


def command(file: Path, *options: str) -> list[str]:
    """The launcher's command line."""
    return [sys.executable, "-m", "opd_async.launch", "--topology", str(file), *options]


def environment() -> dict[str, str]:
    """The environment of a launcher."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def loud_lines(folder: Path) -> list[str]:
    """Lines of a run's logs that report an error."""
    logs = sorted((folder / "logs").glob("*.log"))
    assert len(logs) > 1
    lines = [f"{log.stem} | {line}" for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if re.search(r"\b(ERROR|CRITICAL|FATAL)\b|Traceback", line)]


def wait_for_steps(process: subprocess.Popen[Any], folder: Path, count: int, said: Callable[[], str] = str) -> None:
    """Return once `count` steps are in metrics.jsonl; the launcher itself gives up on a run that does not move."""
    while len(steps(folder)) < count:
        ended = process.poll() is not None and len(steps(folder)) < count
        assert not ended, f"the run ended early:\n{said()}"
        time.sleep(0.1)


class Launch:
    """A launcher process; killed, with everything it started, when the block ends."""

    def __init__(self, file: Path, *options: str) -> None:
        self.output = file.with_suffix(f".{time.monotonic_ns()}.out")
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                command(file, *options),
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
                start_new_session=True,
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        family = self.family()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=patience(20))

    def family(self) -> list[psutil.Process]:
        """Every process below the launcher."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def find(self, *words: str) -> psutil.Process:
        """The process of the run whose command line has all of `words`: the innermost one."""
        found = []
        for process in self.family():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if all(word in line for word in words):
                found.append(process)
        assert found, f"no process with {words} in {self.text()}"
        return found[-1]

    def text(self) -> str:
        """What it printed so far."""
        return self.output.read_text()

    def wait(self, deadline_s: float = 150.0) -> int:
        """Its exit code."""
        try:
            return self.process.wait(patience(deadline_s))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end within {patience(deadline_s):.0f} s:\n{self.text()}") from None

    def wait_for_steps(self, folder: Path, count: int) -> None:
        """Return once `count` steps are in metrics.jsonl."""
        wait_for_steps(self.process, folder, count, self.text)

    def wait_for_text(self, words: str, deadline_s: float = 30.0, again: Callable[[], None] | None = None) -> None:
        """Return once the launcher has printed `words`; `again` is called every second until it has."""
        begun = time.monotonic()
        give_up, next_s = begun + patience(deadline_s), begun
        while words not in self.text():
            ended = self.process.poll() is not None and words not in self.text()
            assert not ended, f"the run ended before it printed {words!r}:\n{self.text()}"
            now = time.monotonic()
            assert now < give_up, f"{words!r} was not printed within {now - begun:.0f} s:\n{self.text()}"
            if again and now >= next_s:
                again()
                next_s = now + 1.0
            time.sleep(0.05)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Send a signal to the launcher alone."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """End a run that has enough steps for whatever a test does meanwhile; what it has trained is saved."""
        self.interrupt()
        assert self.wait() == 130, self.text()


def rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def steps(folder: Path) -> list[dict[str, Any]]:
    """The step rows of metrics.jsonl."""
    return [row for row in rows(folder / "metrics.jsonl") if "evaluation" not in row]


def check_trained(folder: Path, max_staleness: int, count: int) -> dict[int, list[list[int]]]:
    """Every step once and in order; every trained token once, in order, none older than the bound.

    Returns per sample its ranges [start, end, oldest version, newest version].
    """
    log = list(read_trained(folder))
    assert [step.version for step in log] == list(range(count))
    ranges: dict[int, list[list[int]]] = defaultdict(list)
    reached: dict[int, int] = defaultdict(int)
    for step in log:
        bridged = sorted([*step.ranges.tolist(), *(list(one) for one in step.given)])
        for sample, start, end, *versions in bridged:
            if not versions:  # given tokens, which somebody said in between
                assert start == reached[sample]
                reached[sample] = end
                continue
            oldest, newest = versions
            assert step.version - max_staleness <= oldest <= newest <= step.version, step
            previous = ranges[sample][-1] if ranges[sample] else [0, 0, 0, 0]
            ended = reached[sample]
            assert start == ended, f"sample {sample}: a range begins at {start}, the last ended at {ended}"
            assert oldest >= previous[3] and end > start
            reached[sample] = end
            ranges[sample].append([start, end, oldest, newest])
    return dict(ranges)


def left_running(*folders: Path) -> list[str]:
    """Command lines of processes that still name one of these folders: those of the run are all gone."""
    alive = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in line for folder in folders):
            alive.append(line)
    return alive


def still_there(paths: Iterable[Path]) -> list[Path]:
    """Those of these files that are not gone within a while: a killed process leaves `/proc` a moment later."""
    left, give_up = list(paths), time.monotonic() + patience(10)
    while (left := [path for path in left if path.exists()]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left
