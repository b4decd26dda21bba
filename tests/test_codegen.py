"""`gaugeblock codegen` sees what becomes of the sound and the faulty kernels in kernels_to_compile.py."""

import json
import re
from pathlib import Path

import pytest

from gaugeblock.conformance.codegen import command as codegen
from gaugeblock.conformance.engine.triton.chips import CHIPS


@pytest.fixture(scope="module", autouse=True)
def kernels_importable():
    """Compilation happens in other processes, which see this one's import path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def good(kernels_importable) -> list[codegen.CompiledKernel]:
    return codegen.compile_in_subprocesses("kernels_to_compile:GOOD", list(CHIPS))


@pytest.fixture(scope="module")
def bad(kernels_importable) -> list[codegen.CompiledKernel]:
    return codegen.compile_in_subprocesses("kernels_to_compile:BAD", ["sm_90", "gfx942"])


def select(rows: list[codegen.CompiledKernel], label: str, target: str) -> list[codegen.CompiledKernel]:
    return [row for row in rows if row.label == label and row.target == target]


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")],
)
def test_dots_become_the_matrix_instructions_of_the_chip(good, target, instruction):
    (row,) = select(good, "bfloat16", target)
    assert set(row.matrix_instructions) == {instruction}
    assert row.kernel == "matmul_kernel"
    assert row.registers > 0 and 0 < row.shared_bytes <= row.shared_limit
    assert row.config.startswith("(ROWS=64, COLUMNS=64, DEPTH=64, num_warps=4, num_stages=")


def test_dots_of_few_rows_may_use_the_smaller_instruction(good):
    (row,) = select(good, "float16 few rows", "sm_90")
    assert set(row.matrix_instructions) == {"mma.sync"}


def test_sound_kernels_have_no_problems(good):
    assert [row for row in good if row.problems] == []


def test_a_version_is_compiled_once(good):
    assert select(good, "bfloat16 again", "sm_90") == []


def test_alignment_makes_another_version(good):
    assert len(select(good, "bfloat16 unaligned", "sm_90")) == 1


def test_large_products_of_experts_read_weights_by_descriptors():
    rows = codegen.compile_in_subprocesses("kernels_to_compile:MANY_TILES", ["sm_90"])
    assert not any(row.problems for row in rows)
    assert {row.kernel for row in rows if row.tile_copies} == {"_first_product_kernel", "_rows_times_matrices_kernel"}


@pytest.mark.parametrize("target", CHIPS)
def test_every_autotuner_config_is_compiled(good, target):
    configs = {row.config for row in select(good, "autotuned", target)}
    assert {config.split(",")[0] for config in configs} == {"(BLOCK=128", "(BLOCK=256"}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_too_much_shared_memory_is_a_problem(bad, target):
    (row,) = select(bad, "too much shared memory", target)
    assert row.shared_bytes > row.shared_limit == CHIPS[target].shared_bytes
    assert any("bytes of shared memory" in problem for problem in row.problems)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_are_a_problem(bad, target):
    (row,) = select(bad, "spilling", target)
    assert row.spilled_bytes > 0 and any("spills" in problem for problem in row.problems)


@pytest.mark.parametrize(("label", "dtype"), [("two warps", "f16"), ("two warps of e4m3", "f8E4M3FN")])
def test_a_missing_matrix_instruction_is_a_problem(bad, label, dtype):
    (row,) = select(bad, label, "sm_90")
    assert row.problems == (f"has a tl.dot of 64 rows of {dtype}, but no wgmma.mma_async",)


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("wrong", "raises CompilationError: NameError"),
        ("raising", "raises RuntimeError"),
        ("empty", "launches no Triton"),
    ],
)
def test_a_launch_that_compiles_nothing_is_a_problem(bad, label, problem):
    (row,) = select(bad, label, "sm_90")
    assert row.kernel == "" and row.problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("launches", "status", "num_rows", "last_words"),
    [
        ("GOOD", 0, 7, "7 versions of 3 kernels compiled, 0 problems"),
        ("BAD", 1, 7, "4 versions of 2 kernels compiled, 7 problems"),
        ("NOTHING", 3, 0, "0 versions"),
    ],
)
def test_exit_status(launches, status, num_rows, last_words, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    arguments = ["--target", "sm_90", "--launches", f"kernels_to_compile:{launches}", "--json", str(rows)]
    assert codegen.main(arguments) == status
    assert len(json.loads(rows.read_text())) == num_rows
    assert last_words in capsys.readouterr().out.splitlines()[-1]


def test_refuses_to_compile_where_triton_interprets(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        codegen.compile_all([], ["sm_90"])


@pytest.mark.long
@pytest.mark.timeout(400)  # 77 s alone, where no version has been compiled before
def test_our_kernels_have_no_problems_on_hopper(capsys):
    """A sample of each kernel's versions: `gaugeblock codegen` compiles all of them, for every chip, in minutes."""
    status = codegen.main(["--target", "sm_90", "--launches", "gaugeblock.conformance.codegen.launches:SAMPLE"])
    printed = capsys.readouterr().out
    assert status == codegen.PASSED, printed
    sources = "".join(each.read_text() for each in (Path(__file__).parents[1] / "optimized/triton").glob("*.py"))
    compiled = {line.split()[0] for line in printed.splitlines() if " sm_90 " in line}
    launched = set(re.findall(r"\b(\w+)\[[^\]\n]*\]\(", sources)) & set(re.findall(r"def (\w+)", sources))
    assert len(compiled) > 20 and launched <= compiled
