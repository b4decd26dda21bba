"""Candidates' processes: what passes to and from them, what becomes of a lost one, and what a call costs."""

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time

import pytest
import torch

from gaugeblock.conformance.engine.frameworks import BadResult, Call, Raised
from gaugeblock.conformance.engine.implementation import Candidate, Implementation
from gaugeblock.conformance.engine.processes import door, handle, keeper, seats, wire
from gaugeblock.conformance.engine.processes.handle import EngineError, Lost, Process
from gaugeblock.conformance.engine.processes.loading import describe_candidates
from gaugeblock.conformance.engine.processes.output import KEPT_OUTPUT, Output
from gaugeblock.conformance.engine.processes.perform import USUAL
from gaugeblock.conformance.engine.processes.wire import ANYONE, HEADER, Arena, BadMessage, Closed, Dtypes, Impostor, Late, Link
from gaugeblock.conformance.engine.registry import RegistrationError
from gaugeblock.conformance.engine.trial import Subject

ROUTER = "routers.softmax_topk"
CANDIDATES = """\
import os, sys, time
import torch
from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

@implements("routers.softmax_topk", name="right")
def right(router_logits, *, top_k, renormalize):
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)

@implements("routers.softmax_topk", name="told", differentiable=False)
def told(router_logits, *, top_k, renormalize):
    "Does what its first logit says."
    code = int(router_logits[0, 0])
    if code == 1: os._exit(5)
    if code == 2: time.sleep(600)
    if code == 3: raise ValueError("router_logits")
    if code == 4: return 7
    if code == 5: router_logits.view(-1)[1:3] = 42
    if code == 6: print("x" * 200_000)
    if code == 7: return torch.tensor([float(router_logits.data_ptr() % 2**22)]), torch.zeros(1)
    if code == 8: return torch.zeros(2**26), torch.zeros(1)
    return torch.ones(1), torch.zeros(1)
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    file = tmp_path_factory.mktemp("candidates") / "mine.py"
    file.write_text(CANDIDATES)
    return {name: Implementation(ROUTER, name, Candidate(str(file))) for name in ("right", "told")}


@pytest.fixture(scope="module")
def running(candidates):
    """A function that hands out a process that runs: the same one as long as it is well."""
    held: list[Process] = []

    def process() -> Process:
        if not held or not held[-1].alive:
            held.append(Process("cpu", 8 << 30))
        held[-1].await_ready()
        return held[-1]

    yield process
    for each in held:
        each.stop()


def call(process, implementation, logits, **how):
    return process.call(implementation, Call({"router_logits": logits}, {"top_k": 1, "renormalize": True}), USUAL, MIB, **how)


def tell(process, candidates, code, **how):
    return call(process, candidates["told"], torch.tensor([[float(code), 1.0, 2.0, 3.0]]), **how)


# --------------------------------------------------------------------------------------------------------------- arenas


def passed_on(tensors):
    """The tensors as another process would see them."""
    ours = Arena()
    placed, _ = ours.place(tensors, 0)
    return Arena(os.dup(ours.file)).tensors(placed)


@pytest.mark.parametrize("name", Dtypes)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_every_dtype_arrive_bit_for_bit(name):
    made = torch.arange(96, dtype=torch.uint8).view(torch.int64 if name != "bool" else torch.uint8)
    tensor = (made % 2 == 0) if name == "bool" else made.view(Dtypes[name])
    (arrived,) = passed_on({"x": tensor}).values()
    assert arrived.dtype == tensor.dtype and arrived.shape == tensor.shape
    assert arrived.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(4, 6).t(),
        torch.arange(24.0).view(4, 6)[1:3, ::2],
        torch.arange(3.0).expand(5, 3),
        torch.tensor(7.0),
        torch.empty(0, 4),
        torch.empty(3, 0)[:, :0],
    ],
    ids=["transposed", "strided", "broadcast", "scalar", "empty", "empty slice"],
)
def test_strides_and_offsets_arrive_with_what_lies_between(tensor):
    (arrived,) = passed_on({"x": tensor}).values()
    assert (arrived.shape, arrived.stride(), arrived.storage_offset()) == (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
    )
    assert torch.equal(arrived, tensor) and arrived.untyped_storage().nbytes() >= tensor.untyped_storage().nbytes()


def test_tensors_that_share_memory_share_it_again_and_others_do_not():
    whole = torch.arange(8.0)
    arrived = passed_on({"whole": whole, "part": whole[2:4], "other": whole.clone()})
    arrived["part"].fill_(-1)
    assert arrived["whole"][2:4].tolist() == [-1, -1] and arrived["other"].tolist() == whole.tolist()


def test_only_what_has_changed_is_written_back():
    arena, whole = Arena(), torch.arange(8.0)
    placed, end = arena.place({"a": whole[:4], "b": whole[4:]}, 64)
    before = bytes(arena.memory[64:end])
    arena.tensors(placed)["b"][0] = 99
    arena.write_back({"a": whole[:4], "b": whole[4:]}, placed, before)
    assert whole.tolist() == [0, 1, 2, 3, 99, 5, 6, 7]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="more than 4 GiB"):
        Arena().place({"x": torch.empty(1)}, wire.ARENA_BYTES)


# ---------------------------------------------------------------------------------------------------------------- links


@pytest.fixture
def link():
    ours, theirs = socket.socketpair()
    yield Link(ours, Arena(shared=False), Arena(shared=False)), theirs
    ours.close()
    theirs.close()


def soon():
    return time.monotonic() + 0.2


@pytest.mark.parametrize(
    "message",
    [b"\x80\x04N.", b"nothing", b"[" * 100_000, b"\xff\xfe", b"1" * 5000],
    ids=["pickle", "text", "deep", "no text", "number"],
)
def test_what_a_candidates_process_says_is_json_or_nothing(link, message):
    judge, other = link
    other.sendall(HEADER.pack(len(message), 0, 0) + message)
    with pytest.raises(BadMessage):
        judge.receive_json(soon())


@pytest.mark.parametrize("header", [(2**60, 0, 0), (wire.MOST_ANSWER + 1, 0, 0), (2, 2**40, 0), (2, 8, 2**40)])
def test_what_is_too_large_is_not_waited_for(link, header):
    judge, other = link
    other.sendall(HEADER.pack(*header))
    with pytest.raises(BadMessage, match="a message of"):
        judge.receive_json(soon())


def test_silence_is_late_and_the_end_is_the_end(link):
    judge, other = link
    with pytest.raises(Late):
        judge.receive_json(soon())
    other.close()
    with pytest.raises(Closed):
        judge.receive_json(soon())


def test_a_message_that_comes_slowly_arrives_whole(link):
    judge, other = link
    message = json.dumps({"text": "slow" * 100}).encode()

    def drip():
        for part in (message[:7], message[7:]):
            other.sendall(part)
            time.sleep(0.05)

    other.sendall(HEADER.pack(len(message), 0, 0))
    threading.Thread(target=drip).start()
    assert judge.receive_json(time.monotonic() + 10) == json.loads(message)


def test_only_the_process_that_spoke_first_may_speak():
    ours, theirs = socket.socketpair()
    judge = Link(ours, Arena(shared=False), Arena(shared=False), peer=ANYONE)
    theirs.sendall(HEADER.pack(2, 0, 0) + b"{}")
    assert judge.receive_json(soon()) == {} and judge.peer == os.getpid()
    code = f"import os, struct; os.write({theirs.fileno()}, struct.pack('<QQQ', 2, 0, 0) + b'{{}}')"
    subprocess.run([sys.executable, "-S", "-c", code], pass_fds=[theirs.fileno()], check=True)
    with pytest.raises(Impostor):
        judge.receive_json(soon())


def test_at_the_door_only_a_secret_name_is_let_in():
    with_name = door.Door("127.0.0.1")
    name = with_name.name_of(1, 0)
    stranger = door.knock("127.0.0.1", str(with_name.port), "let me in")
    knocking = threading.Thread(target=lambda: door.knock("127.0.0.1", str(with_name.port), name).send_json({"rank": 0}))
    knocking.start()
    assert with_name.open(name, time.monotonic() + 10).receive_json(time.monotonic() + 10) == {"rank": 0}
    knocking.join()
    with pytest.raises(Closed):
        stranger.receive_json(time.monotonic() + 10)
    with pytest.raises(Late):
        with_name.open(with_name.name_of(1, 1), soon())


# ------------------------------------------------------------------------------------------------------------ processes


def test_results_and_gradients_come_back_as_they_were_computed(running, candidates):
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    answer = call(running(), candidates["right"], logits)
    assert torch.equal(answer.results["topk_ids"].flatten(), logits.argmax(1))
    given = Call({"router_logits": logits}, {"top_k": 2, "renormalize": True}, {"topk_weights": torch.ones(5, 2)})
    assert running().call(candidates["right"], given, USUAL, MIB).results["gradient of router_logits"].shape == (5, 8)


def test_what_a_candidate_raises_or_returns_wrongly_is_told_and_its_process_lives_on(running, candidates):
    process = running()
    with pytest.raises(Raised, match="raised ValueError: router_logits") as raised:
        tell(process, candidates, 3)
    assert raised.value.place == "in told (mine.py:16)" and "Exception" in raised.value.kinds
    with pytest.raises(BadResult):
        tell(process, candidates, 4)
    with pytest.raises(BadResult, match=r"has shape \(67108864,\)"):
        tell(process, candidates, 8)
    assert tell(process, candidates, 0).results["topk_weights"].tolist() == [1] and running() is process


def test_a_process_that_dies_or_is_silent_is_lost_and_says_how(running, candidates, monkeypatch):
    process = running()
    with pytest.raises(Lost, match=r"the process died \(exit status 5\)") as lost:
        tell(process, candidates, 1)
    assert lost.value.status == "crash" and not process.alive
    process = running()
    monkeypatch.setattr(handle, "CALL_SECONDS", 4.0)
    with pytest.raises(Lost, match="no answer within 4 s") as lost:
        tell(process, candidates, 2)
    assert lost.value.status == "timeout" and lost.value.diagnosis == "stands in told (mine.py:15)"


def test_inputs_are_written_back_only_if_they_are_asked_for(running, candidates):
    logits = torch.tensor([[5.0, 1.0, 2.0, 3.0]])
    call(running(), candidates["told"], logits)
    assert logits.tolist() == [[5, 1, 2, 3]]
    call(running(), candidates["told"], logits, write_back=True)
    assert logits.tolist() == [[5, 42, 42, 3]]


def test_inputs_lie_where_they_lay_only_if_that_is_asked_for(running, candidates):
    def place(**how):
        return tell(running(), candidates, 7, **how).results["topk_weights"].item()

    first = place()
    assert place(same_memory=True) == first and place() != first


def test_what_is_printed_is_kept_up_to_a_limit_and_handed_out_once(running, candidates):
    process = running()
    process.printed()
    tell(process, candidates, 6)
    printed = process.printed()
    assert printed.startswith("xxx") and KEPT_OUTPUT < len(printed) < KEPT_OUTPUT + 100 and "bytes more" in printed
    assert process.printed() == ""


def test_output_without_a_reader_holds_nobody_up():
    reading, writing = os.pipe()
    output = Output(reading)
    for _ in range(64):
        os.write(writing, b"y" * (1 << 16))
    os.close(writing)
    assert output.taken(ended=True).endswith(f"... and {63 << 16:,} bytes more")


def test_an_error_of_the_engine_is_none_of_the_candidates(running, candidates):
    with pytest.raises(EngineError, match="KeyError"):
        running().again(10**6, MIB)
    nowhere = Implementation("routers.nothing", "right", candidates["right"].function)
    with pytest.raises((EngineError, Raised)):
        call(running(), nowhere, torch.ones(1, 4))


def test_a_small_call_costs_little(running, candidates):
    """A millisecond where the machine is quiet; the bound is for one that is not."""
    process, logits, seconds = running(), torch.randn(8, 8), []
    for _ in range(200):
        start = time.perf_counter()
        call(process, candidates["told"], logits.fill_(0))
        seconds.append(time.perf_counter() - start)
    print(f"median {statistics.median(seconds) * 1e3:.2f} ms, least {min(seconds) * 1e3:.2f} ms")
    assert min(seconds) < 0.005


# --------------------------------------------------------------------------------------------------- keeper and loading


def kept(code, **how):
    command = [*keeper.command(os.getpid()), sys.executable, "-S", "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **how)


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 11)", -11), ("", 0)])
def test_a_keeper_ends_as_what_it_keeps(code, status):
    assert kept(code).wait(10) == status


def test_a_keeper_ends_with_all_that_its_own_has_left_behind():
    child = "print(os.getpid(), flush=True)\n  time.sleep(60)"
    process = kept(
        f"import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  {child}\n os._exit(0)\ntime.sleep(0.5)"
    )
    orphan = int(process.stdout.readline())
    assert process.wait(10) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(orphan, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all", "mine.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("(", "syntax error"),
        ("", "registers no implementation"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
    ids=["error", "syntax", "nothing", "interrupt"],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RegistrationError) as wrong:
        describe_candidates((str(tmp_path / "mine.py"),))
    assert message in str(wrong.value) and "\n" not in str(wrong.value)


def test_only_few_processes_wait_for_their_next_call(candidates, monkeypatch):
    monkeypatch.setattr(seats, "_seats", {})
    monkeypatch.setattr(seats, "MOST_SEATS", 1)
    first, second = (seats.Seat(Subject(each, "float32", "cpu"), 0)._process() for each in candidates.values())
    assert not first.alive and second.alive
    assert seats.Seat(Subject(candidates["told"], "float32", "cpu"), 0)._process() is second
    seats.stop_all()
    assert not second.alive
