"""What every simulated device of a run has to know, on its command line: the workload and how fast time passes.

One virtual second, the unit of the cost model, takes 1 / `scale` seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from opd_async.bench.sim.presets import balanced
from opd_async.forecast.lengths import LengthStream, parse_lengths
from opd_async.forecast.workload import Workload

CHUNK_TOKENS = 64
PROMPT_TOKENS = 24
BATCH_TOKENS = 512
UPDATE_S = 0.1


@dataclass(frozen=True, slots=True)
class Scenario:
    """A balanced workload of `engines` student engines with `slots` slots each, whose teacher and learner are that many
    times as fast. `lengths` is a distribution as `parse_lengths` reads it."""

    lengths: str = "200,1600,1638"
    slots: int = 32
    scale: float = 1.0
    lengths_seed: int = 0
    engines: int = 1

    def workload(self) -> Workload:
        """The costs, in virtual seconds."""
        one, count = balanced(parse_lengths(self.lengths), slots=self.slots), self.engines
        return dataclasses.replace(
            one,
            engines=count,
            slots=one.slots * count,
            samples_per_step=one.samples_per_step * count,
            score=dataclasses.replace(one.score, token_s=one.score.token_s / count),
            train=dataclasses.replace(one.train, token_s=one.train.token_s / count),
            prompt_tokens=PROMPT_TOKENS,
            chunk_tokens=CHUNK_TOKENS,
            batch_tokens=BATCH_TOKENS * count,
            sync_s=UPDATE_S,
        )

    def response_tokens(self) -> LengthStream:
        """The length of every response, the same as on the virtual clock."""
        work = self.workload()
        return LengthStream(work.lengths, self.lengths_seed, work.group_size, work.correlation)

    def arguments(self) -> tuple[str, ...]:
        """Command line that `of` reads back."""
        values = dataclasses.asdict(self).items()
        return tuple(text for name, value in values for text in ("--" + name.replace("_", "-"), str(value)))

    @classmethod
    def of(cls, options: argparse.Namespace) -> Scenario:
        """The scenario that the command line describes."""
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The options of a scenario; `several`: of one for each of some numbers of engines."""
    default = Scenario()
    parser.add_argument("--lengths", default=default.lengths, help="as for bench.schedules")
    parser.add_argument("--slots", type=int, default=default.slots, help="responses that an engine generates at once")
    parser.add_argument("--scale", type=float, default=default.scale, help="virtual seconds in a second")
    parser.add_argument("--lengths-seed", type=int, default=default.lengths_seed)
    if several:
        parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4, 8], help="student engines")
    else:
        parser.add_argument("--engines", type=int, default=default.engines, help="student engines")
