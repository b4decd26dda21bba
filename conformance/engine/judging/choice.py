"""Is this choice right? It is if the scores, known but for their error, allow it; all else is judged at it.

The rule, must ⊆ ids ⊆ may, is told in conformance/JUDGING.md section 10.
"""

import math
from dataclasses import replace

import torch

from gaugeblock.conformance.engine.budget.error_budget import KAPPA, Budget
from gaugeblock.conformance.engine.budget.oracle import selection_scores
from gaugeblock.conformance.engine.contract import Contract, Derived, Selection, size_of
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.judging.diagnosis import diagnose
from gaugeblock.conformance.engine.judging.violation import Violation
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors


def check_choice(contract: Contract, case: Case, dtype: str, results: Tensors) -> torch.Tensor | None:
    """What the candidate chose, ids as int64 or a mask, if the scores and their error allow it.

    Ids must be distinct and in range. What is chosen must hold all that is among the best whatever the rounding (`must`) and
    only what can be among the best (`may`), ids in their order.

    Raises:
        Violation: Otherwise.
    """
    selection = contract.selection
    if selection is None:
        return None
    returned = results[selection.output]
    chosen = returned if returned.dtype == torch.bool else returned.to(torch.int64)
    scores, groups = (_rows(each) for each in selection_scores(contract, case, dtype))
    assert scores is not None
    if not scores.value.numel():
        return chosen
    ids = None
    if chosen.dtype == torch.bool:
        mask = chosen.reshape(scores.value.shape)
    else:
        ids = chosen.reshape(-1, chosen.shape[-1]) if selection.one_by_one else chosen.reshape(len(scores.value), -1)
        _check_ids(selection, ids, scores.value.shape[1])
        if selection.one_by_one:
            scores, ids = _left_over(scores, ids), ids.reshape(-1, 1)
        mask = _mask_of(ids, scores.value.shape[1], selection.none)
    due = 1 if selection.one_by_one else selection.count
    count, group_count = (_number(each, case.parameters) for each in (due, selection.group_count))
    must, may = must_and_may(scores, count, groups, group_count, selection.above)
    rows = chosen.reshape(len(mask), -1)
    _reject(~may & mask, selection, rows, scores, "chosen, though it cannot be among the best")
    _reject(must & ~mask, selection, rows, scores, "not chosen, though it is among the best whatever the rounding")
    _check_count(selection, mask, rows, scores, count)
    if groups is not None:
        _check_groups(selection, mask, rows, scores, groups, group_count)
    if ids is not None:
        _check_order(selection, ids, scores)
    return chosen


def must_and_may(
    scores: Budget,
    count: int | None,
    groups: Budget | None = None,
    group_count: int | None = None,
    above: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row, which candidates are among the best `count` whatever the rounding, and which can be.

    Args:
        scores: `[R, C]`.
        count: None for all of them.
        groups: Scores of the groups, `[R, G]`, of which `group_count` are chosen from.
        above: What does not score above it is never chosen.
    """
    low, high = _bounds(scores)
    count = scores.value.shape[1] if count is None else count
    if groups is None:
        must, may = _must_and_may(low, high, count)
    else:
        assert group_count is not None
        must_group, may_group = _must_and_may(*_bounds(groups), group_count)
        group = _group_of_each(scores, groups)
        kept, possible = must_group[:, group], may_group[:, group]
        must, _ = _must_and_may(low.masked_fill(~kept, -math.inf), high.masked_fill(~possible, -math.inf), count)
        together = kept.unsqueeze(1) | (group.unsqueeze(1) == group)  # [R, i, j]: wherever i can be chosen, so can j
        betters = ((low.unsqueeze(1) > high.unsqueeze(2)) & together).sum(2)
        may = possible & (betters < count)
    return (must, may) if above is None else (must & (low > above), may & (high > above))


def _rows(scores: Budget | None) -> Budget | None:
    """Scores of any number of dimensions as `[R, C]`."""
    if scores is None:
        return None
    *rows, candidates = scores.value.shape
    value, variance = (each.reshape(math.prod(rows), candidates) for each in (scores.value, scores.variance))
    return Budget(value, variance, scores.squares_variance, scores.signed_variance)


def _number(named: int | str | Derived | None, parameters: Parameters) -> int | None:
    return None if named is None else size_of(named, parameters)


def _left_over(scores: Budget, ids: torch.Tensor) -> Budget:
    """Scores of each place, `[R * K, C]`, in which what earlier places of the row have taken, ids `[R, K]`, scores below all."""
    rows, count = ids.shape
    taken = torch.zeros(rows, count, scores.value.shape[1], dtype=torch.bool)
    for place in range(1, count):
        taken[:, place] = taken[:, place - 1].scatter(1, ids[:, place - 1 : place], True)
    taken = taken.flatten(0, 1)
    return replace(scores, value=scores.value.masked_fill(taken, -math.inf), variance=scores.variance.masked_fill(taken, 0.0))


def _mask_of(ids: torch.Tensor, candidates: int, none: int | None) -> torch.Tensor:
    """Which candidates are chosen, `[R, C]`, by ids `[R, K]`."""
    real = ids != none if none is not None else torch.ones_like(ids, dtype=torch.bool)
    counts = torch.zeros(len(ids), candidates, dtype=torch.int64)
    return counts.scatter_add(1, ids.where(real, 0), real.to(torch.int64)) > 0


def _group_of_each(scores: Budget, groups: Budget) -> torch.Tensor:
    """The group of each candidate, `[C]`."""
    return torch.arange(groups.value.shape[1]).repeat_interleave(scores.value.shape[1] // groups.value.shape[1])


def _bounds(scores: Budget) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest that an honest score can be; a NaN row can be anything."""
    error = _score_error(scores)
    unknown = scores.value.isnan().any(1, keepdim=True)
    low = (scores.value - error).nan_to_num(-math.inf, math.inf, -math.inf)
    high = (scores.value + error).nan_to_num(math.inf, math.inf, -math.inf)
    return low.masked_fill(unknown, -math.inf), high.masked_fill(unknown, math.inf)


def _score_error(scores: Budget) -> torch.Tensor:
    """Propagated error, an ulp, and on machines that flush subnormal numbers to zero the smallest normal one."""
    float32 = torch.finfo(torch.float32)
    error = KAPPA * scores.variance.sqrt() + float32.eps * scores.value.abs() + float32.smallest_normal
    return error.where(scores.value.isfinite(), 0.0)


def _must_and_may(low: torch.Tensor, high: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    candidates = low.shape[1]
    highs, lows = (each.sort(1).values for each in (high, low))
    rivals = candidates - torch.searchsorted(highs, low.contiguous()) - 1  # all that can reach it, itself not counted
    betters = candidates - torch.searchsorted(lows, high.contiguous(), right=True)  # all that beat it for certain
    return rivals < count, betters < count


def _check_ids(selection: Selection, ids: torch.Tensor, bound: int) -> None:
    """In range and distinct; where nothing is chosen, nothing is chosen after it."""
    name, none = selection.output, selection.none
    nothing = ids == none if none is not None else torch.zeros_like(ids, dtype=torch.bool)
    _reject_rows(~nothing & ((ids < 0) | (ids >= bound)), f"{name} is out of range 0..{bound - 1}", name, ids)
    _reject_rows(nothing[:, :-1] & ~nothing[:, 1:], f"{name} holds an id after {none}, which stands for none", name, ids)
    distinct = torch.where(nothing, -1 - torch.arange(ids.shape[1]), ids)
    repeated = (distinct.sort(1).values.diff(dim=1) == 0).any(1, keepdim=True)
    _reject_rows(repeated, f"{name} holds an id twice in one row", name, ids)


def _check_count(selection: Selection, mask: torch.Tensor, rows: torch.Tensor, scores: Budget, count: int | None) -> None:
    """Where candidates tie, `may` holds all of them, but no row holds more or fewer than are due."""
    low, high = _bounds(scores)
    above = -math.inf if selection.above is None else selection.above
    most = scores.value.shape[1] if count is None else count
    certain = (low > above).sum(1).clamp(max=most) if selection.above is not None else torch.full((len(mask),), most)
    possible = (high > above).sum(1).clamp(max=most) if selection.above is not None else certain
    chosen = mask.sum(1)
    wrong = ((chosen < certain) | (chosen > possible)) & ~scores.value.isnan().any(1)
    _reject_rows(wrong.unsqueeze(1), f"{selection.output} chooses too many or too few in a row", selection.output, rows)


def _check_groups(
    selection: Selection, mask: torch.Tensor, rows: torch.Tensor, scores: Budget, groups: Budget, group_count: int | None
) -> None:
    """Where groups tie, `may` holds the ids of all of them, but no row those of more than `group_count`."""
    assert group_count is not None
    used = mask.unflatten(1, (groups.value.shape[1], -1)).any(2).sum(1)
    too_many = (used > group_count) & ~scores.value.isnan().any(1)
    if too_many.any():
        most = int(used[too_many][0])
        what = f"{selection.output} holds ids of {most} groups, of which {group_count} may be kept"
        _reject_rows(too_many.unsqueeze(1), what, selection.output, rows)


def _check_order(selection: Selection, ids: torch.Tensor, scores: Budget) -> None:
    """No id comes after one that scores less for certain; or they ascend."""
    real = ids != selection.none if selection.none is not None else torch.ones_like(ids, dtype=torch.bool)
    name = selection.output
    if selection.order == "index":
        unsorted = (ids.diff(dim=1) < 0) & real[:, 1:]
        _reject_rows(unsorted, f"{name} is not sorted by ascending id", name, ids)
    elif selection.order == "score":
        error, at = _score_error(scores), ids.where(real, 0)
        highest = (scores.value + error).gather(1, at)
        lowest = (scores.value - error).gather(1, at).masked_fill(~real, -math.inf)
        unsorted = lowest[:, 1:] > highest.nan_to_num(math.inf, math.inf, -math.inf).cummin(1).values[:, :-1]
        _reject_rows(unsorted, f"{name} is not sorted by descending score", name, ids)


def _reject_rows(wrong: torch.Tensor, what: str, name: str, rows: torch.Tensor) -> None:
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0])
        raise Violation(what, diagnose(wrong, None), (f"{name}[{row}] = {rows[row].tolist()}",))


def _reject(wrong: torch.Tensor, selection: Selection, rows: torch.Tensor, scores: Budget, what: str) -> None:
    if wrong.any():
        row, candidate = wrong.nonzero()[0].tolist()
        name, score = selection.output, scores.value[row, candidate].item()
        raise Violation(
            f"{name}: id {candidate} is {what}",
            diagnose(wrong.any(1, keepdim=True), None),
            (f"{name}[{row}] = {rows[row].tolist()}; score of {candidate}: {score:.9g}",),
        )
