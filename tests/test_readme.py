"""Everything that README.md and the documents beside the code show works: fenced blocks run in order, in an empty folder each.

- A block whose first line is `# NAME.EXT` is saved as that file.
- Any other `python` block is executed; all share one namespace, in one process of their own.
- In a `console` block each line `$ COMMAND` is run and must exit 0, or N if it ends in `# exit N`. The other
  lines are what it printed once, for the reader: figures differ between machines, so they are not compared.
- A `text` block is only shown. No other language is allowed, so that nothing goes unnoticed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

FENCED_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SAVED_AS = re.compile(r"# (?P<name>[\w-]+\.\w+)\n")
COMMAND = re.compile(r"^\$ (?P<command>.+?)(?:\s+# exit (?P<status>\d+))?$", re.MULTILINE)

# Commands that are not run here, by how they begin, and why.
COVERED_ELSEWHERE = {
    "git clone ": "needs the network",
    "cd ": "follows the clone",
    "make ": "would run this test again; test_make_targets_exist sees that the targets are there",
    "pip install ": "needs the network; tests/test_packaging.py installs the wheel",
}


class Step(NamedTuple):
    """One thing that a document tells its reader to do."""

    document: str
    line: int
    kind: str  # "save", "python" or "command"
    text: str
    name: str = ""  # of the file to save
    status: int = 0  # with which the command should exit


def read_steps(document: str, markdown: str) -> Iterator[Step]:
    for block in FENCED_BLOCK.finditer(markdown):
        line = markdown.count("\n", 0, block.start("text")) + 1
        text = block["text"]
        if saved := SAVED_AS.match(text):
            yield Step(document, line, "save", text, name=saved["name"])
        elif block["language"] == "python":
            yield Step(document, line, "python", text)
        elif block["language"] == "console":
            for found in COMMAND.finditer(text):
                command_line = line + text.count("\n", 0, found.start())
                yield Step(document, command_line, "command", found["command"], status=int(found["status"] or 0))
        elif block["language"] != "text":
            raise ValueError(f"{document}:{line}: a block of language {block['language']!r} would go untested")


def covered_elsewhere(step: Step) -> bool:
    return step.kind == "command" and step.text.startswith(tuple(COVERED_ELSEWHERE))


NAMESPACE: dict[str, Any] = {"__name__": "readme"}


def execute(step: Step) -> None:
    """Runs in the child process; a traceback points to the line of the document."""
    exec(compile("\n" * (step.line - 1) + step.text, ROOT / step.document, "exec"), NAMESPACE)


def follow(step: Step, run_python: Callable[[Step], None]) -> None:
    match step.kind:
        case "save":
            Path(step.name).write_text(step.text)
        case "python":
            run_python(step)
        case "command":
            status = subprocess.run(step.text, shell=True, executable="/bin/bash", check=False).returncode
            assert status == step.status, f"{step.document}:{step.line}: `{step.text}` exits {status}"


def shown() -> dict[str, list[Step]]:
    """What each document tells its reader to do, of those that do."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    steps = {name: list(read_steps(name, (ROOT / name).read_text())) for name in listed.splitlines()}
    return {name: each for name, each in steps.items() if each}


SHOWN = shown()


def test_enough_is_shown():
    kinds = {name: {step.kind for step in steps} for name, steps in SHOWN.items()}
    assert kinds["README.md"] >= {"save", "command"} and set.union(*kinds.values()) == {"save", "python", "command"}


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("document", SHOWN)
def test_every_block_works(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    # Not in this process: a document may register implementations, and the other tests should not see them.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as child:
        for step in SHOWN[document]:
            if not covered_elsewhere(step):
                follow(step, lambda python: child.submit(execute, python).result())


def test_make_targets_exist():
    targets = [step for steps in SHOWN.values() for step in steps if step.text.startswith("make ")]
    assert targets
    for step in targets:
        dry_run = [*step.text.split(), "--dry-run"]
        assert subprocess.run(dry_run, cwd=ROOT, check=False).returncode == 0, f"{step.document}:{step.line}"


def test_a_block_of_unknown_language_is_refused():
    with pytest.raises(ValueError, match=r"README\.md:3: .*'bash'"):
        list(read_steps("README.md", "# Title\n```bash\nmake test\n```\n"))


def test_blocks_become_steps_with_their_lines():
    markdown = """\
```python
# kernels.py
x = 1
```
```console
$ gaugeblock check kernels.py   # exit 1
FAIL
$ make check
```
```text
shown
```
```python
import kernels
```
"""
    assert list(read_steps("A.md", markdown)) == [
        Step("A.md", 2, "save", "# kernels.py\nx = 1\n", name="kernels.py"),
        Step("A.md", 6, "command", "gaugeblock check kernels.py", status=1),
        Step("A.md", 8, "command", "make check"),
        Step("A.md", 14, "python", "import kernels\n"),
    ]
