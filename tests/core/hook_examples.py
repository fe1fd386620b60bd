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
    """All of them as the module `my_hooks`, each with its own imports."""
    parts = list(EXAMPLES.values())
    (folder / "my_hooks.py").write_text("\n\n".join(parts), encoding="utf-8")
