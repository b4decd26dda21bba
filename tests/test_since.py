"""`--since REVISION`: what a change can have touched."""

import os
import subprocess

import pytest
from kept_runs import begin, kernel

from gaugeblock.conformance import cli, exit_status
from gaugeblock.conformance.engine.kept.trees import Disk, Revision

NEAR, FAR = {("near", "parity"), ("near", "determinism")}, {("far", "parity"), ("far", "determinism")}


def git(folder, *arguments):
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "one more")


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / ".gitignore").write_text("report\nkept\nhypothesis\n__pycache__\n")
    return folder


@pytest.fixture
def runs(monkeypatch, repository):
    found = begin(monkeypatch, repository)
    found.write(near=kernel("near", "import helper"), far=kernel("far"), helper="x = 1\n", unused="x = 1\n")
    commit(repository)
    return found


def test_what_a_changed_helper_can_have_touched_is_judged(runs, repository, capsys):
    runs.write(helper="x = 2\n")
    assert runs.check("--since", "HEAD") == exit_status.CONFORM
    assert runs.judged == NEAR == {*runs.verdicts}
    assert "2 of 4 verdicts can have been touched since HEAD (" in capsys.readouterr().out
    commit(repository)
    assert runs.check("--since", "HEAD~1", "--kept", "off") == exit_status.CONFORM
    assert runs.judged == NEAR
    assert runs.report["environment"]["part"]["since"]["untouched"] == 2
    assert "HEAD~1 (" in (repository / "report" / "index.html").read_text()


def test_a_change_that_touches_nothing_is_green_and_says_so(runs, capsys):
    runs.write(unused="x = 2\n")
    assert runs.check("--since", "HEAD") == exit_status.CONFORM
    assert not runs.judged and not runs.verdicts
    shown = capsys.readouterr().out
    assert "nothing was judged: none of 4 verdicts can have been touched since HEAD (" in shown and "conform" not in shown


def test_what_was_touched_and_fails_fails(runs):
    runs.write(near=kernel("near", more=" * 2"))
    assert runs.check("--since", "HEAD") == exit_status.FAILS


def test_a_new_candidate_was_touched(runs):
    runs.write(third=kernel("third"))
    assert runs.check("--since", "HEAD") == exit_status.CONFORM
    assert runs.judged == {("third", "parity"), ("third", "determinism")}


@pytest.mark.parametrize("pins", ["pyproject.toml", "requirements-dev.txt", "uv.lock"])
def test_what_says_which_packages_are_installed_touches_everything(runs, repository, capsys, pins):
    (repository / pins).write_text("")
    assert runs.check("--since", "HEAD") == exit_status.CONFORM
    assert runs.judged == NEAR | FAR and f"{pins} changed" in capsys.readouterr().out


def test_a_helper_that_is_gone_was_touched(runs, repository):
    runs.write(near=kernel("near", "try:\n    import helper\nexcept ImportError:\n    pass"))
    commit(repository)
    (runs.folder / "helper.py").unlink()
    runs.check("--since", "HEAD")
    assert runs.judged == NEAR


@pytest.mark.parametrize("revision", ["nowhere", "HEAD~9", "--all", ""])
def test_a_revision_that_does_not_exist_exits_2(runs, capsys, revision):
    assert cli.main(["check", str(runs.folder / "far.py"), f"--since={revision}"]) == exit_status.WRONG_CALL
    error = capsys.readouterr().err
    assert error.startswith("gaugeblock: --since") and error.count("\n") == 1 and revision in error


def test_a_candidate_outside_of_a_repository_exits_2(runs, capsys, tmp_path, repository):
    (tmp_path / "alone.py").write_text(kernel("alone"))
    assert cli.main(["check", str(tmp_path / "alone.py"), "--since", "HEAD"]) == exit_status.WRONG_CALL
    assert "is in no git repository" in capsys.readouterr().err
    assert cli.main(["check", str(runs.folder), str(tmp_path / "alone.py"), "--since", "HEAD"]) == exit_status.WRONG_CALL
    assert "alone.py is not in the repository" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- files of a revision


@pytest.fixture
def past(repository):
    """Paths in a repository of which each kind of entry was committed, then changed."""
    (repository / "folder").mkdir()
    (repository / "folder" / "kept.py").write_text("same")
    (repository / "folder" / "edited.py").write_bytes(b"before \xff")
    (repository / "folder" / "gone.py").write_text("gone")
    (repository / "link").symlink_to("folder")
    (repository / "one.py").symlink_to("folder/edited.py")
    commit(repository)
    (repository / "folder" / "edited.py").write_text("after")
    (repository / "folder" / "gone.py").unlink()
    (repository / "folder" / "new.py").write_text("new")
    return lambda *names: os.path.join(repository, *names)


def test_files_are_read_as_they_were(past, repository):
    tree = Revision(str(repository), "HEAD", Disk())
    found = {name: tree.read(past("folder", f"{name}.py")) for name in ("kept", "edited", "gone", "new")}
    assert found == {"kept": b"same", "edited": b"before \xff", "gone": b"gone", "new": None}
    assert tree.changed == {"folder/edited.py", "folder/gone.py", "folder/new.py"}
    assert tree.entries(past("folder")).files == {"kept.py", "edited.py", "gone.py"}
    assert tree.entries(past()).folders == {"folder", "link"} and "one.py" in tree.entries(past()).files


def test_links_are_followed_as_they_were(past, repository):
    tree = Revision(str(repository), "HEAD", Disk())
    (repository / "link").unlink()
    (repository / "link").symlink_to("nowhere")
    assert tree.read(past("link", "gone.py")) == b"gone" and tree.read(past("one.py")) == b"before \xff"
    assert tree.entries(past("link")) == tree.entries(past("folder"))
    assert tree.read(past("link", "kept.py")) == b"same" and tree.hash(past("link", "kept.py"))


def test_a_digest_tells_what_was_from_what_is(past, repository):
    disk = Disk()
    tree = Revision(str(repository), "HEAD", disk)
    same = {
        name: tree.hash(past("folder", name)) == disk.hash(past("folder", name)) for name in ("kept.py", "edited.py", "new.py")
    }
    assert same == {"kept.py": True, "edited.py": False, "new.py": False}


def test_what_is_outside_is_as_it_is(past, repository, tmp_path):
    (tmp_path / "outside.py").write_text("here")
    tree = Revision(str(repository), "HEAD", Disk())
    assert tree.read(str(tmp_path / "outside.py")) == b"here" and "outside.py" in tree.entries(str(tmp_path)).files
    assert tree.read(pytest.__file__) is not None  # installed, wherever that is
