"""Twins: `reference/torch` and `reference/jax` hold the same functions, and what is said at length is said once."""

import ast
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "reference"
SHAPED = re.compile(r"\w+_[A-Z0-9]+")  # a local array, named with its axes
OTHER_ARRAYS = {"grouped_matmul"}  # with static sizes every row meets every matrix, which is another way to do it

Named = ast.FunctionDef | ast.ClassDef


def modules(framework: str) -> dict[str, ast.Module]:
    return {file.name: ast.parse(file.read_text()) for file in (REFERENCE / framework).glob("[!_]*.py")}


TORCH, JAX = modules("torch"), modules("jax")


def named(tree: ast.Module) -> list[Named]:
    return [node for node in tree.body if isinstance(node, Named)]


def parameters(node: Named) -> list[str]:
    return [each.arg for each in (*node.args.args, *node.args.kwonlyargs)] if isinstance(node, ast.FunctionDef) else []


def shaped_arrays(node: Named) -> set[str]:
    stored = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    return set(filter(SHAPED.fullmatch, stored))


def disagreement(module: str, said: str, twin: str) -> str:
    """What is wrong with a twin's docstring, beside that of `module`, the PyTorch one's dotted name; empty if nothing is.

    One line stands in both, or the twin reads "As `module`" with what differs; of a longer one the twin reads so always.
    """
    if re.fullmatch(rf"As `{re.escape(module)}`(, but [^\n]+)?\.", twin):
        return ""
    if "\n" in said:
        return f"`{module}` says it at length: begin with 'As `{module}`', then ', but' and what differs"
    return "" if said == twin else f"neither {said!r} nor 'As `{module}`, but ...'"


def test_twins_have_the_same_files():
    assert sorted(TORCH) == sorted(JAX) and len(TORCH) >= 10


@pytest.mark.parametrize("file", sorted(TORCH))
def test_twins_have_the_same_functions_with_the_same_parameters(file: str):
    of_torch, of_jax = ([(each.name, parameters(each)) for each in named(trees[file])] for trees in (TORCH, JAX))
    assert of_torch == of_jax


@pytest.mark.parametrize("file", sorted(TORCH))
def test_twins_name_their_arrays_alike(file: str):
    for one, other in zip(named(TORCH[file]), named(JAX[file]), strict=True):
        assert (shaped_arrays(one) == shaped_arrays(other)) == (one.name not in OTHER_ARRAYS), one.name


@pytest.mark.parametrize("file", sorted(TORCH))
def test_twins_say_at_length_once(file: str):
    assert ast.get_docstring(TORCH[file]) == ast.get_docstring(JAX[file]), "the text at the top, with the legend of shapes"
    module = f"gaugeblock.reference.torch.{file.removesuffix('.py')}"
    for one, other in zip(named(TORCH[file]), named(JAX[file]), strict=True):
        said, twin = ast.get_docstring(one), ast.get_docstring(other)
        assert said and twin, one.name
        assert not (wrong := disagreement(f"{module}.{one.name}", said, twin)), f"reference/jax/{file}:{other.lineno}: {wrong}"


@pytest.mark.parametrize(
    ("said", "twin", "agrees"),
    [
        ("One line.", "One line.", True),
        ("One line.", "Another line.", False),
        ("One line, int64.", "As `a.f`, but int32.", True),
        ("Text.\n\nMore.", "Text.\n\nMore.", False),
        ("Text.\n\nMore.", "As `a.f`.", True),
        ("Text.\n\nMore.", "As `a.g`.", False),
        ("Text.\n\nMore.", "As `a.f`.\n\nMore.", False),
    ],
)
def test_a_copy_and_a_contradiction_are_found(said: str, twin: str, agrees: bool):
    assert (disagreement("a.f", said, twin) == "") == agrees
