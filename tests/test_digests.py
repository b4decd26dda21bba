"""What a verdict depends on, as the texts of modules tell, and which digests change with which file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import gaugeblock
from gaugeblock.conformance.engine.devices import set_up_process
from gaugeblock.conformance.engine.exploration import PROFILES
from gaugeblock.conformance.engine.implementation import Candidate, Implementation
from gaugeblock.conformance.engine.kept import circumstances
from gaugeblock.conformance.engine.kept.digest import ENGINE, Digests
from gaugeblock.conformance.engine.kept.imports import told
from gaugeblock.conformance.engine.kept.trees import Disk
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import builtin_implementations, contracts
from gaugeblock.conformance.engine.trial import Subject

PACKAGE = Path(gaugeblock.__path__[0])
QUICK = PROFILES["quick"]
VELOCITY = "objectives.rectified_flow_velocity"


class Edited(Disk):
    """The files, one of them with a line more."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.ending, self.was_read = ending, False

    def read(self, path: str) -> bytes | None:
        text = super().read(path)
        if text is None or not path.endswith(self.ending):
            return text
        self.was_read = True
        return text + b"\n# a line more\n"


@pytest.fixture(scope="module")
def subjects():
    set_up_process()
    found = [each for contract in contracts().values() for each in builtin_implementations(contract)]
    return {(each.contract, each.name): Subject(each, each.dtypes[0], "cpu") for each in found}


@pytest.fixture(scope="module")
def before():
    return Digests()


def touched(subjects, before, ending, prop="parity"):
    """Implementations whose verdict on a property changes with a file."""
    after = Digests(Edited(ending))
    return {
        key for key, each in subjects.items()
        if before.sources(each, properties()[prop]) != after.sources(each, properties()[prop])
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what is built in


def test_a_kernels_helper_touches_the_kernels_that_load_it(subjects, before):
    found = touched(subjects, before, "optimized/triton/topk.py")
    language_models = ("sdar.", "llada.", "dream.")  # which have what makes each of them, also experts, in one module
    routing = ("routers.", "moe_layers.", "dit_moe.", "token_choices.", "upcycled_gpt2.", *language_models)
    kernels = {key for key in subjects if key[1] == "triton" and any(each in key[0] for each in routing)}
    over_ranks = [key for key, each in subjects.items() if each.on_ranks and each.implementation.framework == "torch"]
    layers_over_ranks = {key for key in over_ranks if "moe_layers." in key[0]}  # which take the kernels on a GPU
    of_layers = {key for key in over_ranks if key[0].startswith(language_models) and key[1] != "fsdp2"}
    assert found == kernels | layers_over_ranks | of_layers and len(of_layers) > len(language_models)


def test_a_contract_touches_its_implementations(subjects, before):
    assert touched(subjects, before, "contracts/objectives.py") == {key for key in subjects if key[0].startswith("objectives.")}


def test_a_reference_touches_every_contract_that_it_is_the_oracle_of(subjects, before):
    found = {contract for contract, _ in touched(subjects, before, "reference/torch/objectives.py")}
    assert {each for each in contracts() if each.startswith("objectives.")} <= found
    assert not any(each.startswith(("routers.", "experts.", "layers.")) for each in found)


def test_a_twin_touches_itself_and_what_is_made_of_it(subjects, before):
    assert touched(subjects, before, "reference/jax/objectives.py") == {
        *((name, "reference-jax") for name in contracts() if name.startswith(("objectives.", "train_image", "train_stable"))),
        *((name, "jax-sharded") for name in contracts() if name.startswith(("train_image", "train_stable"))),
    }


def test_a_property_touches_its_own_verdicts(subjects, before):
    assert touched(subjects, before, "test_determinism.py", "determinism") == {*subjects}
    assert not touched(subjects, before, "test_determinism.py", "parity")


@pytest.mark.parametrize(
    "module", [*ENGINE, "gaugeblock.conformance.engine.judging.judge", "gaugeblock.conformance.engine.judging.verdict"]
)
def test_the_engine_touches_everything(subjects, before, module):
    ending = module.removeprefix("gaugeblock.").replace(".", "/") + ".py"
    assert touched(subjects, before, ending) == {*subjects}


@pytest.mark.parametrize("ending", ["conformance/report/page.py", "conformance/bench/timing.py", "conformance/cli.py"])
def test_reports_benchmarks_and_the_command_touch_nothing(subjects, before, ending):
    assert (PACKAGE / ending).is_file()
    assert not touched(subjects, before, ending)


def test_every_built_in_verdict_has_a_digest_of_its_own(subjects, before):
    digests = [before.of(each, prop, QUICK) for each in subjects.values() for prop in properties().values()]
    assert None not in digests and len({*digests}) == len(digests)


def test_dtype_profile_and_claims_are_part_of_a_digest(subjects, before):
    subject, parity = subjects["routers.softmax_topk", "reference"], properties()["parity"]
    others = [
        before.of(Subject(subject.implementation, "bfloat16", "cpu"), parity, QUICK),
        before.of(subject, parity, PROFILES["ci"]),
        before.of(Subject(replace(subject.implementation, deterministic=False), "float32", "cpu"), parity, QUICK),
    ]
    assert len({before.of(subject, parity, QUICK), *others}) == 4


JUDGES = """
import json, sys
from gaugeblock.conformance.engine.devices import set_up_process
set_up_process()
from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.frameworks import Call
from gaugeblock.conformance.engine.inputs.cases import make_inputs, options, Case
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import builtin_implementations, contract_modules, find_contract
from gaugeblock.conformance.engine.processes.perform import Conditions, perform
from gaugeblock.conformance.engine.trial import Subject
contract = find_contract("routers.softmax_topk")
reference, _, triton, *_ = builtin_implementations(contract)
assert triton.kind == "triton"
for name in ("parity", "races"):
    assert examine(Subject(reference, "float32", "cpu"), properties()[name], PROFILES["quick"]).status != "fail"
case = Case(regime="dithered", **contract.landmarks[0])
perform(triton, Call(make_inputs(contract, case, "float32"), options(contract, case)), Conditions())
from gaugeblock.conformance.engine.kept.digest import Digests
digests = Digests()
known = frozenset().union(*(digests.files(Subject(triton, "float32", "cpu"), prop) for prop in properties().values()))
known |= frozenset().union(*(digests.built_in((each,)).files for each in contract_modules().values()))  # all are imported
files = [each.__file__ for name, each in sys.modules.items() if name.startswith("gaugeblock.")]
print(json.dumps([each for each in files if each not in known]))
"""


def test_what_is_built_in_hides_nothing():
    judged = [*(PACKAGE / "reference").rglob("*.py"), *(PACKAGE / "optimized").rglob("*.py")]
    hiding = {each.relative_to(PACKAGE).as_posix() for each in judged if told(each.read_bytes()).hides}
    assert hiding == {
        "reference/validation/arrays.py", "reference/expert_layouts.py",  # look for a framework that is loaded
        "reference/expert_checkpoints.py",  # reads a checkpoint
        "reference/jax/training.py", "reference/torch/training.py", "reference/saved_runs.py",  # read a checkpoint
    }  # fmt: skip


def test_nothing_that_is_loaded_where_a_kernel_is_judged_is_forgotten():
    done = subprocess.run([sys.executable, "-c", JUDGES], capture_output=True, text=True, check=True, timeout=170)
    assert json.loads(done.stdout.splitlines()[-1]) == []


# --------------------------------------------------------------------------------------------------------- a user's files


@pytest.fixture
def digest_of(tmp_path):
    """The digest of a kernel in a folder that holds these files."""

    def of(**files: str) -> str | None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("INIT", "__init__")
            path = path if path.suffix else path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        source = str(tmp_path / "kernels.py")
        subject = Subject(Implementation(VELOCITY, "mine", Candidate(source)), "float32", "cpu")
        return Digests().of(subject, properties()["parity"], QUICK)

    of.folder = tmp_path
    return of


@pytest.mark.parametrize(
    "importing",
    [
        "import helper",
        "from helper import x",
        "def f():\n    import helper",
        "try:\n    import helper\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('helper')",
        "import importlib\nimportlib.import_module('hel' + 'per')",
        "exec(open('helper.py').read())",
        "PATH = 'helper:x'",
    ],
)
def test_a_helper_counts_however_it_is_loaded(digest_of, importing):
    first = digest_of(kernels=importing, helper="x = 1")
    assert first and digest_of() == first and digest_of(helper="x = 2") != first


def test_what_is_not_loaded_does_not_count(digest_of):
    first = digest_of(kernels="import helper", helper="x = 1", other="x = 1")
    assert digest_of(other="x = 2", **{"README.md": "more"}) == first


def test_what_type_checkers_alone_import_does_not_count(digest_of):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import helper\nelse:\n    import other"
    first = digest_of(kernels=text, helper="x = 1", other="x = 1")
    assert digest_of(helper="x = 2") == first != digest_of(other="x = 2")


def test_packages_count_with_all_that_importing_them_runs(digest_of):
    files = {"package__INIT": "", "package__inner__INIT": "from . import beside", "package__inner__beside": "x = 1"}
    first = digest_of(kernels="import package.inner.leaf", package__inner__leaf="", **files)
    for name in ("package__INIT", "package__inner__INIT", "package__inner__beside", "package__inner__leaf"):
        now = digest_of(**{name: "from . import beside  # more" if name.endswith("inner__INIT") else "x = 2"})
        assert now != first
        first = now


def test_a_star_counts_for_every_submodule(digest_of):
    first = digest_of(kernels="from package import *", package__INIT="__all__ = ['leaf']", package__leaf="x = 1")
    assert digest_of(package__leaf="x = 2") != first


def test_modules_of_the_package_that_a_file_lies_in_count(digest_of):
    first = digest_of(kernels="from .helper import x", INIT="", helper="x = 1")
    assert digest_of(helper="x = 2") != first


def test_data_and_libraries_beside_a_module_count(digest_of):
    first = digest_of(kernels="import package.leaf", package__INIT="", package__leaf="")
    second = digest_of(**{"package__table.json": "[1]"})
    assert len({first, second, digest_of(**{"package__table.json": "[2]"}), digest_of(**{"kernel.so": "machine code"})}) == 4


def test_a_file_whose_name_is_told_counts_wherever_it_lies(digest_of):
    first = digest_of(kernels="TABLE = 'data/table.txt'", **{"data__table.txt": "1"})
    assert digest_of(**{"data__table.txt": "2"}) != first


@pytest.mark.parametrize(
    "text", ["import ctypes", "import sys\nsys.path.insert(0, 'x')", "import torch\ntorch.ops.load_library(x)", "f = open(x)"]
)
def test_of_what_hides_what_it_loads_the_whole_folder_counts(digest_of, text):
    first = digest_of(kernels=text, deep__down__unseen="x = 1")
    assert digest_of(deep__down__unseen="x = 2") != first
    first = digest_of(report__gaugeblock="", **{"report__gaugeblock.json": "{}", ".hidden__file": "1"})
    assert digest_of(**{"report__page.html": "2", ".hidden__file": "2"}) == first  # what a run of the gate leaves behind


def test_nothing_is_kept_of_what_may_load_more_than_can_be_looked_at(digest_of, monkeypatch):
    monkeypatch.setattr("gaugeblock.conformance.engine.kept.digest.MOST_FILES", 4)
    assert digest_of(kernels="import ctypes", a="", b="") is not None
    assert digest_of(c="") is None


def test_a_kernel_that_hides_nothing_is_taken_at_its_word():
    kernel = b"import torch, triton\nimport triton.language as tl\n\n@triton.jit\ndef f(x):\n    tl.load(x)\n"
    assert not told(kernel + b"model.eval()\ntorch.compile(f)").hides


def test_an_installed_package_counts_by_its_files(digest_of, monkeypatch):
    assert "tabulate" not in circumstances.packages() and circumstances.packages({"torch"}) == circumstances.packages()
    first = digest_of(kernels="import tabulate")
    assert circumstances.packages({"tabulate"})["tabulate"]
    monkeypatch.setattr(circumstances, "_files", lambda package: "built anew")
    assert digest_of() != first


def test_a_missing_package_counts_when_it_comes(digest_of):
    first = digest_of(kernels="try:\n    import no_such_package\nexcept ImportError:\n    pass")
    assert first and digest_of(no_such_package="x = 1") != first


@pytest.mark.parametrize(
    "variable", ["ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS"]
)
def test_a_pretended_cpu_is_another(digest_of, monkeypatch, variable):
    first = digest_of(kernels="")
    monkeypatch.setenv(variable, "other")
    assert digest_of() != first


def test_where_caches_lie_does_not_count(digest_of, monkeypatch):
    first = digest_of(kernels="")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert digest_of() == first


def test_another_processor_is_another(digest_of, monkeypatch):
    first = digest_of(kernels="")
    monkeypatch.setattr(circumstances, "_cpu", lambda: ["another"])
    assert digest_of() != first


def test_a_folder_may_lie_anywhere(digest_of, tmp_path_factory):
    first = digest_of(kernels="import helper", helper="x = 1", **{"table.json": "1"})
    copy = tmp_path_factory.mktemp("copy")
    for each in digest_of.folder.iterdir():
        (copy / each.name).write_bytes(each.read_bytes())
    subject = Subject(Implementation(VELOCITY, "mine", Candidate(str(copy / "kernels.py"))), "float32", "cpu")
    assert Digests().of(subject, properties()["parity"], QUICK) == first
