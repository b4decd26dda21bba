"""Registration: what is taken, what is refused and in which words, wherever it comes from."""

import sys

import pytest

from gaugeblock.conformance import cli, exit_status, implements
from gaugeblock.conformance.engine import registry
from gaugeblock.conformance.engine.registry import RegistrationError, find_contract, load_candidates
from gaugeblock.conformance.engine.selection import Filters, subjects_of

ROUTER = "routers.softmax_topk"
REGISTERS = """\
from gaugeblock.conformance import implements

@implements("routers.softmax_topk", name="{name}")
def route(router_logits, *, top_k, renormalize):
    ...
"""


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    registry.load_entry_points.cache_clear()
    yield
    registry.load_entry_points.cache_clear()


@pytest.fixture
def candidate(tmp_path):
    """Writes a candidate file, and modules beside it, and returns the path of the first."""

    def write(name, text, **beside):
        for stem, other in {name: text, **beside}.items():
            (tmp_path / f"{stem}.py").write_text(other)
        return str(tmp_path / f"{name}.py")

    return write


def route(router_logits, *, top_k, renormalize):
    raise NotImplementedError("never called here")


def refusal(register, function=route) -> str:
    with pytest.raises(RegistrationError) as error:
        register(function)
    return str(error.value)


def refused(source) -> str:
    """The reason why a candidate file or module is refused: one line."""
    with pytest.raises(RegistrationError) as error:
        load_candidates(source)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- implements


def test_implements_is_a_decorator_and_a_call_and_returns_the_function_itself():
    assert implements(ROUTER, name="decorated")(route) is route
    (row,) = registry.registered_implementations()
    assert (row.contract, row.name, row.function, row.kind) == (ROUTER, "decorated", route, "user")


def test_the_claims_by_default_are_the_strong_ones():
    implements(ROUTER, name="plain")(route)
    (row,) = registry.registered_implementations()
    assert (row.framework, row.dtypes, row.devices, row.rounding) == (
        "torch",
        ("float32",),
        ("cpu",),
        "strict",
    )
    assert row.differentiable and row.deterministic and row.batch_invariant and row.validates


def test_claims_are_kept_and_one_dtype_needs_no_tuple():
    claims = {"framework": "jax", "rounding": "eager", "differentiable": False, "deterministic": False}
    implements(ROUTER, name="modest", dtypes="float16", devices=["cpu", "cuda"], **claims)(route)
    (row,) = registry.registered_implementations()
    assert (row.dtypes, row.devices) == (("float16",), ("cpu", "cuda"))
    assert {name: getattr(row, name) for name in claims} == claims


def test_an_unknown_contract_is_answered_with_the_nearest():
    assert f"did you mean {ROUTER!r}?" in refusal(implements("router.softmax_top_k", name="x"))
    assert ROUTER in refusal(implements("zzz", name="x"))


def test_an_unknown_claim_is_answered_with_the_nearest():
    assert "unknown claim 'dtype'; did you mean 'dtypes'?" in refusal(implements(ROUTER, name="x", dtype="float32"))


@pytest.mark.parametrize(
    "claims",
    [
        {"dtypes": ("float32", "float8")},
        {"dtypes": ()},
        {"devices": "tpu"},
        {"framework": "tensorflow"},
        {"rounding": "lax"},
        {"deterministic": "yes"},
    ],
    ids=repr,
)
def test_a_claim_of_a_wrong_value_is_told_what_is_allowed(claims):
    ((name, value),) = claims.items()
    message = refusal(implements(ROUTER, name="x", **claims))
    assert f"{name} must be of " in message and repr(value) in message


@pytest.mark.parametrize(
    "function",
    [
        lambda router_logits, *, top_k: None,
        lambda router_logits, *, top_k, renormalize, temperature: None,
        lambda: None,
    ],
    ids=["an option is missing", "an option too many", "no arguments"],
)
def test_a_wrong_signature_is_told_the_right_one(function):
    message = refusal(implements(ROUTER, name="mine"), function)
    assert "mine(" in message and find_contract(ROUTER).signature in message


def test_what_is_no_function_is_refused():
    assert "expected a function, got int" in refusal(implements(ROUTER, name="x"), 3)


def test_a_name_is_taken_once_for_each_contract():
    implements(ROUTER, name="mine")(route)
    assert "'mine' is already registered" in refusal(implements(ROUTER, name="mine"))
    assert "'triton' is already registered" in refusal(implements(ROUTER, name="triton"))
    experts = "experts.fused_swiglu"
    implements(experts, name="mine")(lambda hidden_states, w13, w2, topk_weights, topk_ids: None)
    assert [each.contract for each in registry.registered_implementations()] == [ROUTER, experts]


# ------------------------------------------------------------------------------------------ files and modules


def test_a_file_is_run_and_what_it_registers_comes_back(candidate):
    (row,) = load_candidates(candidate("my_kernels", REGISTERS.format(name="mine")))
    assert (row.contract, row.name) == (ROUTER, "mine")
    assert registry.load(row).__module__ == "my_kernels"


def test_a_file_may_import_its_neighbours(candidate):
    source = candidate("with_neighbour", "import kernels_beside", kernels_beside=REGISTERS.format(name="beside"))
    assert [each.name for each in load_candidates(source)] == ["beside"]


def test_a_module_is_imported(candidate, monkeypatch, tmp_path):
    candidate("installed_kernels", REGISTERS.format(name="installed"))
    monkeypatch.syspath_prepend(tmp_path)
    assert [each.name for each in load_candidates("installed_kernels")] == ["installed"]


def test_a_syntax_error_is_told_with_its_file_and_line(candidate):
    source = candidate("broken", "x = 1\ndef f(:\n")
    assert refused(source).startswith(f"{source}:2: syntax error: ")
    user = candidate("user_of_broken", "import os\n\nimport broken_beside", broken_beside="def f(:")
    assert "broken_beside.py:1: syntax error: " in refused(user)


def test_an_error_at_import_is_told_in_one_line_with_its_place(candidate):
    source = candidate("raises", "def f():\n    raise RuntimeError('no such chip\\nand a long story')\n\nf()\n")
    assert refused(source) == f"{source}:2: RuntimeError: no such chip"
    missing = candidate("imports", "import a_package_that_is_missing")
    assert refused(missing) == f"{missing}:1: ModuleNotFoundError: No module named 'a_package_that_is_missing'"


def test_a_file_that_exits_is_refused(candidate):
    source = candidate("exits", "import sys\nsys.exit(0)\n")
    assert refused(source) == f"{source}:2: SystemExit: 0"


def test_a_wrong_registration_is_told_with_its_file(candidate):
    source = candidate("unknown", REGISTERS.format(name="x").replace("softmax_topk", "softmax_top"))
    message = refused(source)
    assert message.startswith(source) and "did you mean 'routers.softmax_topk'?" in message


def test_a_file_that_is_missing_or_registers_nothing_is_refused(candidate, tmp_path):
    missing = str(tmp_path / "missing.py")
    assert refused(missing) == f"{missing}: no such file"
    empty = candidate("empty", "")
    assert refused(empty).startswith(f"{empty}: registers no implementation")


@pytest.mark.parametrize("text", ["def f(:", "raise RuntimeError", "import sys; sys.exit(0)", ""])
def test_the_command_says_in_one_line_what_is_wrong_with_a_file_and_exits_2(text, candidate, capsys):
    assert cli.main(["check", candidate("wrong", text)]) == exit_status.WRONG_CALL
    output = capsys.readouterr()
    assert output.err.startswith("gaugeblock: ") and output.err.count("\n") == 1 and not output.out


def test_nothing_to_test_on_this_machine_exits_3(candidate, capsys):
    source = candidate("float32_only", REGISTERS.format(name="mine"))
    assert cli.main(["check", source, "--dtype", "bfloat16"]) == exit_status.NOTHING_TESTED
    assert "nothing was tested" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- entry points


@pytest.fixture
def installed_package(candidate, monkeypatch, tmp_path):
    """An installed package `name` with the entry point that makes its implementations known."""

    def install(name, text):
        candidate(name, text)
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (tmp_path / f"{name}-1.dist-info" / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\nkernels = {name}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_installed_packages_register_through_their_entry_point(installed_package):
    installed_package("package_a", REGISTERS.format(name="of-a-package"))
    subjects = subjects_of((), Filters(implementations=("of-a-*",)))
    assert [subject.implementation.name for subject, _ in subjects] == ["of-a-package"]


def test_a_module_with_an_entry_point_can_be_a_candidate(installed_package):
    installed_package("package_b", REGISTERS.format(name="of-a-package"))
    subjects = subjects_of(("package_b",), Filters())
    assert [(subject.implementation.name, source) for subject, source in subjects] == [("of-a-package", "package_b")]


def test_a_broken_installed_package_is_named(installed_package):
    installed_package("package_c", "raise RuntimeError('no driver')")
    with pytest.raises(RegistrationError, match=r"entry point 'kernels' \(package_c\): RuntimeError: no driver"):
        subjects_of((), Filters())
