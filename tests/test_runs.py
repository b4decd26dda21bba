"""Several runs at once give what the same runs give one by one."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gaugeblock.conformance.engine.budget.decisions import replay_of
from gaugeblock.conformance.engine.budget.dispatch import Watching
from gaugeblock.conformance.engine.budget.error_budget import NOISE_RUNS
from gaugeblock.conformance.engine.budget.oracle import exact_inputs, noisy_runs, reference_run, rounded_cotangents
from gaugeblock.conformance.engine.budget.rounding_noise import RoundingNoise
from gaugeblock.conformance.engine.budget.runs import Each, Runs, RunsDiffer, of_run, perform, values_of
from gaugeblock.conformance.engine.inputs.cases import options
from gaugeblock.conformance.engine.inputs.coverage import array
from gaugeblock.conformance.engine.registry import contracts

RUNS = 5
FEW = 4  # cases


class Performing(Watching):
    """Has operations on `Runs` done."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return perform(func, args, kwargs or {}, RUNS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def several(*shape: int, seed: int = 0) -> Runs:
    return Runs(draw(RUNS, *shape, seed=seed))


def same(at_once: Any, one_by_one: list[Any]) -> bool:
    """Whether the results of all runs are those of each, but for float64's rounding of sums in another order."""
    columns = zip(*map(tree_leaves, one_by_one), strict=True)
    return all(
        torch.allclose(values_of(each, RUNS), torch.stack(column), rtol=1e-14, atol=1e-14)
        for each, column in zip(tree_leaves(at_once), columns, strict=True)
    )


A, B, PLAIN, ROW = several(4, 6), several(4, 6, seed=1), draw(4, 6, seed=2), several(6, seed=3)
CUBE, IDS = several(2, 4, 6, seed=4), torch.tensor([[3, 0], [1, 1], [2, 5], [0, 4]])
KERNELS = draw(3, 2, 3, 3, seed=5)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, plain, row, cube: a + b,
    "add a row": lambda a, b, plain, row, cube: cube * row + plain,
    "a plain minus": lambda a, b, plain, row, cube: 1.5 - plain / a,
    "where": lambda a, b, plain, row, cube: torch.where(a > 0, plain, b),
    "mm": lambda a, b, plain, row, cube: a @ b.T,
    "mm with a plain one": lambda a, b, plain, row, cube: (plain @ a.T, a @ plain.T),
    "mv": lambda a, b, plain, row, cube: a.mv(row),
    "addmm": lambda a, b, plain, row, cube: torch.addmm(a @ b.T, plain, b.T),
    "batched": lambda a, b, plain, row, cube: cube @ cube.mT,
    "linear": lambda a, b, plain, row, cube: torch.nn.functional.linear(cube, a, row[:4]),
    "sums": lambda a, b, plain, row, cube: (cube.sum(), cube.sum(0), cube.sum((0, -1)), cube.mean(1, keepdim=True), cube.mean()),
    "extremes": lambda a, b, plain, row, cube: (cube.amax(1), cube.amin(), a.max(), a.max(0), a.argmax(), a.argmax(1)),
    "truths": lambda a, b, plain, row, cube: ((a > 0).any(), (a > 0).all(1), (a > -9).all()),
    "cumsum": lambda a, b, plain, row, cube: cube.cumsum(1),
    "softmax": lambda a, b, plain, row, cube: (cube.softmax(0), cube.softmax(-1), cube.log_softmax(1), cube.logsumexp(2)),
    "choices": lambda a, b, plain, row, cube: (a.topk(2), a.topk(2, 0), a.sort(0), a.sort(descending=True), a.argsort(0)),
    "gather": lambda a, b, plain, row, cube: (a.gather(1, IDS), plain.gather(1, a.argsort(1)), a.take_along_dim(IDS, 1)),
    "scatter": lambda a, b, plain, row, cube: (a.scatter(1, IDS, 7.0), a.scatter_add(1, IDS, b), plain.scatter(0, IDS % 4, a)),
    "select": lambda a, b, plain, row, cube: (cube[1], cube[:, 2], cube[..., -1], cube[:, 1:3], cube[::1, :, ::2], cube[None]),
    "index": lambda a, b, plain, row, cube: (a[IDS[:, 0]], a[:, IDS], a[IDS[:, 0] - 1, IDS[:, 1]], plain[a.argmax(0)]),
    "index apart": lambda a, b, plain, row, cube: cube[torch.tensor([0, 1]), :, torch.tensor([5, 2])],
    "index by truths": lambda a, b, plain, row, cube: a[torch.tensor([True, False, True, True])],
    "index_put": lambda a, b, plain, row, cube: (
        a.index_put((IDS[:, 1] % 4,), row, accumulate=True), cube.index_put((IDS[:2, 0] % 2, IDS[:2, 1] % 4), b[:2]),
    ),
    "index_add": lambda a, b, plain, row, cube: a.index_add(0, IDS[:, 1] % 4, b),
    "index_select": lambda a, b, plain, row, cube: (a.index_select(1, IDS[0]), torch.nn.functional.embedding(IDS % 4, cube[0])),
    "shapes": lambda a, b, plain, row, cube: (
        cube.view(8, 6), cube.reshape(-1), a.T.reshape(3, 8), row.expand(4, 6), row.repeat(2, 3), a.unsqueeze(1), a.unsqueeze(-1),
        a.unsqueeze(1).squeeze(1), cube.permute(2, 0, 1), cube.transpose(0, 2), a.t(), cube.flip(0), cube.flatten(1),
        cube[:, None].expand(-1, 3, -1, -1),
    ),
    "parts": lambda a, b, plain, row, cube: (cube.unbind(), cube.split(1, 1), a.split([1, 3]), a.chunk(2, -1)),
    "joined": lambda a, b, plain, row, cube: (
        torch.cat([a, plain, b]), torch.cat([a, b], 1), torch.stack([a, plain]), torch.stack([a, b], -1),
    ),
    "masked": lambda a, b, plain, row, cube: (a.masked_fill(plain > 0, 2.0), cube.tril(), a.clamp(-0.5, 0.5)),
    "created": lambda a, b, plain, row, cube: (torch.zeros_like(a), torch.ones_like(a[0]), a.new_zeros(2, 3)),
    "other dtype": lambda a, b, plain, row, cube: (a.to(torch.float32), (a > 0).to(torch.float64), a.clone(), a.detach()),
    "in place": lambda a, b, plain, row, cube: a.clone().mul_(2).add_(row).copy_(row).index_add_(0, IDS[:, 1] % 4, plain),
    "in place, a part": lambda a, b, plain, row, cube: _with_a_part_doubled(a),
    "in place, masked": lambda a, b, plain, row, cube: a.clone().masked_fill_(plain > 0, 0.0).zero_(),
    "roll": lambda a, b, plain, row, cube: (a.roll(1, 0), a.roll(2)),
    "convolution": lambda a, b, plain, row, cube: (
        torch.nn.functional.conv2d(cube[None], KERNELS, row[:3], padding=1),
        torch.nn.functional.conv2d(cube[None], KERNELS, plain[0, :3], stride=2),
        torch.nn.functional.conv2d(cube[None], a.view(4, 2, 3, 1)),
    ),
    "gradients of a convolution": lambda a, b, plain, row, cube: torch.ops.aten.convolution_backward(
        cube[None, :, :, 1:], cube[None], KERNELS[:2, :, :1, :2], [2], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3
    ),
    "einsum": lambda a, b, plain, row, cube: torch.einsum("bij,kj->bki", cube, plain),
}  # fmt: skip


def _with_a_part_doubled(a: torch.Tensor) -> torch.Tensor:
    copied = a.clone()
    copied[1:3].mul_(2)
    copied[:, 0] = 1.0
    return copied


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name: str) -> None:
    arguments = A, B, PLAIN, ROW, CUBE
    with Performing():
        at_once = OPERATIONS[name](*arguments)
    assert same(at_once, [OPERATIONS[name](*of_run(run, arguments)) for run in range(RUNS)])


def test_gradients() -> None:
    def gradients(a: torch.Tensor, row: torch.Tensor, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [each.detach().requires_grad_() for each in (a, row, plain)]
        hidden = torch.nn.functional.silu(leaves[0] @ leaves[2].T) * leaves[1][:4]
        loss = (hidden.softmax(-1)[IDS[:, 0] % 4].pow(2).sum() + leaves[0].topk(2).values.mean()) * 3
        return torch.autograd.grad(loss, leaves)

    with Performing():
        at_once = gradients(A, ROW, PLAIN)
    assert same(at_once, [gradients(*of_run(run, (A, ROW, PLAIN))) for run in range(RUNS)])


def test_a_number_for_each_run() -> None:
    numbers = [0.1 * (run + 1) for run in range(RUNS)]
    scaled = perform(torch.ops.aten.mul.Scalar, (PLAIN, Each(numbers)), {}, RUNS)
    assert same(scaled, [PLAIN * number for number in numbers])


def test_ids_that_all_runs_agree_on_are_one_tensor() -> None:
    alike = Runs(PLAIN.expand(RUNS, 4, 6) + 1e-9 * draw(RUNS, 4, 6, seed=9))
    with Performing():
        assert not isinstance(alike.argmax(1), Runs)
        assert isinstance(A.argmax(1), Runs)


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("a truth", lambda: bool(A.sum() > 0)),
        ("a number", lambda: A[0, 0].item()),
        ("how many there are", lambda: (A > 0).nonzero()),
        ("what all share", lambda: PLAIN.clone().add_(A)),
    ],
)
def test_runs_that_cannot_be_done_at_once_say_so(what: str, function: Callable[[], Any]) -> None:
    with Performing(), pytest.raises(RunsDiffer):
        function()
    with pytest.raises(RunsDiffer):  # and nobody takes them for ordinary tensors
        A + 1


def with_rounding() -> list[tuple[str, str]]:
    """Each contract with both roundings; models and steps, which cost most and are made of the others, with one, in turns."""
    both = ("strict", "eager")
    return [
        (name, rounding)
        for place, (name, contract) in enumerate(contracts().items())
        for rounding in (both[place % 2 :][:1] if contract.rigid else both)
    ]


@pytest.mark.parametrize(("name", "rounding"), with_rounding())
def test_budgets_at_once_and_one_by_one(name: str, rounding: str) -> None:
    """Every shipped reference can be done at once, and its errors are as large: in the mean over its elements and cases."""
    contract, dtype = contracts()[name], contracts()[name].dtypes[-1]
    logarithms: dict[str, list[float]] = {}
    means: list[float] = []  # over what a case gives, which err together: numbers of an example, or gates, steer all of it
    count = FEW if contract.cases >= 0.5 else 2  # a model, or a step of one, has hundreds of gradients in each
    for case in array(contract, 1)[:count]:
        run = partial(
            reference_run,
            contract,
            exact_inputs(contract, case, dtype),
            options(contract, case),
            {key: each.to(torch.float64) for key, each in rounded_cotangents(contract, case, dtype).items()},
        )
        exact, choice = run(), contract.selection
        replayed = replay_of(run, choice.output, exact[choice.output], choice.none) if choice else run
        noisy = [noisy_runs(replayed, dtype, rounding, at_once=at_once) for at_once in (True, False)]
        found: dict[str, float] = {}
        for key in (name for name, value in exact.items() if value.is_floating_point()):
            errors = [(each[key] - exact[key])[..., None].flatten(1) for each in noisy]
            deviation, other = (float(each.square().mean().sqrt()) for each in errors)
            if min(deviation, other) == 0:  # 12 runs do not show by chance what a run shows half of the time
                assert max(int(each.any(1).sum()) for each in errors) <= NOISE_RUNS / 2, (key, case)
            elif other > 0 and exact[key].numel() > 1:
                found[key] = math.log(deviation / other)
                logarithms.setdefault(key, []).append(found[key])
        if found:
            means.append(statistics.mean(found.values()))
    for key, each in logarithms.items():
        # of a single number the logarithm of two deviations of 12 runs each spreads by 0.3
        assert abs(sum(each) / len(each)) < 0.1 + 4 * 0.3 / len(each) ** 0.5, key
    # measured with sixteen seeds of the noise: the mean of a case spreads by 0.09 to 0.13 around 0
    assert not means or abs(statistics.mean(means)) <= 0.05 + 3 * 0.13 / len(means) ** 0.5


def test_noise_differs_from_run_to_run() -> None:
    """Also of what no run made before: constants, and tensors that are made inside."""

    def function() -> torch.Tensor:
        return torch.arange(1.0, 9.0, dtype=torch.float64) * 0.1 + torch.exp(torch.linspace(0.1, 1, 8, dtype=torch.float64))

    with RoundingNoise("float32", "strict", 0, runs=NOISE_RUNS):
        noisy = function()
    assert isinstance(noisy, Runs) and noisy.all_runs.shape == (NOISE_RUNS, 8)
    assert len(torch.unique(noisy.all_runs, dim=0)) == NOISE_RUNS


def test_what_all_runs_share_may_be_counted_up():
    with RoundingNoise("float32", "strict", 0, runs=3):
        counter = torch.tensor([1.0, 2.5], dtype=torch.float64)
        assert counter.add_(1) is counter
        with pytest.raises(RunsDiffer):
            counter.add_(0.1)
        with pytest.raises(RunsDiffer):
            counter.mul_(torch.ones(2, dtype=torch.float64) / 3)
        with pytest.raises(RunsDiffer):
            counter.index_add_(0, torch.tensor([0]), torch.ones(1, dtype=torch.float64))
        with pytest.raises(RunsDiffer):
            counter.lerp_(torch.ones(2, dtype=torch.float64), 0.5)
        counter.clamp_(max=3)
    assert counter.tolist() == [2.0, 3.0]
