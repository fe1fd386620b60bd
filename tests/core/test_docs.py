"""The pages say what is there: modules, topologies, keys, options, metrics, messages, make targets, files, links."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from pages import WITH_INDEX, anchor, with_index
from rooms import ORDER, modules
from rooms import page as modules_page
from taken_samples import taken

from opd_async.actors.intake.figures import StepFigures
from opd_async.actors.intake.report import describe_filtered, describe_rewards, describe_step
from opd_async.checks.host import device_problems
from opd_async.cli.main import COMMANDS
from opd_async.command import parse_arguments
from opd_async.config.schema_text import keys_at, schema_at
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.data.jsonl import read_jsonl
from opd_async.estimators.advantages import Outcome
from opd_async.run.ledger import EVALUATED, Ledger
from opd_async.run.run_folder import MADE_BY_RUNS
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.telemetry.metrics import CATALOGUE, MetricKind
from opd_async.telemetry.report import Evaluation, Report
from opd_async.transport import messages

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(ORDER)
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dashboards/*.md"), *ROOT.glob("examples/**/*.md")]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
SECTIONS = keys_at(())
OTHER_FLAGS = {"--plan", "--index", "--nproc-per-node", "--replicas"}
"""Options of the roles, which the launcher starts, of torchrun, and of kubectl."""
SGLANG_FLAGS = {
    *("--mem-fraction-static", "--cuda-graph-max-bs", "--disable-radix-cache", "--chunked-prefill-size"),
    *("--dp-size", "--enable-deterministic-inference"),
}
"""Options of SGLang's servers that a page gives advice on."""
LM_EVAL_FLAGS = {"--model", "--model_args", "--batch_size", "--tasks", "--include_path"}
"""Options of lm-eval, with which a page evaluates an export."""

RUNNING = ROOT / "docs/running.md"
LEAST: dict[str, Any] = {
    "name": "part",
    "models": {"student": {"path": "s"}, "teacher": {"path": "t"}},
    "data": {"train": {"path": "p.jsonl"}},
    "schedule": {"steps": 1},
}
"""A topology of what has no default."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED_FENCE = re.compile(r"^ +```.*?^ +```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages ("" for none)."""
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return INDENTED_FENCE.sub("", FENCE.sub("", page.read_text()))


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return CODE.findall(prose(page))


# --- architecture ----------------------------------------------------------------------------------------------------


def test_the_page_of_modules_is_that_of_the_code() -> None:
    assert (ROOT / "docs/modules.md").read_text() == modules_page(), "run: python tests/core/rooms.py > docs/modules.md"


def test_the_map_shows_every_room_in_its_order() -> None:
    """Of the three packages that a run is made of; inside `learner/` two rooms may share a line."""
    map_of_rooms = blocks(ROOT / "docs/architecture.md", "")[0]
    parts = re.split(r"^(\w+)/ {2,}", map_of_rooms, flags=re.MULTILINE)
    shown = {
        package: re.findall(r"(?<!\S)(\w+)/(?= {2,})", text)
        for package, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    for package in ("opd_async", "actors", "learner"):
        rooms = [name for name in ORDER[package] if (ROOT / package / name).is_dir()]
        assert shown[package] == rooms
    assert len(map_of_rooms.splitlines()) <= 45, "one screen"


def test_every_word_of_the_glossary_names_its_file() -> None:
    table = (ROOT / "docs/architecture.md").read_text().partition("\n## Glossary\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25
    for row in rows:
        assert (ROOT / row[3].strip(" `")).is_file(), row[1]


def test_every_step_of_a_token_names_the_files_to_open() -> None:
    text = (ROOT / "docs/architecture.md").read_text().partition("\n## The life of a token\n")[2].partition("\n## ")[0]
    steps = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(steps) > 10
    for step in steps:
        assert any(path.endswith(".py") and (ROOT / path).is_file() for path in CODE.findall(step)), step


def test_every_message_is_listed() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.partition("\n## Messages\n")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [name for cell in first_cells for name in CODE.findall(cell)]
    there = [
        name
        for name, value in vars(messages).items()
        if isinstance(value, type)
        and value.__module__.startswith("opd_async.transport.messages.")
        and hasattr(value, "__dataclass_fields__")
    ]
    assert sorted(listed) == sorted(there)


# --- topologies ------------------------------------------------------------------------------------------------------


def topologies() -> list[tuple[str, dict[str, Any]]]:
    """Every yaml block that is a topology, or a part of one."""
    found = []
    for page in PAGES:
        for number, text in enumerate(blocks(page, "yaml")):
            data = yaml.safe_load(text)
            if isinstance(data, dict) and set(data) & set(SECTIONS):
                found.append((f"{page.relative_to(ROOT)} block {number}", data))
    return found


@pytest.mark.parametrize(("where", "data"), topologies(), ids=[where for where, _ in topologies()])
def test_topologies_load(where: str, data: dict[str, Any], tmp_path: Path) -> None:
    """Whole ones as they are, parts inside a small one; devices are given out once."""
    file = tmp_path / "topology.yaml"
    file.write_text(yaml.safe_dump(data if "schedule" in data else LEAST | data))
    assert list(device_problems(load_topology(file))) == []


def test_the_readme_has_a_topology_and_names_a_large_one() -> None:
    """The large one is loaded, planned and checked by `test_example_topologies.py`."""
    assert any("schedule" in data for where, data in topologies() if where.startswith("README.md"))
    large = yaml.safe_load((ROOT / "examples/four-engines.yaml").read_text())
    assert "](examples/four-engines.yaml)" in (ROOT / "README.md").read_text()
    assert large["engines"]["student"]["replicas"] > 1 and len(large["learner"]["devices"]) > 1


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/*.yaml")), ids=lambda file: str(file.name))
def test_examples_load_and_give_each_device_out_once(file: Path) -> None:
    assert list(device_problems(load_topology(file))) == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_topology_keys_exist(page: Path) -> None:
    """`schedule.steps`, `learner.devices: ...`, `--set schedule.steps=20`."""
    wrong = []
    texts = [*spans(page), *(line for block in blocks(page, "") for line in re.findall(r"--set (\S+)", block))]
    for text in texts:
        key = re.fullmatch(r"(?:--set )?([a-z]\w*(?:\.[a-z]\w*)+)(?:[:=].*)?", text)
        if key is None or key[1].split(".")[0] not in SECTIONS:
            continue
        if schema_at(tuple(key[1].split("."))) is None:
            wrong.append(key[1])
    assert wrong == []


# --- commands, options, files ----------------------------------------------------------------------------------------


@cache
def known_flags() -> frozenset[str]:
    """Options of the launcher and the example's scripts, and of SGLang's and Slurm's programs where a run uses them."""
    sources = [
        ROOT / "opd_async/options.py",
        *ROOT.glob("opd_async/cli/*.py"),
        ROOT / "opd_async/command.py",
        ROOT / "opd_async/agent.py",
        ROOT / "opd_async/config/slime_flags.py",
        ROOT / "opd_async/config/reference.py",
        ROOT / "opd_async/forecast/flags.py",
        *ROOT.glob("bench/**/*.py"),
        *ROOT.glob("examples/*/*.py"),
        ROOT / "tests/chaos/__main__.py",
        ROOT / "tests/cluster/__main__.py",
    ]
    found = {flag for file in sources for flag in re.findall(r'add_argument\(\s*"(--[a-z-]+)"', file.read_text())}
    servers = "".join(
        (ROOT / file).read_text() for file in ("opd_async/engines/sglang.py", "tests/sglang/test_router.py")
    )
    found |= {f"--no-{flag[2:]}" for flag in found if flag == "--use-opd"}
    # which tests/cluster runs, or has read by Kubernetes' schemas
    others = [ROOT / "examples/cluster" / name for name in ("ray.sh", "kubernetes.yaml")]
    for script in (*ROOT.glob("examples/*/*.sbatch"), *others):
        found |= set(re.findall(r"(?<=[ \[])--[a-z-]+", script.read_text()))
    return frozenset(found | OTHER_FLAGS | SGLANG_FLAGS | LM_EVAL_FLAGS | set(re.findall(r'"(--[a-z-]+)"', servers)))


def test_the_launcher_takes_the_options_that_the_readme_names() -> None:
    arguments = parse_arguments(["--topology", "x.yaml", "--dry-run", "--resume", "--overwrite", "--set", "a=1"])
    assert arguments.dry_run and arguments.resume and arguments.overwrite and arguments.set == ["a=1"]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_exist(page: Path) -> None:
    texts = [*spans(page), *blocks(page, "", "sh", "bash")]
    used = {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)}
    assert used <= known_flags(), used - known_flags()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_of_opd_exist(page: Path) -> None:
    texts = [*spans(page), *blocks(page, "", "sh", "bash")]
    used = {name for text in texts for name in re.findall(r"(?:^|bin/)opd ([a-z]+)", text, re.MULTILINE)}
    assert used <= set(COMMANDS), used - set(COMMANDS)


def test_the_page_on_running_has_every_command() -> None:
    table = RUNNING.read_text().partition("\n## The command `opd`\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `opd (\w+)", table, re.MULTILINE)) == sorted(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist(page: Path) -> None:
    """`make X` and `python -m X`."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    texts = [*spans(page), *blocks(page, "", "sh", "bash")]
    for text in texts:
        for target in re.findall(r"\bmake ([a-z]+)\b", text):
            assert target in targets, f"make {target}"
        for module in re.findall(r"python -m ([\w.]+)", text):
            name = module.replace(".", "/")
            is_ours = name.split("/")[0] in PACKAGES
            files = (ROOT / f"{name}.py", ROOT / name / "__main__.py")
            assert not is_ours or any(file.is_file() for file in files), f"python -m {module}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_exist(page: Path) -> None:
    """Files of this repository that inline code names."""
    wrong = []
    for text in spans(page):
        path = re.fullmatch(r"(?:opd_async|actors|learner|bench|tests|docs|requirements|dashboards)/[\w./-]*", text)
        if path and not (ROOT / text).exists():
            wrong.append(text)
    assert wrong == []


def test_the_page_on_running_lists_what_a_run_leaves() -> None:
    listed = {text.rstrip("/") for text in spans(RUNNING)}
    assert set(MADE_BY_RUNS) <= listed, set(MADE_BY_RUNS) - listed


def columns_of(heading: str) -> list[str]:
    """First cells of the table below a heading of docs/running.md."""
    table = RUNNING.read_text().partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def learner_columns() -> list[str]:
    """What learner rank 0 answers to a step: the fields of its metrics (read, not imported: they need torch)."""
    tree = ast.parse((ROOT / "learner/metrics.py").read_text())
    (record,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "StepMetrics")
    fields = [node.target.id for node in record.body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]
    return [f"learner_{name}" for name in (*fields, "idle_s")]


def test_every_column_of_a_step_is_listed(tmp_path: Path) -> None:
    """The row that the ledger writes of what the intake says about a step with rewards, and of the learner's answer.
    `tests/e2e/test_quickstart.py` looks up what a whole run has written."""
    step = taken(1, 0, 3)._replace(episode=0)
    assert step.segment is not None
    step.segment.positions = np.arange(3, dtype=np.int32)
    stats, ages = describe_step([step.segment], 0)
    stats |= describe_rewards([Outcome(0, 1.0, 3)]) | describe_filtered(0)
    topology = Topology.model_validate({**LEAST, "telemetry": {"planned_tokens_per_s": 1.0}})
    stats |= StepFigures(topology, RoleMetrics("intake")).of_step([step], [step.segment])
    nobody = np.zeros(0, np.int64)
    started = messages.StepStarted(
        version=0,
        waited_s=0.0,
        stats=stats,
        staleness_counts=ages,
        taken_ids=nobody,
        taken_ends=nobody,
        taken_complete=nobody,
    )
    plan: Any = SimpleNamespace(run_folder=tmp_path, topology=topology, of_kind=lambda _: (), device_count=1)
    ledger = Ledger(plan=plan)
    ledger.rewind(0)
    ledger.step(started, {}, 0.0, 0.0)
    ledger.close()
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    # those of EVALUATED behind an evaluation, by its judge
    assert sorted(columns_of("Rows of steps")) == sorted([*row, *EVALUATED, *learner_columns()])


def test_every_column_of_an_evaluation_is_listed() -> None:
    assert sorted(columns_of("Rows of evaluations")) == sorted(["time", "evaluation", *Evaluation.model_fields])


def test_what_pages_ask_of_a_report_is_there() -> None:
    """A field or a property is written without brackets."""
    asked = {
        found.groups()
        for page in PAGES
        for text in (*spans(page), *blocks(page, "python"))
        for found in re.finditer(r"\breport\.(?!json\b|py\b)(\w+)(\(?)", text)
    }
    assert ("rows", "") in asked
    for name, call in asked:
        assert name in Report.model_fields or hasattr(Report, name), name
        assert callable(getattr(Report, name, None)) is bool(call), name


def test_status_and_commands_come_first() -> None:
    """A reader learns what was never run before the first command, and the first command is the quickstart."""
    readme = ROOT / "README.md"
    before = readme.read_text().partition("\n## Quickstart\n")[0]
    assert "never run on a GPU" in before and "on no real cluster" in before and "```" not in before
    assert blocks(readme, "")[0].split()[:2] == ["make", "quickstart"]
    assert "make test" in blocks(readme, "")[0]


@pytest.mark.parametrize("name", WITH_INDEX)
def test_indexes_list_the_headings(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "<!-- index -->" in text and text == with_index(text), "run: python tests/core/pages.py"


# --- metrics, messages, links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_metrics_exist(page: Path) -> None:
    names = {entry.name for entry in CATALOGUE}
    names |= {
        f"{entry.name}_{part}"
        for entry in CATALOGUE
        if entry.kind is MetricKind.HISTOGRAM
        for part in ("bucket", "sum", "count")
    }
    used = {name for text in spans(page) for name in re.findall(r"\bopd_(?!async)[a-z_]+", text)}
    assert used <= names, used - names


@cache
def texts_of_the_program() -> tuple[str, ...]:
    """Every string constant in the source; a placeholder stands between the parts of an f-string."""
    found: list[str] = []
    for file in (file for package in PACKAGES for _, file in modules(package)):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def quoted_messages() -> list[str]:
    """The headings of the troubleshooting page that quote the program."""
    return re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_exist(message: str) -> None:
    """Each part between two `<placeholders>` stands in the source."""
    parts = [part for part in re.split(r"<[^<>]*>", message) if len(part.strip(" :;,.()")) > 3]
    assert parts
    for part in parts:
        assert any(part.strip() in text for text in texts_of_the_program()), part


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {anchor(heading) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
