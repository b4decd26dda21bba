"""A wrong row is refused where it is written, by its name and the field's."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from gaugeblock.conformance.engine.contract import ContractError, Derived, Input, Recurrence, Rejection, Selection
from gaugeblock.conformance.engine.factors import edges
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.registry import contracts, find_contract, import_folder
from gaugeblock.conformance.engine.shardings import Blocks, EvenMultiple
from gaugeblock.conformance.selftest.fault import Fault

ROUTER = find_contract("routers.softmax_topk")
LANDMARK = ROUTER.landmarks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "softmax_topk"}, "name: expected family.operation, got 'softmax_topk'"),
        (
            {"inputs": (Input("router_logits", ("num_token", "num_experts")),)},
            "unknown dimension 'num_token'; did you me",
        ),
        (
            {"inputs": (Input("x", ("num_tokens",), dtype="float23"),)},
            "inputs['x']: unknown dtype 'float23'; did you",
        ),
        ({"inputs": (*ROUTER.inputs, *ROUTER.inputs)}, "inputs and options: 'router_logits' stands there twice"),
        ({"without": {"paritty": "why"}}, "without: no property 'paritty'; did you mean 'parity'?"),
        ({"without": {"parity": " "}}, "without['parity']: expected the reason, got ' '"),
        ({"landmarks": (LANDMARK, {"num_tokens": 1})}, "landmarks[1]: lacks 'num_experts', which landmarks[0] has"),
        ({"landmarks": (LANDMARK, LANDMARK | {"top_q": 1})}, "landmarks[1]: has 'top_q', which landmarks[0] lacks"),
        ({"workloads": (replace(ROUTER.workloads[0], parameters={}),)}, "workloads['mixtral-8x7b/prefill-4096']: lacks"),
        ({"options": ("top_p",)}, "options: landmarks lack 'top_p'; did you mean 'top_k'?"),
        ({"batch": "tokens"}, "batch: no input or output has the dimension 'tokens'; did you mean 'num_tokens'?"),
        ({"shardings": {"spread": {"token": "even"}}}, "shardings['spread']: no input or output has the dimension 'token'"),
        (
            {"shardings": {"spread": {"num_tokens": "even", "num_experts": "even"}}},
            "shardings['spread']: expected one dimension of router_logits to be split, got ['num_tokens', 'num_experts']",
        ),
        (
            {"shardings": {"spread": {"num_experts": Blocks("num_tokens")}}},
            "shardings['spread']['num_experts']: expected 'num_tokens' to be split evenly, got None",
        ),
        (
            {"shardings": {"spread": {"num_tokens": EvenMultiple("num_group")}}},
            "shardings['spread']['num_tokens']: landmarks lack 'num_group'",
        ),
        ({"implementations": (distributed("fast", sharding="spread"),)}, "implementations['fast']: no sharding 'spread'"),
        ({"selection": Selection("ids", len, "top_k")}, "selection: no output 'ids'; did you mean 'topk_ids'?"),
        ({"selection": Selection("topk_ids", len, "top_kk")}, "selection: landmarks lack 'top_kk'; did you mean 'top_k'?"),
        (
            {"inputs": (Input("x", (Derived("half", lambda sizes: sizes["num_tokens"] // 2), "num_token")),)},
            "inputs['x']: unknown dimension 'num_token'",
        ),
        ({"recurrence": Recurrence("num_tokens", {"state": "topk_ids"})}, "recurrence: no input 'state'"),
        ({"factors": (edges("width", 1),)}, "factors['width']: cannot be read from landmarks[0]: KeyError: 'width'"),
        ({"dtypes": ("float8",)}, "dtypes: unknown dtype 'float8'"),
        ({"parameters": None, "factors": ()}, "parameters: expected a strategy, or factors with values, got None"),
        ({"build": None}, "build: expected a function that makes parameters of the factors' values, got None"),
        ({"cases": 0}, "cases: expected a positive number, got 0"),
        ({"regimes": ()}, "regimes: expected one at least, got none"),
        ({"rejections": (Rejection("nameless", "", dict),)}, "rejections['nameless']: expected what the error must name, got ''"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_row_is_refused(changes, message):
    with pytest.raises(ContractError) as refusal:
        replace(ROUTER, **changes)
    assert str(refusal.value).startswith(changes.get("name", ROUTER.name) + ": ") and message in str(refusal.value)


def test_a_size_may_follow_from_others():
    halves = Input("x", ("num_tokens", Derived("half", lambda sizes: sizes["num_tokens"] // 2), 3))
    assert halves.sizes({"num_tokens": 8}) == (8, 4, 3)
    assert str(halves.shape[1]) == "half"


@pytest.mark.parametrize("field", [{"above": 0.0}, {"group_scores": len, "group_count": 1}])
def test_what_is_chosen_one_by_one_has_neither_groups_nor_a_threshold(field):
    with pytest.raises(ContractError, match="ids: one_by_one knows neither groups nor a threshold"):
        Selection("ids", len, 2, one_by_one=True, **field)


def test_a_wrong_argument_at_its_place_cannot_be_made():
    with pytest.raises(TypeError, match="positional"):
        type(ROUTER)("routers.mine", "a summary")


def test_what_catches_a_planted_bug_is_a_property():
    row = {"name": "bug", "contract": ROUTER.name, "candidate": dict, "summary": "", "kind": "state"}
    with pytest.raises(ValueError, match=r"routers.softmax_topk \(bug\): caught_by: unknown 'parety'; did you mean 'parity'"):
        Fault(**row, caught_by="parety")


def test_every_row_stands_first_in_its_file():
    for module in import_folder("gaugeblock.conformance.contracts"):
        defined = [each for each in ast.parse(Path(module.__file__).read_text()).body if isinstance(each, ast.FunctionDef)]
        rows = [bool(each.decorator_list) and ast.unparse(each.decorator_list[0]) == "row" for each in defined]
        assert rows == sorted(rows, reverse=True), module.__name__


def test_the_references_of_all_rows_have_twins_of_their_name():
    for row in contracts().values():
        module = row.reference.__module__.rpartition(".")[2]  # several rows may be of one operation
        assert row.twin == f"gaugeblock.reference.jax.{module}:{row.reference.__name__}"
        assert row.name.startswith(f"{module}.{row.reference.__name__}")
