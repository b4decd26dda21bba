"""How fast SDAR decodes: its prompt stored, one pass over a block, and blocks from masks to the cache; and in how many passes.

Every competitor of `sdar.sdar_cached` decodes after the same prompt by the loop of its framework's reference; tokens are the most
probable ones, without draws.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from tabulate import tabulate

from gaugeblock.conformance.bench.competitors import Competitor
from gaugeblock.conformance.bench.problem import FULL, TIES, Problem, Unavailable, fits, make_problem
from gaugeblock.conformance.bench.roofline import Machine
from gaugeblock.conformance.bench.rows import Effort, Status, require_worth_while, why_not
from gaugeblock.conformance.bench.timing import measure
from gaugeblock.conformance.engine.calls import nest
from gaugeblock.conformance.engine.contract import Contract, Workload
from gaugeblock.reference.configs import PlaceStrategy, SDARDecodingConfig

STRATEGIES: tuple[PlaceStrategy, ...] = ("static", "dynamic", "entropy_bounded")
BLOCKS = 4  # after the prompt
SHARPNESS = 32.0  # of the head: a model of random weights is then sure of some tokens, as a trained one is, and not of others
HEADERS = ("implementation", "strategy", "prefill ms", "pass ms", "block ms", "tokens a pass", "passes a block", "")
COLUMNS = ("left", "left", *["right"] * 5, "left")

Calls = dict[tuple[str, str], Callable[[], object]]


@dataclass(frozen=True)
class DecodingRow:
    """One competitor with one strategy; times in seconds, None where it did not take part."""

    workload: str
    implementation: str
    strategy: str
    prefill: float | None = None
    """The prompt's keys and values."""
    denoising_pass: float | None = None
    """The logits of one block after the prompt."""
    block: float | None = None
    """From masks to the cache: all passes, the choice of tokens and the pass that stores; a mean over the blocks."""
    tokens_per_pass: float | None = None
    passes_per_block: float | None = None
    """Without the one that stores."""
    status: Status = "measured"
    reason: str = ""


Rows = dict[tuple[str, str], DecodingRow]  # by competitor and strategy


@dataclass(frozen=True)
class Decoder:
    """A competitor, ready to decode."""

    loops: Any
    """The framework's `reference.*.decoding`."""
    model: Any
    """Its `CachedModel`."""
    prompt_ids: Any
    example_ids: Any
    wait: Callable[[Any], Any]
    """Returns an array when it is computed, or has queued its work on a GPU."""

    def prefill(self) -> Any:
        """The cache of the prompt."""
        return self.wait(self.model.prefill(self.prompt_ids))

    def generate(self, config: SDARDecodingConfig, cache: Any, denoise: Callable[..., Any]) -> Any:
        """The prompt and new tokens, from the prompt's cache on."""
        model = replace(self.model, prefill=lambda ids: cache, denoise=denoise)
        return self.wait(self.loops.sdar_generate(model, self.prompt_ids, self.example_ids, config=config, seed=0))


def decode(
    contract: Contract, workload: Workload, competing: Sequence[Competitor], machine: Machine, effort: Effort
) -> list[DecodingRow]:
    """Lets all competitors decode after a prompt of `num_past_tokens`, and times in turn those that are right.

    Returns:
        A row for each competitor and strategy.
    """
    rows: Rows = {(each.name, name): DecodingRow(workload.name, each.name, name) for each in competing for name in STRATEGIES}
    if machine.device == "cpu" and not fits(contract, workload, FULL, machine.dtype):
        absent = Unavailable("a problem on a CPU is smaller")
        return [replace(row, **why_not(absent)) for row in rows.values()]
    with torch.no_grad():
        problem = sharpened(make_problem(contract, workload.parameters, "forward", machine))
        expected = {strategy: of_reference(problem, strategy) for strategy in STRATEGIES}
        calls: Calls = {}
        for each in competing:
            try:
                require_worth_while(each, machine, effort)
                calls |= prepared(each, problem, expected, rows)
            except Exception as error:
                rows |= {(each.name, name): replace(rows[each.name, name], **why_not(error)) for name in STRATEGIES}
        times = measure(
            {"/".join(key): call for key, call in calls.items()}, machine.device, effort.seconds / len(STRATEGIES), effort.until
        )
    return [timed(row, {key: timing.median for key, timing in times.items()}) for row in rows.values()]


def sharpened(problem: Problem) -> Problem:
    """The same with a head that is sure of some tokens."""
    inputs = {key: SHARPNESS * each if key.endswith("lm_head.weight") else each for key, each in problem.call.inputs.items()}
    return replace(problem, call=replace(problem.call, inputs=inputs))


def decoding_config(problem: Problem, strategy: PlaceStrategy) -> SDARDecodingConfig:
    """So many blocks, greedily."""
    config = problem.call.options["config"]
    return SDARDecodingConfig(
        mask_id=config.mask_token_id,
        new_tokens=BLOCKS * config.block_length,
        block_length=config.block_length,
        steps=config.block_length,
        temperature=0.0,
        strategy=strategy,
    )


def decoder(function: Callable[..., Any], framework: str, problem: Problem) -> Decoder:
    """A function with the signature of `sdar_cached`, ready to decode."""
    loops = import_module(f"gaugeblock.reference.{framework}.decoding")
    config, given = problem.call.options["config"], nest(problem.call.inputs)
    shape = problem.parameters["batch_size"], problem.parameters["num_past_tokens"]
    # any tokens below the mask
    prompt_ids = (torch.arange(shape[0] * shape[1], device=problem.machine.device) * 7 % config.mask_token_id).reshape(shape)
    arrays: dict[str, Any] = {**given["state"], "prompt_ids": prompt_ids, "example_ids": torch.arange(shape[0]).to(prompt_ids)}
    wait: Callable[[Any], Any] = lambda results: results  # noqa: E731
    if framework == "jax":
        import jax

        from gaugeblock.conformance.bench.competitors import to_jax

        arrays, wait = {name: to_jax(each) for name, each in arrays.items()}, jax.block_until_ready
    ids = {name: arrays.pop(name) for name in ("prompt_ids", "example_ids")}
    return Decoder(loops, loops.with_cache(function, arrays, config=config), **ids, wait=wait)


def of_reference(problem: Problem, strategy: PlaceStrategy) -> torch.Tensor:
    """What the reference decodes."""
    reference = decoder(problem.contract.reference, "torch", problem)
    config = decoding_config(problem, strategy)
    return reference.generate(config, reference.prefill(), reference.model.denoise)


def prepared(
    competitor: Competitor,
    problem: Problem,
    expected: Mapping[PlaceStrategy, torch.Tensor],
    rows: Rows,
) -> Calls:
    """Counts a competitor's passes in its rows, and returns its calls that are to be timed.

    Raises:
        Unavailable: If it cannot take part.
    """
    if competitor.function is None:
        raise Unavailable("is not called as the contract says")
    function, framework = competitor.function(problem)
    own, name, config = decoder(function, framework, problem), competitor.name, problem.call.options["config"]
    cache = own.prefill()
    masks = own.prompt_ids[:, : config.block_length] * 0 + config.mask_token_id
    calls: Calls = {(name, "prefill"): own.prefill, (name, "pass"): lambda: own.wait(own.model.denoise(cache, masks))}
    for strategy in STRATEGIES:
        how, passes = decoding_config(problem, strategy), Counter[str]()

        def counted(*arguments: Any, passes: Counter[str] = passes) -> Any:
            passes["denoise"] += 1
            return own.model.denoise(*arguments)

        made = torch.tensor(own.generate(how, cache, counted).tolist())
        differs = (made != expected[strategy].cpu())[:, -how.new_tokens :].float().mean().item()
        total = passes["denoise"]
        row = replace(rows[name, strategy], tokens_per_pass=how.new_tokens / total, passes_per_block=total / BLOCKS)
        if differs > TIES:
            rows[name, strategy] = replace(row, status="wrong", reason=f"WRONG: {differs:.0%} of its tokens are others")
        else:
            rows[name, strategy] = row
            calls[name, strategy] = partial(own.generate, how, cache, own.model.denoise)
    return calls


def timed(row: DecodingRow, seconds: Mapping[str, float]) -> DecodingRow:
    """A row with its times, by competitor and what was timed."""
    prefill, one_pass, blocks = (seconds.get(f"{row.implementation}/{what}") for what in ("prefill", "pass", row.strategy))
    return replace(row, prefill=prefill, denoising_pass=one_pass, block=None if blocks is None else blocks / BLOCKS)


def render(rows: Iterable[DecodingRow]) -> str:
    """The table as text, the fastest first."""
    fastest_first = sorted(rows, key=lambda row: (STRATEGIES.index(row.strategy), row.block or math.inf))
    table = [
        [
            row.implementation,
            row.strategy,
            *(_number(each, 1e3, ".3g") for each in (row.prefill, row.denoising_pass, row.block)),
            *(_number(each, 1, ".2f") for each in (row.tokens_per_pass, row.passes_per_block)),
            row.reason,
        ]
        for row in fastest_first
    ]
    return tabulate(table, headers=HEADERS, disable_numparse=True, colalign=COLUMNS)


def _number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value * unit, form)
