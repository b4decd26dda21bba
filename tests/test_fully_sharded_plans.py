"""What of each model is gathered at once where its parameters are shared out: every block, where it runs."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from agreement import assert_agree

from gaugeblock.conformance.engine.budget.oracle import exact_inputs, reference_run
from gaugeblock.conformance.engine.inputs.cases import Case, options
from gaugeblock.conformance.engine.registry import builtin_implementations, contracts, find_contract
from gaugeblock.optimized.distributed import fully_sharded_models as models
from gaugeblock.reference.torch import dit_moe_layers

WITHOUT_A_ROW = {"sdar.sdar_cached": "sdar_cached", "sdar.sdar_training": "sdar_training"}  # they would repeat sdar's


def rows() -> dict[str, str]:
    """Of each contract that is computed so, the name of the model."""
    functions = [(each, str(row.function)) for each, contract in contracts().items() for row in builtin_implementations(contract)]
    return WITHOUT_A_ROW | {
        each: function.partition("fully_sharded_models:")[2]
        for each, function in functions
        if "fully_sharded_models:" in function
    }


@pytest.mark.parametrize("name", rows())
def test_every_block_is_gathered_where_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        models.auxiliary_losses, "balance_loss", lambda *arguments, group: dit_moe_layers.balance_loss(*arguments)
    )
    contract, model = find_contract(name), getattr(models, rows()[name])
    case = Case(**contract.landmarks[0], regime="dithered")
    gathered = set[frozenset[str]]()

    def formula(state: Mapping[str, torch.Tensor], *arrays: Any, config: Any, **others: Any) -> Any:
        used = {each: state[each].clone() for each in model.shapes(config)}  # in memory of its own, so that each has one name
        name_of = {id(tensor): each for each, tensor in used.items()}

        def gather(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **others: Any) -> Any:
                (part,) = (each for each in arguments if isinstance(each, Mapping))
                gathered.add(frozenset(name_of[id(tensor)] for tensor in part.values() if id(tensor) in name_of))
                return function(*arguments, **others)

            return run

        mesh = type("Mesh", (), {"get_group": lambda self: None})()
        return model.predict(gather, used, *arrays, config=config, mesh=mesh, **others)

    arguments = exact_inputs(contract, case, "float32"), options(contract, case)
    expected = reference_run(contract, *arguments)
    assert_agree(reference_run(contract, *arguments, formula=formula), expected)

    blocks: dict[str, set[str]] = {}
    for each in model.shapes(arguments[1]["config"]):
        if begin := re.match(rf"({model.blocks})\.", each):
            blocks.setdefault(begin[1], set()).add(each)
    whole = {frozenset(each) for each in blocks.values()}
    assert len(whole) > 1 and whole <= gathered
    for others in gathered - whole:  # a model, or what it has once
        assert any(block <= others for block in whole) or not any(re.search(r"\.\d+\.", each) for each in others), others


def test_every_model_is_some_contracts() -> None:
    assert sorted(rows().values()) == sorted(name for name, each in vars(models).items() if isinstance(each, models.Model))
