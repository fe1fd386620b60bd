"""Parts of pages that are made from the rest of them.

    python tests/core/pages.py      # write them anew

The index at the top of docs/troubleshooting.md lists its headings, and that of docs/measurements.md too.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITH_INDEX = ("docs/troubleshooting.md", "docs/measurements.md")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDEX = re.compile(r"<!-- index -->\n.*?<!-- /index -->\n", re.DOTALL)


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def index(text: str) -> str:
    """A list of a page's headings of the second level, with those of the third level below them."""
    lines = ["<!-- index -->"]
    for level, heading in re.findall(r"^(###?) (.+)$", FENCE.sub("", text), re.MULTILINE):
        indent = "  " if level == "###" else ""
        lines.append(f"{indent}- [{heading}](#{anchor(heading)})")
    return "\n".join([*lines, "<!-- /index -->"]) + "\n"


def with_index(text: str) -> str:
    """The page with its index as it should be."""
    return INDEX.sub(lambda _: index(text), text, count=1)


if __name__ == "__main__":
    for name in WITH_INDEX:
        page = ROOT / name
        page.write_text(with_index(page.read_text()))
