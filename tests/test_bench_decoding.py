"""The bench of decoding: passes are counted, wrong tokens flagged, and who cannot take part says why."""

from dataclasses import replace

import pytest
import torch

from gaugeblock.conformance.bench import decoding
from gaugeblock.conformance.bench.command import exit_status
from gaugeblock.conformance.bench.competitors import Competitor, competitors
from gaugeblock.conformance.bench.history import DECODED
from gaugeblock.conformance.bench.problem import QUICK, make_problem
from gaugeblock.conformance.bench.roofline import Machine
from gaugeblock.conformance.bench.rows import Effort
from gaugeblock.conformance.engine.contract import Workload
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.reference.torch import sdar

MACHINE = Machine("a machine", "cpu", "float32", flops=1e11, bytes=1e10)
CONTRACT = find_contract(DECODED)
TINY = Workload("tiny", CONTRACT.landmarks[0], "the first landmark")
NAMED = {each.name: each for each in competitors(CONTRACT)}


def decode(*competing: Competitor) -> list[decoding.DecodingRow]:
    return decoding.decode(CONTRACT, TINY, competing, MACHINE, Effort(QUICK, seconds=0.01, thrifty=True))


def hasty(state, input_ids, past_keys, past_values, *, config):
    """Looks at no past."""
    none = past_keys[:, :, :, :0]
    logits, keys, values = sdar.sdar_cached(state, input_ids, none, none, config=config)
    return logits, keys, values


def test_every_strategy_is_timed_and_its_passes_counted():
    rows = decode(NAMED["reference"], NAMED["torch-library"])
    assert len(rows) == 2 * len(decoding.STRATEGIES) and {row.status for row in rows} == {"measured"}
    assert all(row.prefill > 0 and row.denoising_pass > 0 and row.block > row.denoising_pass for row in rows)
    length = TINY.parameters["block_length"]
    for row in rows:
        assert row.tokens_per_pass * row.passes_per_block == pytest.approx(length)
        assert (row.passes_per_block == length) if row.strategy == "static" else (1 <= row.passes_per_block <= length)
    assert min(row.passes_per_block for row in rows) < length, "a sharp model is sure of more than one token at a time"
    text = decoding.render(rows)
    assert text.count("torch-library") == 3 and "entropy_bounded" in text


def test_other_tokens_are_flagged_and_not_timed():
    wrong = replace(NAMED["reference"], name="hasty", function=lambda problem: (hasty, "torch"))
    rows = decode(NAMED["reference"], wrong)
    others = [row for row in rows if row.implementation == "hasty"]
    assert {row.status for row in rows if row not in others} == {"measured"}
    assert {row.status for row in others} == {"wrong"} and all(row.block is None and "WRONG" in row.reason for row in others)
    assert exit_status(others) == 1


def test_who_cannot_take_part_says_why():
    def missing(problem):
        raise ModuleNotFoundError("No module named 'absent'")

    rows = decode(
        replace(NAMED["reference"], name="absent", function=missing),
        replace(NAMED["reference"], name="other", function=None),
        replace(NAMED["reference"], name="slow", compiles=True),
        replace(NAMED["reference"], name="kernel", interpreted=True),
    )
    reasons = {row.implementation: row.reason for row in rows}
    assert {row.status for row in rows} == {"absent"}
    assert reasons["absent"] == "not installed: No module named 'absent'" and "as the contract says" in reasons["other"]
    assert "compiles a whole model" in reasons["slow"] and "interpreter" in reasons["kernel"]


def test_the_head_alone_is_made_sharper():
    problem = make_problem(CONTRACT, TINY.parameters, "forward", MACHINE)
    sharp = decoding.sharpened(problem)
    changed = [key for key, each in problem.call.inputs.items() if not torch.equal(each, sharp.call.inputs[key])]
    assert changed == ["state/lm_head.weight"]
