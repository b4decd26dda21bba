"""What is cited exists: files, folders, modules, sections of documents, make targets, commands; links of Markdown lead somewhere.

Looked at are docstrings and comments of Python, strings that are a path of the tree, comments of Makefile and TOML, and Markdown
outside of its fenced blocks (those of the README are run by `tests/test_readme.py`).
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REALMS = ("reference", "optimized", "conformance")

# What commands write, and what users have. Files of other repositories are cited behind the word "Source:".
MADE = frozenset(
    """my_kernels.py my_ranks.py broken.py waivers.toml kernels/ FAILURE.json A.json B.json
    report/ failures/ index.html gaugeblock.json summary.md badge.json junit.xml
    .venv/ .asv/html/ benchmarks/results/ machine.json ceilings.json""".split()
)

FILE = re.compile(r"(?<![\w./*-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|txt|jinja|json|html|yml|xml|sh|png))(?![\w*])(?!\.\w)")
FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
PATH = re.compile(rf"(?:{'|'.join(REALMS)}|benchmarks|tests|demo)/[\w./-]+\.\w+")
MODULE = re.compile(rf"(?<![\w./-])((?:gaugeblock\.)?(?:{'|'.join(REALMS)})(?:\.[A-Za-z_]\w*)+)(?![\w*]|/)")
SECTION = re.compile(r"((?:[\w-]+/)*[A-Z]{4,}(?:\.md)?),? sections? (\d+)")
TARGET = re.compile(r"`make (\w+)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|\$ |`)gaugeblock ([a-z]+)\b([^`\n]*)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FENCED_BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FOREIGN = re.compile(r"Source: .*?(?=\n\s*\n|\Z)", re.DOTALL)  # the paper, or the public model that is followed


@cache
def tree() -> frozenset[str]:
    """Every file of the repository, as a path from its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return frozenset(path for path in listed if (ROOT / path).is_file())


@cache
def folders() -> frozenset[str]:
    return frozenset(f"{parent}/" for path in tree() for parent in Path(path).parents if parent != Path("."))


def is_part_of(path: str, paths: frozenset[str]) -> bool:
    """Whether there is such a path, from the root or from any folder."""
    return path in paths or any(each.endswith(f"/{path}") for each in paths)


def prose(name: str) -> str:
    """What a file says to its reader, line by line where it stands; all else is blank."""
    path = ROOT / name
    match path.suffix or path.name:
        case ".md":
            return LINK.sub(lambda link: link[0].replace(link[1], ""), FENCED_BLOCK.sub(blank, path.read_text()))
        case ".py":
            return FOREIGN.sub(blank, python_prose(path.read_text()))
        case ".toml" | "Makefile":
            return "\n".join(line.partition("#")[2] for line in path.read_text().splitlines())
    return ""


def blank(found: re.Match[str]) -> str:
    """As many lines, of nothing."""
    return "\n" * found[0].count("\n")


def python_prose(text: str) -> str:
    """Docstrings, comments and paths of a module, each in its line."""
    lines = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] += token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (said := ast.get_docstring(node, clean=False)):
            for number, line in enumerate(said.split("\n"), node.body[0].lineno):
                lines[number] += line
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PATH.fullmatch(node.value):
            lines[node.lineno] += f" {node.value}"
    return "\n".join(lines[1:])


def wrong_citations(name: str, text: str) -> Iterator[str]:
    """What a file cites that does not exist, each with its line."""
    for pattern, is_wrong in (
        (FILE, lambda found: Path(found[1]).name not in MADE and not is_part_of(found[1], tree())),
        (FOLDER, lambda found: found[1] not in MADE and not is_part_of(found[1], folders())),
        (MODULE, lambda found: not is_module(found[1])),
        (SECTION, lambda found: not has_section(found[1], found[2])),
        (TARGET, lambda found: f"\n{found[1]}:" not in (ROOT / "Makefile").read_text()),
    ):
        for found in pattern.finditer(text):
            if is_wrong(found):
                line = text.count("\n", 0, found.start()) + 1
                yield f"{name}:{line}: {found[0]}"


def is_module(dotted: str) -> bool:
    """Whether a module, or a name in one, is there: "gaugeblock.reference.torch.dit.dit", with or without the first part."""
    parts = dotted.removeprefix("gaugeblock.").split(".")
    for count in range(len(parts), 0, -1):
        place, rest = "/".join(parts[:count]), parts[count:]
        if f"{place}/" in folders() and not rest:
            return True
        for file in (f"{place}.py", f"{place}/__init__.py"):
            if file in tree():
                return not rest or rest[0] in names_in(file)
    return False


@cache
def names_in(file: str) -> frozenset[str]:
    """What a module defines or hands on at its top."""
    names: set[str] = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {each.asname or each.name for each in node.names}
        else:
            names |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    return frozenset(names)


def has_section(document: str, number: str) -> bool:
    path = document.removesuffix(".md") + ".md"
    files = [each for each in tree() if each == path or each.endswith(f"/{path}")]
    return any(re.search(rf"^#+ {number}\. ", (ROOT / each).read_text(), re.MULTILINE) for each in files)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED_BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def broken_links(name: str, text: str) -> Iterator[str]:
    """Links of a Markdown text to files or headings that are not there; what lies on other machines is not looked at."""
    for found in LINK.finditer(text):
        path, _, anchor = found[1].partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if re.match(r"\w+:", path):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            yield f"{name}: {found[1]}"


@cache
def help_of(command: str) -> str:
    arguments = [sys.executable, "-m", "gaugeblock.conformance.cli", command, "--help"]
    return subprocess.run(arguments, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def wrong_calls(text: str) -> Iterator[str]:
    """Commands of ours that do not exist, or have not the options that they are shown with."""
    for command, rest in COMMAND.findall(text):
        own = rest.partition(" -- ")[0]  # what stands behind is another command's
        if not help_of(command) or not set(OPTION.findall(own)) <= set(OPTION.findall(help_of(command))):
            yield f"gaugeblock {command}{rest}"


def documents() -> list[str]:
    return sorted(path for path in tree() if path.endswith(".md"))


def rooms() -> list[str]:
    """The folders that a newcomer finds: those at the top, and those of the gate."""
    return sorted(each for each in folders() if re.fullmatch(r"(?!\.)[\w-]+/|conformance/\w+/", each))


def test_nothing_is_cited_that_does_not_exist():
    wrong = [each for name in sorted(tree()) for each in wrong_citations(name, prose(name))]
    assert not wrong, "\n".join(wrong)


def test_links_lead_somewhere():
    assert documents()
    broken = [each for name in documents() for each in broken_links(name, FENCED_BLOCK.sub("", (ROOT / name).read_text()))]
    assert not broken, "\n".join(broken)


def test_commands_and_options_exist():
    wrong = [f"{name}: {call}" for name in documents() for call in wrong_calls((ROOT / name).read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("`gaugeblock list --json`", False),
        ("`gaugeblock list --jsonl`", True),
        ("$ gaugeblock nowhere", True),
        ("gaugeblock machines --machine sse4 -- my_kernels.py --anything", False),
    ],
)
def test_a_wrong_call_is_found(text: str, is_wrong: bool):
    assert bool([*wrong_calls(text)]) == is_wrong


def test_rates_that_are_told_twice_are_the_same():
    told = re.search(r"by `gaugeblock selftest`:(.*?)all rates", (ROOT / "README.md").read_text(), re.DOTALL)
    table = (ROOT / "conformance" / "selftest" / "README.md").read_text()
    assert told and [each for each in re.findall(r"\d[\d.,]*\d", told[1]) if each not in table] == []


def test_every_room_has_a_readme_that_is_read_in_a_minute():
    assert {"reference/", "conformance/", "conformance/engine/"} <= set(rooms())
    for room in rooms():
        assert f"{room}README.md" in tree(), f"{room} has none"
        lines = (ROOT / room / "README.md").read_text().splitlines()
        assert len(lines) <= 40, room
        assert any(each.startswith("**Read first** [") for each in lines), f"{room}: which two files?"
        assert any(each.startswith("**One more") for each in lines), f"{room}: how is one more added?"


@pytest.mark.parametrize(
    "text",
    [
        "see CATALOGUE section 1",
        "see conformance/MISSING.md",
        "the constants of `nowhere.py`",
        "`conformance/nowhere/` has them",
        "as in `gaugeblock.reference.torch.nowhere`",
        "as in `reference.torch.experts.nowhere`",
        "conformance/JUDGING.md section 99",
        "call `make nowhere` first",
    ],
)
def test_a_citation_of_what_does_not_exist_is_found(text: str):
    assert [*wrong_citations("README.md", text)]


@pytest.mark.parametrize(
    "text",
    [
        "see README.md and `tests/test_documents.py`, or `test_documents.py`",
        "`conformance/` and `reference/torch/`",
        "as in `gaugeblock.reference.torch.experts.fused_swiglu`, or reference.jax",
        "call `make check`, which writes `report/index.html`",
    ],
)
def test_a_citation_of_what_exists_is_none_to_complain_of(text: str):
    assert not [*wrong_citations("README.md", text)]


def test_docstrings_and_comments_are_looked_at_and_code_is_not():
    code = '"""One."""\nx = "two"  # three\ndef f():\n    """Four,\n    five."""\n    return "tests/test_cli.py"\n'
    assert python_prose(code).split("\n")[:6] == ["One.", "# three", "", "Four,", "    five.", " tests/test_cli.py"]


@pytest.mark.parametrize(
    ("target", "is_broken"),
    [("tests", False), ("nowhere.md", True), ("#a-heading-of-two", False), ("#nowhere", True), ("https://example.org", False)],
)
def test_links_that_lead_nowhere_are_found(target: str, is_broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = f"# A heading, of *two*\n[a link]({target})\n"
    (tmp_path / "tests").mkdir()
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert bool([*broken_links("page.md", text)]) == is_broken
