"""Everything named in README, CONTRIBUTING and docs/ exists: links, files, functions, tests, targets, options."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("dags", "plugins", "include", "tests", "benchmarks", "docs")
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
# They tell of what was: a name in them may be gone.
HISTORY = {"CHANGELOG.md", "log.md"}
# Files of a host or of a run; the reader's own begin with "my" or "mine".
NOT_OURS = {
    "job.sh",
    "recipe.yaml",
    "schedules.yaml",
    "supervisor.py",
    "matrix.svg",
    "docs/gguf.md",
}
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
page_of_today = pytest.mark.parametrize(
    "page", [path for path in PAGES if path.name not in HISTORY], ids=lambda path: path.name
)


@cache
def files() -> frozenset[str]:
    """Every file of the repository, relative to it."""
    found = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    found += REPOSITORY.glob("*")
    return frozenset(
        str(path.relative_to(REPOSITORY))
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    )


def ending_in(name: str) -> list[str]:
    """The files that a name may mean: whole, or its last parts."""
    return [file for file in files() if file == name or file.endswith(f"/{name}")]


def code_of(page: Path) -> list[str]:
    """What stands in backticks or as code, a piece a line; continued lines are one."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (\S.*)$", rest, re.MULTILINE)
    return [*re.findall(r"`([^`]+)`", rest), *indented, *"\n".join(blocks).splitlines()]


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file), target


@page_of_today
def test_every_file_that_is_named_is_there(page: Path) -> None:
    for code in code_of(page):
        for name in re.findall(r"[\w./{},*-]*\w\.(?:py|sh|yaml|toml|svg|md)\b", code):
            base = name.rpartition("/")[2]
            placeholder = base.split(".")[0].isupper() or re.match(r"my_|mine\.", base)
            if base in NOT_OURS or placeholder or "*" in name or "{" in name:
                continue
            assert ending_in(name.removeprefix("./")), name


@page_of_today
def test_every_function_that_is_named_after_its_file_is_in_it(page: Path) -> None:
    for name, function in re.findall(r"`([\w./]+\.py)`,? `(\w+)`", page.read_text()):
        found = [(REPOSITORY / file).read_text() for file in ending_in(name)]
        assert any(re.search(rf"\b(def|class) {function}\b", text) for text in found), function


@page_of_today
def test_every_test_that_is_named_is_there(page: Path) -> None:
    tests = [file for file in files() if re.search(r"(^|/)test_\w+\.py$", file)]
    for name, test in re.findall(r"([\w./]*)::(test_\w+…?)", page.read_text()):
        of = [file for file in tests if file.endswith(name)]
        ending = "" if test.endswith("…") else r"\("
        wanted = re.compile(rf"^(async )?def {test.removesuffix('…')}{ending}", re.MULTILINE)
        assert any(wanted.search((REPOSITORY / file).read_text()) for file in of), test


@page_of_today
def test_every_target_of_make_is_one(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {match for code in code_of(page) for match in re.findall(r"^make ([a-z-]+)", code)}
    assert named <= targets


@page_of_today
def test_every_option_that_is_printed_after_a_script_is_its_own(page: Path) -> None:
    for code in code_of(page):
        script, found, rest = code.partition(".py ")
        files = ending_in(f"{script.rpartition('/')[2].split()[-1]}.py") if found else []
        for option in re.findall(r"--[a-z_]+", rest) if len(files) == 1 else []:
            assert option in (REPOSITORY / files[0]).read_text(), f"{files[0]} {option}"


def test_every_page_that_the_code_names_is_there() -> None:
    for file in files():
        if not file.startswith("docs/") and file.endswith((".py", ".sh", ".yaml", ".txt")):
            for name in re.findall(r"docs/\w+\.md", (REPOSITORY / file).read_text()):
                assert name in files() | NOT_OURS, f"{file}: {name}"
