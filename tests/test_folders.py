"""A folder of candidates: which files register, their neighbours, and what is wrong with a folder."""

import pytest
from kept_runs import begin, kernel

from gaugeblock.conformance import cli, exit_status
from gaugeblock.conformance.engine import registry
from gaugeblock.conformance.engine.folders import files_of
from gaugeblock.conformance.engine.processes.loading import describe_candidates
from gaugeblock.conformance.engine.registry import Candidate, RegistrationError


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_registered", {})

    def make(**files: str):
        for name, text in files.items():
            path = tmp_path / "kernels" / (name.replace("__", "/").replace("INIT", "__init__") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path / "kernels")

    return make


def described(*sources):
    """The name of each implementation, and the file that it is said to come from."""
    found = {each.name: each.function for each in describe_candidates(sources)}
    assert all(isinstance(each, Candidate) for each in found.values())
    return {name: each.source.rpartition("kernels/")[2] for name, each in found.items()}


def test_every_file_that_registers_is_found_also_below(folder):
    files = {
        "one": kernel("one"),
        "deep__down__two": kernel("two"),
        "helper": "x = 1",
        "setup": "raise SystemExit('not a kernel')",
    }
    assert described(folder(**files)) == {"one": "one.py", "two": "deep/down/two.py"}


@pytest.mark.parametrize(
    "text",
    [
        "from gaugeblock.conformance import implements",
        "from gaugeblock.conformance import implements as claims",
        "import gaugeblock.conformance",
        "from gaugeblock import conformance",
        "try:\n    from gaugeblock.conformance import implements\nexcept ImportError:\n    pass",
        "from gaugeblock.conformance import implements\n(",
    ],
)
def test_a_file_that_imports_implements_is_a_candidate(folder, text):
    assert [each.rpartition("/")[2] for each in files_of(folder(one=text, other="# gaugeblock.conformance implements"))] == [
        "one.py"
    ]


def test_files_of_hidden_folders_and_of_environments_are_none(folder, tmp_path):
    made = folder(
        one=kernel("one"), **{".hidden__two": kernel("two"), "venv__lib__three": kernel("three"), "build__four": kernel("four")}
    )
    (tmp_path / "kernels" / "venv" / "pyvenv.cfg").write_text("")
    assert [each.rpartition("/")[2] for each in files_of(made)] == ["one.py"]


def test_a_file_of_a_folder_may_register_nothing(folder):
    maker = "from gaugeblock.conformance import implements\n\ndef registered(name):\n    return implements(name)"
    assert described(folder(maker=maker, one=kernel("one"))) == {"one": "one.py"}


@pytest.mark.parametrize("files", [{"helper": "x = 1"}, {"maker": "from gaugeblock.conformance import implements"}])
def test_a_folder_in_which_nothing_registers_exits_2(folder, capsys, files):
    made = folder(**files)
    with pytest.raises(RegistrationError, match="implements"):
        described(made)
    assert cli.main(["check", made]) == exit_status.WRONG_CALL
    assert capsys.readouterr().err.startswith(f"gaugeblock: {made}: ")


def test_a_file_that_is_named_must_register(folder):
    made = folder(one=kernel("one"), maker="from gaugeblock.conformance import implements")
    with pytest.raises(RegistrationError, match="registers no implementation"):
        described(made, f"{made}/maker.py")


def test_neighbours_of_one_folder_are_not_those_of_another(folder):
    one, two = (kernel(name, f"from helper import {name}") for name in ("one", "two"))
    made = folder(a__one=one, a__helper="one = 1", b__two=two, b__helper="two = 2", b__one=kernel("three"))
    assert described(made) == {"one": "a/one.py", "two": "b/two.py", "three": "b/one.py"}


@pytest.mark.parametrize("importing", ["from b import b", "import b"])
def test_a_neighbour_that_registers_too_keeps_its_own(folder, importing):
    assert described(folder(a=kernel("a", importing), b=kernel("b"))) == {"a": "a.py", "b": "b.py"}


@pytest.mark.parametrize(
    "importing", ["from .b import b", "from kernels.b import b", "from kernels.inner.c import c", "import b"]
)
def test_a_package_is_a_folder_too(folder, importing):
    made = folder(INIT="", a=kernel("a", importing), b=kernel("b"), inner__INIT="", inner__c=kernel("c", "from ..b import b"))
    assert described(made) == {"a": "a.py", "b": "b.py", "c": "inner/c.py"}


def test_two_files_that_register_the_same_name_are_told(folder):
    with pytest.raises(RegistrationError, match="an implementation named 'one' is already registered"):
        described(folder(a=kernel("one"), b=kernel("one")))
    with pytest.raises(RegistrationError, match="an implementation named 'one' is already registered"):
        described(folder(a=kernel("one"), b="", deep__c=kernel("one")))


def test_what_a_folder_registers_is_judged(monkeypatch, tmp_path):
    runs = begin(monkeypatch, tmp_path)
    runs.write(a=kernel("a", "from b import b"), b=kernel("b", "import helper"), helper="")
    assert runs.check(properties=("parity",)) == exit_status.CONFORM
    assert runs.judged == {("a", "parity"), ("b", "parity")}
