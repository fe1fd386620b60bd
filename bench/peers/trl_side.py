"""Train the student with TRL's `DistillationTrainer`; runs in TRL's own environment, which has nothing of this project.

    job (JSON) -> models, prompts -> DistillationTrainer.train() -> FOLDER/clock.jsonl, FOLDER/step_00000010/, ...

`bench.peers` starts it as `.venv-trl/bin/python bench/peers/trl_side.py JOB.json`, or under `torch.distributed.run` for
several processes; the keys of a job are the fields of `bench.peers.sides.TrlJob`. The clock begins with the first step,
after everything is loaded, and stands still while the student is written for evaluation.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    """Writes a row for each step, and the student every so many steps, outside the time that counts."""

    def __init__(self, folder: Path, every_steps: int, batch: int, limit_s: float) -> None:
        self._folder = folder
        self._every = every_steps
        self._batch = batch
        self._limit_s = limit_s
        self._began = self._paused_s = self._now_s = self._at = 0.0
        self._tokens = 0.0
        self._rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> Any:
        """The step's optimizer has stepped."""
        self._now_s, self._at = time.perf_counter() - self._began - self._paused_s, time.time()
        if state.global_step % self._every == 0 and state.is_world_process_zero:
            model.save_pretrained(self._folder / f"step_{state.global_step:08d}")
            self._paused_s = time.perf_counter() - self._began - self._now_s
        control.should_training_stop = control.should_training_stop or self._now_s > self._limit_s
        return control

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """The trainer's own count of completion tokens, logged after each step."""
        if "completions/mean_length" in logs:
            self._tokens += logs["completions/mean_length"] * self._batch
            row = {"step": state.global_step, "seconds": self._now_s, "tokens": self._tokens, "time": self._at}
            self._rows.append(row)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All rows at once: nothing is written while the clock runs."""
        if not state.is_world_process_zero:
            return
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        (self._folder / "clock.jsonl").write_text(lines)


def configuration(job: dict[str, Any]) -> DistillationConfig:
    """TRL's settings for a machine without a GPU, with those of the job."""
    return DistillationConfig(
        output_dir=str(Path(job["folder"]) / "trainer"),
        beta=job["beta"],
        temperature=1.0,
        max_completion_length=job["max_response_tokens"],
        per_device_train_batch_size=job["batch"] // job["processes"],
        ddp_find_unused_parameters=False,
        max_steps=job["steps"],
        learning_rate=job["lr"],
        lr_scheduler_type=job["scheduler"],
        lr_scheduler_kwargs=job["scheduler_kwargs"],
        warmup_steps=job["warmup_steps"],
        adam_beta1=job["beta1"],
        adam_beta2=job["beta2"],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["clip_grad"],
        bf16=job["bf16"],
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_num_workers=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )


def main(file: str) -> None:
    """Run the job in `file`."""
    job = json.loads(Path(file).read_text())
    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["student"], padding_side="left")
    rows = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    models = [AutoModelForCausalLM.from_pretrained(job[who], dtype=torch.float32) for who in ("student", "teacher")]
    for model in models:
        model.set_attn_implementation(job["attention"])
    trainer = DistillationTrainer(
        model=models[0],
        teacher_model=models[1],
        args=configuration(job),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[Clock(Path(job["folder"]), job["every_steps"], job["batch"], job["limit_s"])],
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
