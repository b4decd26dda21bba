"""What an operation must do, as data: a contract is a row that people read and the engine obeys.

Nothing here knows of a particular operation, framework or property. Sizes are named by strings
(`"num_tokens"`); a case gives each name a number, and the same names appear in the shapes of the inputs
and outputs, so that the engine can find the batch dimension, permute experts or slice tokens by itself.

An argument is a tensor or a flat dict of tensors (a state dict). The engine keeps arguments and results as flat dicts
keyed by `"hidden_states"` or `"state/blocks.0.weight"`; `nest` and `flatten` are the two ways across, `apply` makes a call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from gaugeblock.conformance.engine.factors import Factor, Trait

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy

    from gaugeblock.conformance.engine.inputs.cases import Draw

Tensors = dict[str, "torch.Tensor"]
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Input:
    """One argument of an operation.

    Attributes:
        name: The argument's name in the public signature.
        shape: Its dimensions: names of sizes, or, where the engine has nothing to do with one, the size itself.
        dtype: `"tested"` (the dtype under test), or a fixed dtype such as `"float32"` or `"int64"`.
        differentiable: Whether a gradient with respect to it is due; of a dict, with respect to each floating tensor in it.
        indexes: The dimension whose indices its values are (`topk_ids` indexes `"num_experts"`), if any.
        leaves: Of a dict of tensors (a state dict): its tensors by name, at given sizes.
    """

    name: str
    shape: tuple[str | int, ...] = ()
    dtype: str = "tested"
    differentiable: bool = False
    indexes: str | None = None
    leaves: Callable[[Parameters], Mapping[str, "Input"]] | None = None

    def sizes(self, parameters: Parameters) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(each if isinstance(each, int) else parameters[each] for each in self.shape)


@dataclass(frozen=True)
class Output(Input):
    """One result of an operation; the fields are those of `Input`.

    One of them may be a choice: it is right if and only if the scores allow it (`Selection`), and all other outputs are judged
    at the choice that the candidate made.
    """


class ContractError(Exception):
    """A contract or its reference is wrong, whoever is on trial."""


@dataclass(frozen=True)
class Selection:
    """How the reference chooses: the candidates of highest score, in each row of scores.

    A row has `count` ids, one id where the output lacks the candidates' dimension (an argmax, a sampled token), or a mask over
    the candidates (an output of dtype `"bool"`). A sort chooses them all; a threshold chooses every one above it. What is drawn
    at random is chosen by scores too, the draw being an input: logits plus Gumbel noise, or the distance of a uniform number to
    the nearer end of a token's interval of probabilities.

    Attributes:
        output: The output that is the choice.
        scores: Function of the operation's arguments giving the scores `[..., candidates]`.
        count: How many are chosen in each row, or the parameter that says so; None for every one above the threshold.
        group_scores: Function of the same arguments giving `[..., groups]`, the candidates lying in groups of consecutive ones;
            they are chosen from the best groups alone.
        group_count: How many groups may be chosen from, or the parameter that says so.
        order: In which order ids are returned: of descending score, of the ids themselves, or any.
        above: Only what scores above this threshold can be chosen.
        none: The id returned, last in its row, where less than `count` can be chosen.
    """

    output: str
    scores: Callable[..., "torch.Tensor"]
    count: int | str | None
    group_scores: Callable[..., "torch.Tensor"] | None = None
    group_count: int | str | None = None
    order: Literal["score", "index", "any"] = "score"
    above: float | None = None
    none: int | None = None

    def __post_init__(self) -> None:
        if (self.group_scores is None) != (self.group_count is None):
            raise ContractError(f"{self.output}: group_scores and group_count belong together")
        if self.above is None and (self.count is None or self.none is not None):
            raise ContractError(f"{self.output}: above must say from what score on anything is chosen")


@dataclass(frozen=True)
class Regime:
    """A kind of values.

    Attributes:
        name: As the report prints it.
        make: Draws every input in float64 (integers in int64); the engine rounds to the dtype under test.
        judged: `"budget"`: max, and with enough elements rms and bias; `"worst element"`: max alone, where
            the statistical model does not hold; `"exact"`: bit for bit, since every partial sum is exact.
        differentiable: False where gradients do not exist or are not judged (ties, NaN).
    """

    name: str
    make: Callable[["Draw", Parameters], Tensors]
    judged: Literal["budget", "worst element", "exact"] = "budget"
    differentiable: bool = True


@dataclass(frozen=True)
class Rejection:
    """A bad call, made from a good one, that must raise an error naming `argument`.

    Attributes:
        name: What is bad about it.
        argument: What the error's message must name.
        spoil: From the good call's flat inputs and options, those that are to be replaced; None takes a tensor out of its dict.
        raises: What may be raised.
    """

    name: str
    argument: str
    spoil: Callable[[dict[str, Any]], Mapping[str, Any]]
    raises: tuple[type[Exception], ...] = (ValueError, TypeError)


@dataclass(frozen=True)
class Recurrence:
    """An operation that is one step of many: it is applied again and again, what it returns being its next input.

    Attributes:
        steps: The leading dimension of the inputs that each step gets one slice of, and of the outputs that are not carried.
        carried: For an input, the output that becomes it in the next step.
    """

    steps: str
    carried: Mapping[str, str]


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


@dataclass(frozen=True)
class Builtin:
    """An implementation of ours, imported only when it is run; the fields are those of `Implementation`."""

    name: str
    function: str
    kind: str
    framework: str = "torch"
    claims: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Contract:
    """An operation and all that is demanded of its implementations.

    Attributes:
        name: `subject.operation`.
        summary: One sentence.
        formula: The mathematics, in plain text.
        source: The paper and section, or the public model followed.
        reference: The PyTorch reference; in float64 it is the oracle.
        twin: Import path `module:function` of the JAX reference.
        inputs, outputs: The signature.
        options: Names of the keyword arguments; their values are among a case's parameters.
        batch: The dimension along which examples are independent.
        parameters: Strategy of sizes and options.
        landmarks: Sizes and options that are always worth a visit, the configurations that people run among them; the first
            is an ordinary one.
        factors: What a kernel may treat in different ways: every pair of classes of two factors is visited.
        build: The parameters that have the given values of all factors that have values; None where there are none.
        traits: What values and dtypes of inputs may be like on top; factors of their own.
        regimes: Kinds of values; the first is the main one.
        formulas: Other ways to write the reference, equal in exact arithmetic; a budget allows for the rounding of each.
        selection: For operations that return what they choose.
        chooses_inside: Whether the reference chooses what it does not return. Cases are then drawn so that rounding decides
            nothing, since nobody can tell another choice from an error.
        relabel: Draws a permutation of `"num_experts"` under which the operation is equivariant; None if
            it has no experts.
        configure: The keyword arguments at given parameters, where they are not parameters themselves (a frozen config).
        dtypes: Those that can be tested.
        recurrence: For an operation that is one step of many.
        cases: How many cases a property gets, relative to others: a training step costs as much as twenty routers.
        microbatches: The parameter that says in how many parts a batch is processed, which must not matter.
        sharded: Dimensions that are split over the ranks of a distributed implementation, in contiguous chunks as by
            `torch.tensor_split`; whether the ranks' shares must be of one size. All else is on every rank, in and out.
        rejections: Bad calls.
        without: Properties that do not apply, each with the reason.
        cost: Of a forward pass, from parameters and bytes per element.
        workloads: Published sizes, for benchmarks.
        builtins: Implementations of ours.
    """

    name: str
    summary: str
    formula: str
    source: str
    reference: Callable[..., Any]
    twin: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    options: tuple[str, ...]
    batch: str
    parameters: Callable[[], "SearchStrategy[dict[str, Any]]"]
    landmarks: tuple[Parameters, ...]
    regimes: tuple[Regime, ...]
    cost: Callable[[Parameters, int], Cost]
    workloads: tuple[Workload, ...]
    formulas: tuple[Callable[..., Any], ...] = ()
    factors: tuple[Factor, ...] = ()
    build: Callable[..., Parameters | None] | None = None
    traits: tuple[Trait, ...] = ()
    selection: Selection | None = None
    chooses_inside: bool = False
    relabel: Callable[["Draw", Parameters], "torch.Tensor"] | None = None
    configure: Callable[[Parameters], Mapping[str, Any]] | None = None
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    recurrence: Recurrence | None = None
    cases: float = 1.0
    microbatches: str | None = None
    sharded: Mapping[str, Literal["even", "uneven"]] = field(default_factory=dict)
    rejections: tuple[Rejection, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    builtins: tuple[Builtin, ...] = ()

    @property
    def signature(self) -> str:
        """The public call, as text."""
        arguments = [spec.name for spec in self.inputs]
        return f"{self.name}({', '.join([*arguments, *(['*'] if self.options else []), *self.options])})"

    def regime(self, name: str) -> Regime:
        """The regime of that name."""
        return next(regime for regime in self.regimes if regime.name == name)

    def trait(self, name: str) -> Trait:
        """The trait of that name."""
        return next(trait for trait in self.traits if trait.name == name)

    @property
    def gradients(self) -> tuple[str, ...]:
        """The arguments that have one."""
        return tuple(spec.name for spec in self.inputs if spec.differentiable)

    @property
    def state(self) -> Input | None:
        """The argument that is a dict of tensors, if there is one."""
        return next((spec for spec in self.inputs if spec.leaves), None)

    def differentiable(self, tensors: Mapping[str, Any]) -> list[str]:
        """Keys of `tensors` (flat inputs or outputs) through which gradients flow; integers in a state dict have none."""
        flowing = {spec.name for spec in (*self.inputs, *self.outputs) if spec.differentiable}
        return [key for key in tensors if argument_of(key) in flowing and "int" not in str(tensors[key].dtype)]

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


def argument_of(key: str) -> str:
    """The argument that a flat key belongs to: `"state/blocks.0.weight"` to `"state"`."""
    return key.partition("/")[0]


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys to arguments: `{"x": a, "state/w": b}` to `{"x": a, "state": {"w": b}}`."""
    arguments: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name, nested, leaf = key.partition("/")
        if nested:
            arguments.setdefault(name, {})[leaf] = tensor
        else:
            arguments[name] = tensor
    return arguments


class ResultCount(TypeError):
    """A function returned more or fewer results than its contract has."""


def flatten(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a function returned to flat keys: a value, or a tuple or list of them, in the order of `names`.

    A value may be a dict or a dataclass of tensors.

    Raises:
        ResultCount: If the number of results is not that of `names`.
    """
    values = tuple(result) if isinstance(result, tuple | list) else (result,)
    if len(values) != len(names):
        raise ResultCount(f"returned {len(values)} values, expected {len(names)}: ({', '.join(names)})")
    flat: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if is_dataclass(value):
            value = {each.name: getattr(value, each.name) for each in fields(value)}
        if isinstance(value, Mapping):
            flat |= {f"{name}/{leaf}": tensor for leaf, tensor in value.items()}
        else:
            flat[name] = value
    return flat


def apply(
    contract: Contract,
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    stack: Callable[[list[Any]], Any],
) -> dict[str, Any]:
    """Calls a function as the contract's signature says, inputs by position and options by keyword; once for each step.

    Args:
        inputs: Flat inputs.
        stack: Puts the arrays of all steps along a new leading dimension.

    Returns:
        Flat outputs.

    Raises:
        ResultCount: If the number of results is not that of the contract's outputs.
    """
    names = [spec.name for spec in contract.outputs]
    given = nest(inputs)
    if contract.recurrence is None:
        return flatten(function(*(given[spec.name] for spec in contract.inputs), **options), names)
    stepped = [spec.name for spec in contract.inputs if spec.shape[:1] == (contract.recurrence.steps,)]
    results = []
    for step in range(len(given[stepped[0]])):
        now = given | {name: given[name][step] for name in stepped}
        results.append(flatten(function(*(now[spec.name] for spec in contract.inputs), **options), names))
        returned = nest(results[-1])
        given |= {name: returned[output] for name, output in contract.recurrence.carried.items()}
    last, carried = results[-1], contract.recurrence.carried.values()
    return {key: last[key] if argument_of(key) in carried else stack([each[key] for each in results]) for key in last}
