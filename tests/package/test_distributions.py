"""What a wheel and a source distribution hold, and that both work away from the repository."""

from __future__ import annotations

import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from installed import MADE, ROOT, Installed, build, copy_of_the_project, install, run

pytestmark = pytest.mark.timeout(900)
LINKED = {path.name for path in (ROOT / "opd_async").iterdir() if path.is_symlink()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def wheel(project: Path) -> Path:
    return build("wheel", project, project.parent / "dist")


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Installed:
    return install(wheel, wheel.parent / "environment")


@pytest.fixture(scope="module")
def source(project: Path) -> Path:
    """An unpacked source distribution."""
    file = build("sdist", project, project.parent / "dist")
    with tarfile.open(file) as archive:
        archive.extractall(file.parent / "source", filter="data")
    return next((file.parent / "source").iterdir())


def files(package: str) -> set[str]:
    """The modules of a folder of the repository, as the package holds them."""
    own = package if package == "opd_async" else f"opd_async/{package}"
    found = (path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py"))
    return {f"{own}/{path}" for path in found if not set(path.parts[:-1]) & LINKED}


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"opd_async"}
        assert all(archive.getinfo(name).external_attr >> 28 != 0o12 for name in names), "links are files in a wheel"
    wanted = set().union(*(files(package) for package in ("opd_async", "actors", "learner", "bench")))
    assert {
        name for name in names if name.endswith(".py") and "/examples/" not in name and "info/" not in name
    } == wanted
    data = {"opd_async/py.typed", "opd_async/examples/quickstart.yaml", "opd_async/dashboards/opd_async.json"}
    data |= {"opd_async/examples/addition/models/student/model.safetensors", "opd_async/telemetry/samples_page.html"}
    assert data <= names
    made = ("/examples/addition/data/", f"/{MADE}/", "__pycache__")
    assert not [name for name in names if any(part in name for part in made)]


def test_the_metadata_say_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Author"]
    assert {"math", "parquet", "plots", "completion", "test"} <= set(metadata.get_all("Provides-Extra", []))
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in always if line.startswith(("matplotlib", "math-verify", "pyarrow", "shtab"))]


def test_a_folder_of_the_users_does_not_reach_a_role(installed: Installed, tmp_path: Path) -> None:
    """`learner` and `torch` in the working directory stay out; a module that a role is told to load is found there."""
    for name in ("learner", "actors", "torch", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user has this folder')")
    (tmp_path / "my_rewards.py").write_text("async def judge(**given):\n    return 1.0\n")
    code = """
import asyncio, sys
from opd_async.cluster.supervisor import ProcessSpec, Supervisor
from pathlib import Path

async def main():
    said = []
    async with Supervisor(said.append, 20.0, lambda line: True) as supervisor:
        command = (sys.executable, "-c", sys.argv[1])
        await supervisor.start(ProcessSpec("learner-0", command, {}, Path("learner-0.log")))
        ended = await supervisor.exits.get()
    print(ended.code, *ended.tail)

asyncio.run(main())
"""
    role = (
        "import opd_async.learner.losses.sampled, opd_async.actors.client, numpy, torch\n"
        "from opd_async.hooks import load_hook\n"
        "print(load_hook('reward.function', 'my_rewards:judge').__name__, 'is loaded')"
    )
    assert run(installed.python, "-P", "-c", code, role, cwd=tmp_path).split("\n")[0] == "0 judge is loaded"


def test_the_command_works_beside_folders_of_the_users(installed: Installed, tmp_path: Path) -> None:
    """What a newcomer does first, in a folder that has a `learner` of its own."""
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "__init__.py").write_text("raise RuntimeError('the user has this folder')")
    version = run(installed.opd, "--version", cwd=tmp_path)
    assert version.startswith("opd 0.")
    run(installed.opd, "example", "quickstart", cwd=tmp_path)
    plan = run(installed.opd, "check", cwd=tmp_path)
    assert "learner-0" in plan and "rollout-0" in plan
    said = run(installed.opd, "check", "--set", "schedule.stepps=1", cwd=tmp_path, fails=True)
    assert "schedule.stepps: unknown key; did you mean steps?" in said
    report = run(installed.python, "-P", "-c", "from opd_async import run, Topology; print(run.__name__)", cwd=tmp_path)
    assert report == "run\n"


def test_the_source_distribution_is_the_repository(source: Path) -> None:
    assert {path.name for path in (source / "opd_async").iterdir() if path.is_symlink()} == LINKED
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "requirements/cpu.txt", "docs/modules.md"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (source / MADE).exists()
    tests = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")}
    assert {path.relative_to(source) for path in (source / "tests").rglob("*.py")} == tests


@pytest.mark.long
def test_tests_run_from_the_source_distribution(source: Path, installed: Installed) -> None:
    """Those of the pages, the rooms and the topology: they look at files of every kind."""
    chosen = ("test_docs", "test_boundaries", "test_topology", "test_metrics", "test_example_topologies")
    paths = [f"tests/core/{name}.py" for name in chosen]
    options = ("-q", "-p", "no:cacheprovider", "--timeout", "800")
    # as a module, so that the folder itself is what `opd_async` is found in
    said = run(installed.python, "-m", "pytest", *options, *paths, cwd=source)
    assert " passed" in said and " failed" not in said
