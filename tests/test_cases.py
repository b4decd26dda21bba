"""Cases and how they become tensors: the same from their repr, of the declared shapes, anywhere in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugeblock.conformance.engine.budget.oracle import exact_inputs, reference_run
from gaugeblock.conformance.engine.calls import nest
from gaugeblock.conformance.engine.inputs.cases import (
    GUARD,
    LAYOUTS,
    Case,
    cases,
    cotangents,
    dtypes_of,
    free_parameters,
    guarded,
    lay_out,
    make_inputs,
    options,
    take,
)
from gaugeblock.conformance.engine.inputs.coverage import array
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.registry import contracts, find_contract

CONTRACTS = tuple(contracts().values())
REGIMES = [pytest.param(row, each, id=f"{row.name}-{each.name}") for row in CONTRACTS for each in row.regimes]
EXACT = [each for each in REGIMES if each.values[1].judged == "exact"]
contract_of_each = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda row: row.name)

LENGTHS = [(row, length) for row in CONTRACTS for length in ((1,) if "empty_and_one" in row.without else (0, 1))]

# of each contract and regime: thousands in all
few_examples = settings(max_examples=12, derandomize=True, database=None, deadline=None)


def main_case(contract, **changes) -> Case:
    return Case(**contract.landmarks[0], regime=contract.regimes[0].name).replace(**changes)


# ----------------------------------------------------------------------------------------------------- a case


@contract_of_each
@given(data=st.data())
@few_examples
def test_the_repr_of_a_case_is_its_reproduction(contract, data):
    case = data.draw(cases(contract, contract.regimes[0].name)).replace(layout=data.draw(st.sampled_from(LAYOUTS)))
    again = eval(repr(case), {"Case": Case})
    assert again == case and hash(again) == hash(case)
    assert Case(**case.to_json()) == case


@pytest.mark.parametrize(("contract", "length"), LENGTHS)
def test_every_trait_can_be_had_by_a_batch_of_any_length(contract, length):
    for trait in contract.traits:
        case = main_case(contract, **{contract.batch: length}, traits=[trait.name])
        plain = make_inputs(contract, case.replace(traits=[]), "float32")
        for key, tensor in make_inputs(contract, case, "float32").items():
            assert tensor.shape == plain[key].shape


@contract_of_each
def test_every_trait_changes_something(contract):
    for trait in contract.traits:
        differ = []
        for case in (each for each in array(contract, 2) if trait.name in each.traits):
            others = [name for name in case.traits if name != trait.name]
            plain, changed = (make_inputs(contract, each, "float32") for each in (case.replace(traits=others), case))
            differ += [
                key for key in plain if plain[key].dtype != changed[key].dtype or not torch.equal(plain[key], changed[key])
            ]
        assert differ, trait.name


@contract_of_each
def test_what_has_a_trait_is_not_changed_by_it(contract):
    for trait in (each for each in contract.traits if each.change is not None):
        for case in (each for each in array(contract, 2) if trait.name in each.traits):
            made = exact_inputs(contract, case, "float32")
            for key, tensor in trait.change(made).items():
                assert torch.equal(tensor.to(torch.float32), made[key].to(torch.float32)), (trait.name, key)


def test_a_layout_may_be_that_of_one_argument():
    case = Case(num_tokens=3, regime="dithered", layout="broadcast", laid_out="state")
    assert eval(repr(case), {"Case": Case}) == case == Case(**case.to_json())
    assert (case.layout_of("state/w"), case.layout_of("hidden_states")) == ("broadcast", "contiguous")


def test_a_case_is_replaced_in_parts():
    case = Case(num_tokens=3, top_k=2, regime="ties", seed=5)
    assert case.replace(num_tokens=0, layout="sliced") == Case(num_tokens=0, top_k=2, regime="ties", layout="sliced", seed=5)
    assert case != case.replace(seed=6)


@contract_of_each
@given(data=st.data())
@few_examples
def test_landmarks_workloads_and_drawn_parameters_name_the_same_sizes(contract, data):
    named = {*data.draw(free_parameters(contract))}
    for parameters in (*contract.landmarks, *(each.parameters for each in contract.workloads)):
        assert {*parameters} == named
    specs = contract.specs(contract.landmarks[0]).values()
    sizes = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    assert sizes.union(*contract.shardings.values()) <= named
    assert contract.configure or {*contract.options} <= named


# ---------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(("contract", "regime"), REGIMES)
@given(data=st.data())
@few_examples
def test_every_regime_makes_the_declared_inputs(contract, regime, data):
    case, dtype = data.draw(cases(contract, regime.name)), contract.dtypes[-1]
    made = make_inputs(contract, case, dtype)
    assert {*nest(made)} == {spec.name for spec in contract.inputs}
    for key, tensor in made.items():
        spec = contract.spec(key, case.parameters)
        assert tensor.shape == spec.sizes(case.parameters)
        others = {name: dtype for each in case.traits for name, dtype in contract.trait(each).dtypes.items()}
        due = dtypes_of(contract, case.parameters, dtype)[key]
        assert tensor.dtype == (getattr(torch, others[key]) if key in others else due)
        if spec.indexes:
            assert tensor.min() >= 0 and tensor.max() < case.parameters[spec.indexes]


@pytest.mark.parametrize(("contract", "length"), LENGTHS)
def test_the_main_regime_fills_a_batch_of_any_length(contract, length):
    case = main_case(contract, **{contract.batch: length})
    batched = [spec for spec in contract.inputs if contract.batch in spec.shape]
    made = make_inputs(contract, case, "float32")
    assert all(made[spec.name].shape[spec.shape.index(contract.batch)] == length for spec in batched)


@contract_of_each
def test_equal_cases_make_equal_inputs_and_other_seeds_make_others(contract):
    first, again, other = (make_inputs(contract, main_case(contract, seed=seed), "float32") for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in first if first[key].numel())


@contract_of_each
def test_cotangents_are_random_and_fit_the_differentiable_outputs(contract):
    case = main_case(contract)
    made = cotangents(contract, case)
    assert [*made] == [spec.name for spec in contract.outputs if spec.differentiable]
    for name, tensor in made.items():
        assert tensor.shape == contract.spec(name, case.parameters).sizes(case.parameters)
        assert tensor.unique().numel() == tensor.numel()


@contract_of_each
def test_options_are_those_of_the_signature(contract):
    assert [*options(contract, main_case(contract))] == [*contract.options]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("contract", "regime"), EXACT)
@given(data=st.data())
@few_examples
def test_on_a_lattice_the_reference_is_exact_in_every_dtype(contract, regime, dtype, data):
    case = data.draw(cases(contract, regime.name))
    results = reference_run(contract, make_inputs(contract, case, dtype), options(contract, case))
    oracle = reference_run(contract, exact_inputs(contract, case, dtype), options(contract, case))
    for key in results:
        if results[key].is_floating_point():
            assert oracle[key].dtype == torch.float64
            given = contract.spec(key, case.parameters).dtype
            rounded = oracle[key].to(getattr(torch, dtype if given == "tested" else given))
            assert torch.equal(results[key], rounded.double())


@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 4), st.integers(0, 2**16))
@few_examples
def test_distinct_rows_are_distinct_and_below_the_bound(rows, columns, more, seed):
    drawn = Draw(seed).distinct_rows(rows, columns, columns + more)
    assert drawn.shape == (rows, columns) and drawn.dtype == torch.int64
    assert all(len({*row}) == columns and {*row} <= {*range(columns + more)} for row in drawn.tolist())


# -------------------------------------------------------------------------------------------------- in memory


def whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    """All memory that a tensor lies in, as one row."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def outside(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor's memory that are not its own."""
    memory = whole_storage(tensor)
    own = torch.arange(memory.numel()).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return memory[torch.ones(memory.numel(), dtype=torch.bool).index_fill(0, own.flatten(), False)]


def is_poison(memory: torch.Tensor) -> bool:
    poison = memory.isnan() if memory.is_floating_point() else memory == torch.iinfo(memory.dtype).max
    return bool(poison.all())


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.int64], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[(6,), (4, 6), (2, 4, 6)], ids=str)
def values(request, dtype):
    length = torch.Size(request.param).numel()
    return torch.arange(1, length + 1).to(dtype).view(request.param)


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "broadcast"])
def test_layouts_keep_the_values_and_lie_among_poison(values, layout):
    laid_out = lay_out(values, layout)
    assert torch.equal(laid_out, values) and laid_out.dtype == values.dtype
    assert laid_out.data_ptr() != values.data_ptr()
    assert is_poison(outside(laid_out))


def test_layouts_are_what_they_are_called():
    values = torch.arange(24.0).view(4, 6)
    stride = {layout: lay_out(values, layout).stride() for layout in LAYOUTS}
    assert stride == {
        "contiguous": (6, 1),
        "transposed": (1, 4),
        "sliced": (13, 2),
        "padded rows": (9, 1),
        "storage offset": (6, 1),
        "broadcast": (0, 1),
    }
    assert lay_out(values, "storage offset").storage_offset() % 2 == 1, "no alignment beyond the element's own"
    assert outside(lay_out(values, "sliced")).numel() > values.numel()


def test_a_broadcast_layout_repeats_the_first_row(values):
    assert torch.equal(lay_out(values, "broadcast"), values[:1].expand_as(values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1, 1)], ids=str)
def test_layouts_take_empty_and_single_elements(layout, shape):
    assert lay_out(torch.ones(shape), layout).shape == shape


def test_inputs_of_a_broadcast_case_have_equal_rows():
    contract = find_contract("routers.softmax_topk")
    made = make_inputs(contract, main_case(contract, layout="broadcast"), "float32")["router_logits"]
    plain = make_inputs(contract, main_case(contract), "float32")["router_logits"]
    assert torch.equal(made, plain[:1].expand_as(plain)) and made.is_contiguous()


def test_guard_zones_lie_on_either_side(values):
    inside, buffer = guarded(values)
    assert torch.equal(inside, values) and inside.is_contiguous()
    assert buffer.numel() == values.numel() + 2 * GUARD
    assert is_poison(buffer[:GUARD]) and is_poison(buffer[-GUARD:])
    inside.zero_()
    assert not is_poison(buffer) and is_poison(outside(inside))


def test_take_picks_along_the_named_dimension_and_leaves_the_rest():
    contract = contracts()["experts.fused_swiglu"]
    inputs = make_inputs(contract, main_case(contract), "float32")
    sizes = main_case(contract).parameters
    experts = take(contract, sizes, inputs, "num_experts", torch.tensor([2, 0]))
    assert torch.equal(experts["w13"], inputs["w13"][[2, 0]]) and torch.equal(experts["w2"], inputs["w2"][[2, 0]])
    assert all(experts[key] is inputs[key] for key in ("hidden_states", "topk_weights", "topk_ids"))
    columns = take(contract, sizes, inputs, "hidden_size", torch.tensor([1]))
    assert torch.equal(columns["w13"], inputs["w13"][:, :, [1]]) and torch.equal(columns["w2"], inputs["w2"][:, [1]])
