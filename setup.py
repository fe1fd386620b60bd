"""What pyproject.toml cannot say: a source distribution keeps the links from the package to the top-level folders."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

PACKAGE = Path("opd_async")


class LinkedSource(sdist):
    """A source distribution with `opd_async/actors` and its like as links, as in the repository."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, each once, and make the links."""
        links = sorted(path for path in PACKAGE.iterdir() if path.is_symlink())
        own = [file for file in files if not any(link in Path(file).parents for link in links)]
        super().make_release_tree(base_dir, own)
        for link in links:
            copy = Path(base_dir) / link
            copy.unlink(missing_ok=True)
            copy.symlink_to(link.readlink())


setup(cmdclass={"sdist": LinkedSource})
