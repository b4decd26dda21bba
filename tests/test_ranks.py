"""Candidates on ranks: what becomes of one that loses a rank, what ranks must have alike, and real ranks under torchrun."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gaugeblock.conformance.engine.contract import Input
from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.implementation import CLAIMS, Implementation
from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.judging.verdict import Verdict
from gaugeblock.conformance.engine.processes import ranks
from gaugeblock.conformance.engine.processes.loading import describe_candidates
from gaugeblock.conformance.engine.processes.ranks import join
from gaugeblock.conformance.engine.processes.seats import Seat
from gaugeblock.conformance.engine.processes.shards import part
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import RegistrationError, find_contract, implements
from gaugeblock.conformance.engine.shardings import Blocks, fit
from gaugeblock.conformance.engine.trial import Subject

CANDIDATES = Path(__file__).parent / "distributed_candidates.py"


@pytest.fixture(scope="module")
def candidates() -> dict[str, Implementation]:
    return {each.name: each for each in describe_candidates((str(CANDIDATES),))}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 4.0)


def verdict_on(implementation: Implementation, prop: str = "determinism") -> Verdict:
    return examine(Subject(implementation, "float32", "cpu"), properties()[prop], PROFILES["quick"])


# ------------------------------------------------------------------------------------------------- ranks that are lost


@pytest.mark.parametrize(
    ("name", "message", "place"),
    [
        ("dies", "on 2 devices: rank 1: the process died (SIGSEGV)", "stands in dies (distributed_candidates.py:"),
        ("raises", "rank 1 raised RuntimeError: no peer access, and the others wait", "rank 0 waits in all_to_all_single"),
        ("skips", "rank 1 raised", "rank 1 came back and waits for the others"),  # what it returns has no gradient
        ("hangs", "the ranks wait for ever", "rank 0 stands in hangs (distributed_candidates.py:"),
    ],
)
def test_a_lost_rank_fails_with_the_place_where_it_was_lost_and_the_next_candidate_gets_fresh_ranks(
    candidates, impatient, name, message, place
):
    start = time.monotonic()
    verdict = verdict_on(candidates[name])
    assert verdict.status == ("crash" if name == "dies" else "timeout") and verdict.failure is not None
    assert message in verdict.reason and place in verdict.failure.diagnosis
    assert any(f"in {name}" in detail for detail in verdict.failure.details)  # the traceback of the rank
    assert verdict_on(candidates["right"]).status == "pass"
    assert time.monotonic() - start < 30


def test_a_rank_that_skips_a_collective_is_waited_for_no_longer_than_the_patience(candidates, impatient):
    verdict = verdict_on(candidates["skips"], "parity")
    assert verdict.status == "timeout" and "the ranks wait for ever: none went on for" in verdict.reason
    assert "rank 0 waits in all_to_all_single" in verdict.failure.diagnosis


def test_the_ranks_of_one_candidate_serve_every_case(candidates):
    assert verdict_on(candidates["right"]).status == "pass"
    seat = Seat(Subject(candidates["right"], "float32", "cpu"), 2)
    generation = seat._ranks().generation
    assert all(verdict_on(candidates["right"], name).cases for name in ("determinism", "layout", "rejections"))
    assert seat._ranks().generation == generation


# ---------------------------------------------------------------------------------------------------- shards and claims


W13 = ("num_experts", "two_intermediate_sizes", "hidden_size")


@pytest.mark.parametrize(
    ("split", "rows_of_rank_1"),
    [
        ({"two_intermediate_sizes": Blocks("intermediate_size")}, [2, 3, 6, 7]),
        ({"two_intermediate_sizes": Blocks("intermediate_size", interleaved=True)}, [4, 5, 6, 7]),
        ({"num_experts": "even"}, [12, 13, 14, 15]),
        ({"num_tokens": "uneven"}, [0, 1, 2, 3]),
    ],
)
def test_what_is_split_is_put_together_again(split, rows_of_rank_1):
    tensor = torch.arange(16.0).view(2, 8, 1).expand(2, 8, 3)
    parts = [part(tensor, W13, split, rank, 2) for rank in range(2)]
    assert set(rows_of_rank_1) <= set(parts[1].flatten().tolist())
    assert torch.equal(join("w13", parts, W13, split), tensor)


def test_uneven_shards_are_joined():
    assert join("out", [torch.ones(2, 3), torch.ones(1, 3)], ("num_tokens", "hidden_size"), {"num_tokens": "uneven"}).shape == (
        3,
        3,
    )
    with pytest.raises(Violation, match="out: the ranks' shards do not fit together"):
        join("out", [torch.ones(2, 3), torch.ones(2, 4)], ("num_tokens", "hidden_size"), {"num_tokens": "uneven"})


@pytest.mark.parametrize("other", [torch.zeros(2), torch.tensor([1, torch.nan]), torch.tensor([1, torch.inf]), torch.ones(1)])
def test_what_ranks_must_have_alike_must_be_alike(other):
    """Gradients of what all ranks have as well: each has the whole of it."""
    same = torch.ones(2)
    for key in ("state", "gradient of state"):
        assert join(key, [same, same.clone()], ("width",), {}) is same
        with pytest.raises(Violation, match="rank 2 differs from that of rank 0"):
            join(key, [same, same.clone(), other], ("width",), {})


def test_zeros_of_both_signs_are_not_alike_and_nan_is_nan():
    with pytest.raises(Violation, match="rank 1 differs"):
        join("state", [torch.zeros(1), -torch.zeros(1)], ("width",), {})
    nan = torch.tensor([torch.nan])
    assert join("state", [nan, -nan], ("width",), {}) is nan


def test_sizes_that_must_divide_are_rounded_up():
    contract = find_contract("experts.fused_swiglu")
    sizes = {"num_tokens": 5, "num_experts": 5, "intermediate_size": 5, "two_intermediate_sizes": 10}
    assert fit(contract.sharding(""), sizes, 4) == sizes | {"num_experts": 8}
    assert fit(contract.sharding("tensor_parallel"), sizes, 4) == sizes | {"intermediate_size": 8, "two_intermediate_sizes": 16}


@pytest.mark.parametrize("sizes", [(0,), "2", (1.5,)])
def test_world_sizes_are_positive_integers(sizes):
    with pytest.raises(RegistrationError, match="world_sizes must be positive integers"):
        implements("experts.fused_swiglu", name="odd", world_sizes=sizes)(lambda *arguments, mesh: None)


def test_world_sizes_need_a_mesh_and_a_contract_that_shards():
    assert "world_sizes" in CLAIMS and isinstance(find_contract("experts.fused_swiglu").inputs[0], Input)
    with pytest.raises(RegistrationError, match="with mesh="):
        implements("experts.fused_swiglu", name="odd", world_sizes=(1, 2))(lambda a, b, c, d, e: None)
    with pytest.raises(
        RegistrationError, match="no sharding 'pipeline', only expert_parallel, replicated_tokens, tensor_parallel"
    ):
        implements("experts.fused_swiglu", name="odd", world_sizes=(2,), sharding="pipeline")(lambda *arguments, mesh: None)
    with pytest.raises(RegistrationError, match="does not shard"):
        implements("routers.softmax_topk", name="odd", world_sizes=(2,))(lambda logits, *, top_k, renormalize, mesh: None)


# ------------------------------------------------------------------------------------------------------------- torchrun


@pytest.mark.long
def test_torchrun_on_two_nodes_gives_the_verdicts_of_one_machine(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    check = ["check", str(CANDIDATES), "--implementation", "right", "--property", "parity", "--property", "world_size"]
    gaugeblock = [sys.executable, "-m", "gaugeblock.conformance.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def node(number: int) -> subprocess.Popen:
        where = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", "1"]
        command = [*torchrun, "-m", "gaugeblock.conformance.cli", *check, "--report", str(tmp_path / "nodes")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    nodes = [node(0), node(1)]
    printed = [each.communicate(timeout=150)[0] for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], printed
    subprocess.run([*gaugeblock, *check, "--report", str(tmp_path / "one")], env=environment, check=True, timeout=150)
    nodes_verdicts, one_verdicts = (
        json.loads((tmp_path / name / "gaugeblock.json").read_text())["verdicts"] for name in ("nodes", "one")
    )
    assert [each["status"] for each in nodes_verdicts] == [each["status"] for each in one_verdicts] == ["pass", "pass"]
    assert nodes_verdicts[0]["fingerprints"] == one_verdicts[0]["fingerprints"]
