"""What an operation must do, as data: a contract is a row that people read and the engine obeys.

Nothing here knows of a particular operation, framework or property. Sizes are named by strings
(`"num_tokens"`); a case gives each name a number, and the same names appear in the shapes of the inputs
and outputs, so that the engine can find the batch dimension, permute experts or slice tokens by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.factors import Factor, Trait
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.row_checks import ContractError, check_row
from gaugeblock.conformance.engine.shardings import Sharding
from gaugeblock.conformance.engine.vocabulary import BYTES, DTYPES, DType, Parameters, Tensors

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy

    from gaugeblock.conformance.engine.inputs.draw import Draw


@dataclass(frozen=True)
class Derived:
    """A size that follows from the others: how many tokens an expert chooses among so many."""

    name: str
    """As the report prints it."""
    of: Callable[[Parameters], int]
    """From a case's parameters."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Input:
    """One argument of an operation."""

    name: str
    """The argument's name in the public signature."""
    shape: tuple[str | int | Derived, ...] = ()
    """Its dimensions: names of sizes, or, where the engine has nothing to do with one, the size itself, or how it follows."""
    _: KW_ONLY
    dtype: str = "tested"
    """`"tested"` (the dtype under test), or a fixed dtype such as `"float32"` or `"int64"`."""
    differentiable: bool = False
    """Whether a gradient with respect to it is due; of a dict, with respect to each floating tensor in it."""
    indexes: str | None = None
    """The dimension whose indices its values are (`topk_ids` indexes `"num_experts"`), if any."""
    leaves: Callable[[Parameters], Mapping[str, "Input"]] | None = None
    """Of a dict of tensors (a state dict): its tensors by name, at given sizes."""
    buffers: frozenset[str] = frozenset()
    """Of a dict with gradients: the names of the tensors in it that have none."""
    any_rank: bool = False
    """Whether it may have more axes in front, or fewer; the gate calls it with these."""
    whole: tuple[str, ...] = ()
    """Dimensions that every rank has whole, whatever a sharding says of their names: a router's, where experts are spread."""

    @property
    def spread(self) -> tuple[str | int | Derived, ...]:
        """The shape, without the names of dimensions that every rank has whole."""
        return tuple("" if each in self.whole else each for each in self.shape)

    def sizes(self, parameters: Parameters) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(size_of(each, parameters) for each in self.shape)


def size_of(size: str | int | Derived, parameters: Parameters) -> int:
    """A size in numbers."""
    if isinstance(size, Derived):
        return size.of(parameters)
    return parameters[size] if isinstance(size, str) else size


@dataclass(frozen=True)
class Output(Input):
    """One result of an operation; the fields are those of `Input`.

    One of them may be a choice: it is right if and only if the scores allow it (`Selection`), and all other outputs are judged
    at the choice that the candidate made.
    """


@dataclass(frozen=True)
class Selection:
    """How the reference chooses: the candidates of highest score, in each row of scores.

    A row has `count` ids, one id where the output lacks the candidates' dimension (an argmax, a sampled token), or a mask over
    the candidates (an output of dtype `"bool"`). A sort chooses them all; a threshold chooses every one above it. What is drawn
    at random is chosen by scores too, the draw being an input: logits plus Gumbel noise, or the distance of a uniform number to
    the nearer end of a token's interval of probabilities.
    """

    output: str
    """The output that is the choice."""
    scores: Callable[..., "torch.Tensor"]
    """Function of the operation's arguments giving the scores `[..., candidates]`."""
    count: int | str | Derived | None
    """How many are chosen in each row, or the parameter that says so; None for every one above the threshold."""
    _: KW_ONLY
    one_by_one: bool = False
    """Whether the places of a row are filled one after the other, each by scores of its own: these are
    `[..., count, candidates]`, and what a place before has taken, no later one can."""
    group_scores: Callable[..., "torch.Tensor"] | None = None
    """Function of the same arguments giving `[..., groups]`, the candidates lying in groups of consecutive ones; they are chosen
    from the best groups alone."""
    group_count: int | str | None = None
    """How many groups may be chosen from, or the parameter that says so."""
    order: Literal["score", "index", "any"] = "score"
    """In which order ids are returned: of descending score, of the ids themselves, or any."""
    above: float | None = None
    """Only what scores above this threshold can be chosen."""
    none: int | None = None
    """The id returned, last in its row, where less than `count` can be chosen."""

    def __post_init__(self) -> None:
        if (self.group_scores is None) != (self.group_count is None):
            raise ContractError(f"{self.output}: group_scores and group_count belong together")
        if self.above is None and (self.count is None or self.none is not None):
            raise ContractError(f"{self.output}: above must say from what score on anything is chosen")
        if self.one_by_one and (self.group_scores is not None or self.above is not None):
            raise ContractError(f"{self.output}: one_by_one knows neither groups nor a threshold")


@dataclass(frozen=True)
class Regime:
    """A kind of values."""

    name: str
    """As the report prints it."""
    make: Callable[["Draw", Parameters], Tensors]
    """Draws every input in float64 (integers in int64); the engine rounds to the dtype under test."""
    judged: Literal["budget", "worst element", "exact"] = "budget"
    """`"budget"`: max, and with enough elements rms and bias; `"worst element"`: max alone, where the statistical model does not
    hold; `"exact"`: bit for bit, since every partial sum is exact."""
    _: KW_ONLY
    differentiable: bool = True
    """False where gradients do not exist or are not judged (ties, NaN)."""


@dataclass(frozen=True)
class Rejection:
    """A bad call, made from a good one, that must raise an error naming `argument`."""

    name: str
    """What is bad about it."""
    argument: str | tuple[str, ...]
    """What the error's message must name: this, or one of these."""
    spoil: Callable[[dict[str, Any]], Mapping[str, Any]]
    """From the good call's flat inputs and options, those that are to be replaced; None takes a tensor out of its dict."""
    _: KW_ONLY
    raises: tuple[type[Exception], ...] = (ValueError, TypeError)
    """What may be raised."""
    elsewhere: str = ""
    """The input that lies on another device than the rest."""
    by_values: bool = False
    """Whether values of a tensor must be read to see it, for which the host would have to wait for a GPU: it is demanded on the
    CPU alone."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the error's message may name."""
        return (self.argument,) if isinstance(self.argument, str) else self.argument


@dataclass(frozen=True)
class Recurrence:
    """An operation that is one step of many: it is applied again and again, what it returns being its next input."""

    steps: str
    """The leading dimension of the inputs that each step gets one slice of, and of the outputs that are not carried."""
    carried: Mapping[str, str]
    """For an input, the output that becomes it in the next step."""


@dataclass(frozen=True)
class Cost:
    """What an operation cannot avoid: floating-point operations, and bytes read and written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Workload:
    """A named size from a published model, e.g. `mixtral-8x7b/prefill-4096`."""

    name: str
    parameters: Parameters
    source: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Contract:
    """An operation and all that is demanded of its implementations."""

    name: str
    """`family.operation`."""
    summary: str
    """One sentence."""
    formula: str
    """The mathematics, in plain text."""
    source: str
    """The paper and section, or the public model followed."""
    reference: Callable[..., Any]
    """The PyTorch reference; in float64 it is the oracle."""
    twin: str = ""
    """Import path `module:function` of the JAX reference: by default that of the same name."""
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    """The signature."""
    options: tuple[str, ...]
    """Names of the keyword arguments; their values are among a case's parameters."""
    batch: str
    """The dimension along which examples are independent."""
    parameters: Callable[[], "SearchStrategy[dict[str, Any]]"] | None = None
    """Strategy of sizes and options; by default they are drawn from the factors' values, and of sizes from what lies between."""
    landmarks: tuple[Parameters, ...]
    """Sizes and options that are always worth a visit, the configurations that people run among them; the first is an ordinary
    one."""
    regimes: tuple[Regime, ...]
    """Kinds of values; the first is the main one."""
    flops: Callable[[Parameters], float]
    """Floating-point operations that a forward pass cannot avoid."""
    moved: Callable[[Parameters, int], float] | None = None
    """Bytes that it cannot avoid to read or write, from parameters and bytes per element, if they are not all of its inputs and
    outputs, once each."""
    workloads: tuple[Workload, ...]
    """Published sizes, for benchmarks."""
    formulas: tuple[Callable[..., Any], ...] = ()
    """Other ways to write the reference, equal in exact arithmetic; a budget allows for the rounding of each."""
    rounded_as: Callable[..., Any] | None = None
    """Such a way that is rounded no less than the reference anywhere: budgets are found by it, in the reference's place."""
    rigid: bool = False
    """It is a model, or a step of one. Its sizes hang together (heads, groups, patches): a benchmark may make no width smaller.
    Its kernels have contracts of their own: ours leave `Property.of_parts` to them, and see float16 in the main regime alone."""
    factors: tuple[Factor, ...] = ()
    """What a kernel may treat in different ways: every pair of classes of two factors is visited."""
    build: Callable[..., Parameters | None] | None = None
    """The parameters that have the given values of all factors that have values; None where there are none."""
    traits: tuple[Trait, ...] = ()
    """What values and dtypes of inputs may be like on top; factors of their own."""
    selection: Selection | None = None
    """For operations that return what they choose."""
    chooses_inside: bool = False
    """Whether the reference chooses what it does not return. Cases are then drawn so that rounding decides nothing, since nobody
    can tell another choice from an error."""
    relabel: Callable[["Draw", Parameters], "torch.Tensor"] | None = None
    """Draws a permutation of `"num_experts"` under which the operation is equivariant; None if it has no experts."""
    configure: Callable[[Parameters], Mapping[str, Any]] | None = None
    """The keyword arguments at given parameters, where they are not parameters themselves (a frozen config)."""
    dtypes: tuple[DType, ...] = DTYPES
    """Those that can be tested."""
    recurrence: Recurrence | None = None
    """For an operation that is one step of many."""
    cases: float = 1.0
    """How many cases a property gets, relative to others: a training step costs as much as twenty routers."""
    microbatches: str | None = None
    """The parameter that says in how many parts a batch is processed, which must not matter."""
    shardings: Mapping[str, Sharding] = field(default_factory=dict)
    """By name, the ways in which inputs and outputs may lie over the ranks of a distributed implementation, which names its own,
    by default the first: how each dimension is split. All else is on every rank alike, in and out, gradients too."""
    rejections: tuple[Rejection, ...] = ()
    """Bad calls."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Properties that do not apply, each with the reason."""
    implementations: tuple[Implementation, ...] = ()
    """Ours beside the references."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "twin", self.twin or f"gaugeblock.reference.jax.{self.name.replace('.', ':')}")
        object.__setattr__(self, "implementations", tuple(each.of(self.name) for each in self.implementations))
        check_row(self)

    @property
    def family(self) -> str:
        """The operations of one file."""
        return self.name.partition(".")[0]

    @property
    def signature(self) -> str:
        """The public call, as text."""
        arguments = [spec.name for spec in self.inputs]
        return f"{self.name}({', '.join([*arguments, *(['*'] if self.options else []), *self.options])})"

    def sharding(self, name: str) -> Sharding:
        """The way of that name in which tensors lie over ranks; with an empty one, the first."""
        return self.shardings[name or next(iter(self.shardings))]

    def regime(self, name: str) -> Regime:
        """The regime of that name."""
        return next(regime for regime in self.regimes if regime.name == name)

    def trait(self, name: str) -> Trait:
        """The trait of that name."""
        return next(trait for trait in self.traits if trait.name == name)

    def cost(self, parameters: Parameters, itemsize: int) -> Cost:
        """Of a forward pass, at so many bytes per element of the dtype under test."""
        tensors = self.specs(parameters).values()
        read_and_written = sum(prod(each.sizes(parameters)) * BYTES.get(each.dtype, itemsize) for each in tensors)
        moved = read_and_written if self.moved is None else self.moved(parameters, itemsize)
        return Cost(float(self.flops(parameters)), float(moved))

    @property
    def gradients(self) -> tuple[str, ...]:
        """The arguments that have one."""
        return tuple(spec.name for spec in self.inputs if spec.differentiable)

    @property
    def state(self) -> Input | None:
        """The argument that is a dict of tensors, if there is one."""
        return next((spec for spec in self.inputs if spec.leaves), None)

    def differentiable(self, tensors: Mapping[str, Any]) -> list[str]:
        """Keys of `tensors` (flat inputs or outputs) through which gradients flow; integers and buffers of a dict have none."""
        flowing = {spec.name for spec in (*self.inputs, *self.outputs) if spec.differentiable}
        without = {f"{spec.name}/{each}" for spec in self.inputs for each in spec.buffers}
        return [
            key for key in tensors
            if argument_of(key) in flowing and key not in without and "int" not in str(tensors[key].dtype)
        ]  # fmt: skip

    def specs(self, parameters: Parameters) -> Mapping[str, Input]:
        """Every tensor of the inputs and outputs, by flat key, at given parameters."""
        return _specs(self, tuple(parameters.items()))

    def spec(self, key: str, parameters: Parameters) -> Input:
        """The tensor of the inputs or outputs at the flat key `key`."""
        return self.specs(parameters)[key]


@lru_cache(512)
def _specs(contract: Contract, parameters: tuple[tuple[str, Any], ...]) -> Mapping[str, Input]:
    flat: dict[str, Input] = {}
    for spec in (*contract.inputs, *contract.outputs):
        if spec.leaves is None:
            flat[spec.name] = spec
        else:
            flat |= {f"{spec.name}/{leaf}": each for leaf, each in spec.leaves(dict(parameters)).items()}
    return flat


class Row:
    """A function that makes a contract, once: a row can stand first in its file, and what it refers to below."""

    def __init__(self, make: Callable[[], Contract]) -> None:
        self.make, self.module = cache(make), make.__module__

    def __call__(self) -> Contract:
        return self.make()


row = Row
