"""Write instructions as chat messages: `python examples/smollm2/make_prompts.py [--out DIR]`.

    forms x subjects -> shuffled by a seed -> DIR/train.jsonl, DIR/held_out.jsonl

No subject of the held-out instructions is in the training ones. There are no labels: the teacher judges.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

FORMS = (
    "Explain {} to a child.",
    "What is {}?",
    "Write two sentences about {}.",
    "Why is {} important?",
    "Give me three facts about {}.",
    "Write a short poem about {}.",
    "What would the world be without {}?",
    "How would you describe {} to a friend?",
)
_SUBJECTS = """\
gravity, photosynthesis, the moon, electricity, evolution, the ocean, rain, volcanoes, magnets,
bread, coffee, cheese, honey, rice, salt, tea, chocolate, apples, a good breakfast, soup, democracy,
money, trade, a library, the printing press, law, a market, insurance, a school, chess, football,
music, dance, painting, theatre, photography, swimming, a marathon, poetry, a bicycle, the steam
engine, a bridge, the compass, a telescope, glass, paper, the wheel, clocks, the heart, sleep,
memory, bones, a vaccine, the skin, breathing, taste, exercise, laughter, a bee, a whale, a wolf, an
owl, a spider, a horse, a cat, mushrooms, an oak tree, a coral reef, friendship, patience, courage,
kindness, curiosity, honesty, hope, teamwork, a promise, humour, the internet, a computer, software,
a battery, a satellite, radio, a robot, encryption, a map, a desert, a river, the Arctic, a
rainforest, an island, a mountain, the wind, a glacier, a lake"""
SUBJECTS = tuple(one.strip() for one in _SUBJECTS.split(","))
HELD_OUT_SUBJECTS = 12
SEED = 0


def rows(subjects: tuple[str, ...]) -> list[dict[str, list[dict[str, str]]]]:
    """Every form with every subject, in an order that depends on `SEED` alone."""
    made = [{"prompt": [{"role": "user", "content": form.format(one)}]} for one in subjects for form in FORMS]
    random.Random(SEED).shuffle(made)
    return made


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write instructions for examples/smollm2.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    subjects = list(SUBJECTS)
    random.Random(SEED).shuffle(subjects)
    parts = {"held_out": subjects[:HELD_OUT_SUBJECTS], "train": subjects[HELD_OUT_SUBJECTS:]}
    for name, chosen in parts.items():
        file = folder / f"{name}.jsonl"
        made = rows(tuple(chosen))
        file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        print(f"{file}: {len(made)} prompts")


if __name__ == "__main__":
    main()
