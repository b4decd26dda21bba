"""Cases: points of a contract's input space, and how each becomes tensors.

Hypothesis draws the case (sizes, options, regime, layout, seed), which is cheap and shrinks well; the tensors come from a
seeded generator. A case's repr is its reproduction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, Literal, get_args

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from gaugeblock.conformance.engine.budget import shared
from gaugeblock.conformance.engine.budget.decisions import rounding_decides
from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.contract import Contract, ContractError
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.inputs.far import far_view
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors

Layout = Literal["contiguous", "transposed", "sliced", "padded rows", "storage offset", "broadcast", "far"]
LAYOUTS: tuple[Layout, ...] = tuple(each for each in get_args(Layout) if each != "far")  # which is a property of its own
CACHED = 512  # cases whose tensors are kept
REDRAWS, SEED_STRIDE = 100, 2**20  # seeds that are tried where a choice inside an operation is near a tie; all lie below 2^17
GUARD = 64  # elements on either side of a guarded tensor


@dataclass(frozen=True, init=False, repr=False)
class Case:
    """One point of a contract's input space: `Case(num_tokens=3, ..., regime="dithered", layout="contiguous", seed=0)`."""

    items: tuple[tuple[str, Any], ...]
    """Sizes and options."""
    regime: str
    layout: Layout
    """Of all inputs, or of those of the argument `laid_out` alone."""
    seed: int
    laid_out: str
    traits: tuple[str, ...]
    """What the values are like on top of the regime."""

    def __init__(
        self,
        *,
        regime: str,
        layout: Layout = "contiguous",
        seed: int = 0,
        laid_out: str = "",
        traits: Iterable[str] = (),
        **parameters: Any,
    ) -> None:
        object.__setattr__(self, "items", tuple(parameters.items()))
        object.__setattr__(self, "regime", regime)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "laid_out", laid_out)
        object.__setattr__(self, "traits", tuple(traits))

    @property
    def parameters(self) -> dict[str, Any]:
        """Sizes and options by name."""
        return dict(self.items)

    def to_json(self) -> dict[str, Any]:
        """The keyword arguments that make this case again."""
        rare: dict[str, Any] = {"laid_out": self.laid_out, "traits": self.traits}
        always = {"regime": self.regime, "layout": self.layout, "seed": self.seed}
        return self.parameters | always | {name: value for name, value in rare.items() if value}

    def layout_of(self, key: str) -> Layout:
        """How the input at a flat key lies in memory."""
        return self.layout if self.laid_out in ("", argument_of(key)) else "contiguous"

    def replace(self, **changes: Any) -> "Case":
        """This case with other parameters, regime, layout or seed."""
        return Case(**{**self.to_json(), **changes})

    def __repr__(self) -> str:
        return f"Case({', '.join(f'{name}={value!r}' for name, value in self.to_json().items())})"


@cache  # a strategy that is made anew is validated anew, which takes longer than a draw
def cases(
    contract: Contract, regime: str, sizes: Literal["free", "landmarks", "both"] = "both", landmarks: int | None = None
) -> SearchStrategy[Case]:
    """Cases of one regime, of free sizes, the first so many landmarks (default: all), or both in turn; some with a trait."""
    strategies = {"free": free_parameters(contract), "landmarks": st.sampled_from(contract.landmarks[:landmarks])}
    drawn = st.one_of(*strategies.values()) if sizes == "both" else strategies[sizes]
    names = ["", *(trait.name for trait in contract.traits)] if regime == contract.regimes[0].name else [""]

    def case(parameters: dict[str, Any], seed: int, name: str) -> Case:
        fits = name and contract.trait(name).fits(parameters)
        return Case(**parameters, regime=regime, seed=seed, traits=[name] if fits else [])

    return st.builds(case, drawn, st.integers(0, 2**16), st.sampled_from(names))


@cache
def free_parameters(contract: Contract) -> SearchStrategy[dict[str, Any]]:
    """Sizes and options as the contract draws them, or else of its factors' values, sizes also between those."""
    if contract.parameters is not None:
        return contract.parameters()
    drawn: dict[str, SearchStrategy[Any]] = {}
    for factor in contract.factors:
        if factor.values:
            drawn[factor.name] = st.sampled_from(factor.values)
            if not factor.option and all(isinstance(each, int) for each in factor.values):
                drawn[factor.name] |= st.integers(min(factor.values), max(factor.values))
    build = contract.build
    assert build is not None  # the row's check
    return st.fixed_dictionaries(drawn).map(lambda values: dict(build(**values) or {})).filter(bool)


def value_case(case: Case) -> Case:
    """The case that has the same values: of the layouts only "broadcast" changes them, to its repeated first row."""
    return case if case.layout == "broadcast" else case.replace(layout="contiguous", laid_out="")


@lru_cache(CACHED)
def _drawn(contract: Contract, case: Case) -> Tensors:
    tensors = contract.regime(case.regime).make(Draw(case.seed), case.parameters)
    for name in case.traits:
        change = contract.trait(name).change
        tensors |= change(tensors) if change is not None else {}
    return {key: lay_out(tensor, case.layout_of(key)).contiguous() for key, tensor in tensors.items()}


@lru_cache(CACHED)
def cotangents(contract: Contract, case: Case) -> Tensors:
    """A random cotangent for each differentiable output, in float64 (never ones: a sum hides permutations and signs)."""
    draw = Draw(case.seed + 1)
    shapes = {spec.name: spec.sizes(case.parameters) for spec in contract.outputs if spec.differentiable}
    return {name: draw.normal(*shape) for name, shape in shapes.items()}


def make_inputs(contract: Contract, case: Case, dtype: str) -> Tensors:
    """The case's inputs, contiguous and on the CPU, rounded to the dtypes that the contract or a trait gives them."""
    case = value_case(case)
    return _rounded(contract, _settled(contract, case, dtype) if contract.chooses_inside else case, dtype)


def _rounded(contract: Contract, case: Case, dtype: str) -> Tensors:
    dtypes = dtypes_of(contract, case.parameters, dtype)
    for name in case.traits:
        dtypes |= {argument: getattr(torch, other) for argument, other in contract.trait(name).dtypes.items()}
    return {key: tensor.to(dtypes[key]) for key, tensor in _drawn(contract, case).items()}


@lru_cache(CACHED)
def _settled(contract: Contract, case: Case, dtype: str) -> Case:
    """The case, or the same with the first other seed with which no choice inside the operation is near a tie.

    Raises:
        ContractError: There is none.
    """
    return case.replace(seed=shared.once(contract.name, ("settled", case, dtype), partial(_settled_seed, contract, case, dtype)))


def _settled_seed(contract: Contract, case: Case, dtype: str) -> int:
    ties_matter = contract.regime(case.regime).judged != "exact"
    for attempt in range(REDRAWS):
        redrawn = case.replace(seed=case.seed + attempt * SEED_STRIDE)
        made = _rounded(contract, redrawn, dtype).items()
        inputs = {key: tensor.to(torch.float64) if tensor.is_floating_point() else tensor for key, tensor in made}
        if not rounding_decides(contract, inputs, options(contract, case), dtype, ties_matter=ties_matter):
            return redrawn.seed
    raise ContractError(f"{contract.name}: in {dtype}, a choice is near a tie in {case!r} with every one of {REDRAWS} seeds")


def dtypes_of(contract: Contract, parameters: Parameters, dtype: str) -> dict[str, torch.dtype]:
    """The dtypes of all inputs and outputs, by flat key, when `dtype` is under test."""
    specs = contract.specs(parameters).items()
    return {key: getattr(torch, dtype if spec.dtype == "tested" else spec.dtype) for key, spec in specs}


def options(contract: Contract, case: Case) -> dict[str, Any]:
    """The keyword arguments of the call, for oracle and candidate alike: numbers are such as float32 holds exactly.

    Every dtype under test is computed in float32, and the rounding of 0.999 would be an error of one sign in all elements.
    """
    if contract.configure is not None:
        given = contract.configure(case.parameters)
    else:
        given = {name: case.parameters[name] for name in contract.options}
    return {name: in_float32(value) for name, value in given.items()}


def in_float32(value: Any) -> Any:
    """The number of float32 nearest to a Python float; a dataclass with its fields so rounded; anything else as it is."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32).item()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: in_float32(getattr(value, each.name)) for each in fields(value) if each.init})
    return value


def lay_out(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The same values otherwise in memory; all other memory within reach holds NaN, a huge integer, or True (or 0, if far).

    `"broadcast"` repeats the first row without storing it again (stride 0), which changes the values: compare with
    a contiguous copy of the result.
    """
    if layout == "contiguous" or tensor.ndim == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "broadcast":
        return tensor[:1].clone().expand_as(tensor) if tensor.shape[0] else tensor.clone()
    if layout == "far":
        return far_view(tensor)
    if layout == "storage offset":
        return guarded(tensor, before=GUARD + 1)[0]
    *rows, columns = tensor.shape
    if layout == "transposed":
        room = (
            _poisoned(tensor, (*rows[:-1], columns, *rows[-1:])).movedim(-2, -1)
            if rows
            else _poisoned(tensor, (columns, 2))[:, 0]
        )
    elif layout == "sliced":
        room = _poisoned(tensor, (*rows, 2 * columns + 1))[..., 1::2]
    else:  # padded rows
        room = _poisoned(tensor, (*rows, columns + 3))[..., :columns]
    return room.copy_(tensor)


def guarded(tensor: torch.Tensor, before: int = GUARD) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous copy inside a larger buffer of NaN or huge integers, and that buffer."""
    buffer = _poisoned(tensor, (before + tensor.numel() + GUARD,))
    inside = buffer[before : before + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor), buffer


def _poisoned(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if like.dtype == torch.bool:
        poison: float | bool = True
    else:
        poison = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(shape, poison, dtype=like.dtype, device=like.device)


def take(
    contract: Contract, parameters: Parameters, tensors: Mapping[str, torch.Tensor], dimension: str, index: torch.Tensor
) -> Tensors:
    """The inputs or outputs with the positions `index` along a named dimension; others unchanged."""
    shapes = {key: contract.spec(key, parameters).shape for key in tensors}
    return {
        key: tensor.index_select(shapes[key].index(dimension), index.to(tensor.device)) if dimension in shapes[key] else tensor
        for key, tensor in tensors.items()
    }
