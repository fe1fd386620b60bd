"""The Python blocks of docs/hooks.md, by the heading that they stand under."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES: dict[str, str] = dict(
    re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$",
        (ROOT / "docs/hooks.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)


def write_examples(folder: Path) -> None:
    """The loss as the module `my_loss`, the others as `my_hooks`: only the learner is to import torch for them."""
    losses = [text for text in EXAMPLES.values() if "LossRows" in text]
    others = [text for text in EXAMPLES.values() if "LossRows" not in text]
    (folder / "my_loss.py").write_text("\n\n".join(losses), encoding="utf-8")
    (folder / "my_hooks.py").write_text("\n\n".join(others), encoding="utf-8")
