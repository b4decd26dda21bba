"""Cases that cover: every pair of classes, few of them, the same every time, soon; and what a verdict says of them."""

import gc
import time
from dataclasses import replace
from itertools import combinations

import pytest

from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.factors import ORDINARY, edges, either, kind_of_count, kind_of_width
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs import coverage
from gaugeblock.conformance.engine.inputs.cases import LAYOUTS
from gaugeblock.conformance.engine.inputs.coverage import Demand, Space, array, covering, few_visits, laid_out, measure, visits
from gaugeblock.conformance.engine.judging.verdict import Coverage, Verdict
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import contracts, implementations
from gaugeblock.conformance.engine.trial import Subject, Trial

CONTRACTS = tuple(contracts().values())
of_each = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda row: row.name)
PAIRS, CLASSES = Demand(2), Demand(1)
ROUTER, EXPERTS = contracts()["routers.softmax_topk"], contracts()["experts.fused_swiglu"]


# ---------------------------------------------------------------------------------------------------- factors


def test_edges_are_the_beginnings_of_classes():
    factor = edges("top_k", 1, 2, 3, 5)
    assert [factor.class_of({"top_k": value}) for value in range(1, 8)] == [
        "1", "2", "3 to 4", "3 to 4", "5 and more", "5 and more", "5 and more",
    ]  # fmt: skip


def test_an_option_has_a_class_for_each_value():
    assert [either("flag", False, True).class_of({"flag": value}) for value in (True, False)] == ["True", "False"]


def test_counts_and_widths_are_of_a_kind():
    assert [kind_of_count(each) for each in (1, 2, 8, 60, 256)] == ["1", "2", "a power of two", "no power of two", "above 255"]
    assert [kind_of_width(each) for each in (1, 31, 48, 24, 65)] == ["1", "odd", "a multiple of 16", "even", "above 64"]


@of_each
def test_what_is_built_has_the_values_it_was_asked_for(contract):
    for factor in contract.factors:
        if factor.values:
            found = {factor.class_of(case.parameters) for case in coverage.space(contract).pool}
            assert found == {factor.classify(value) for value in factor.values}, factor.name
    assert all({*case.parameters} == {*contract.landmarks[0]} for case in coverage.space(contract).pool)


@of_each
def test_a_trait_is_only_where_it_fits(contract):
    for case in array(contract, 2):
        assert all(contract.trait(name).fits(case.parameters) for name in case.traits)
        assert len({contract.trait(name).factor for name in case.traits}) == len(case.traits)


# -------------------------------------------------------------------------------------------------- the array


def pairs_of(contract: Contract, cases) -> set:
    """Pairs of classes, counted without the bits of `Space`."""
    classes = [list(enumerate(coverage.space(contract).classes(case))) for case in cases]
    return {pair for each in classes for pair in combinations(each, 2)}


@of_each
def test_every_pair_of_classes_that_can_be_had_is_visited(contract):
    chosen = covering(contract, PAIRS)
    assert pairs_of(contract, chosen) == pairs_of(contract, [*coverage.landmarks(contract), *coverage.space(contract).pool])
    assert str(measure(contract, chosen, PAIRS, sparing=False)).partition(" ")[0] == str(len(pairs_of(contract, chosen)))


@of_each
def test_few_cases_are_enough(contract):
    classes = [*map(coverage.space(contract).classes, array(contract, 2))]
    sizes = sorted(len({each[place] for each in classes}) for place in range(len(classes[0])))
    assert len(classes) <= 2 * sizes[-1] * sizes[-2]  # the least that there can be is their product


@of_each
def test_each_array_begins_with_landmarks_and_with_the_array_of_lower_strength(contract):
    pairs, triples = array(contract, 2), array(contract, 3)
    assert [case.parameters for case in pairs[: len(contract.landmarks)]] == [dict(each) for each in contract.landmarks]
    assert triples[: len(pairs)] == pairs and len(triples) > len(pairs)
    assert {*covering(contract, CLASSES)} <= {*pairs}  # so that properties share budgets
    assert len({case.seed for case in triples}) == len(triples)


@of_each
def test_the_array_is_the_same_every_time_and_soon_there(contract):
    gc.disable()  # whose time depends on all that this process holds
    start = time.process_time()
    again = Space(contract)
    built = time.process_time() - start
    gc.enable()
    assert again.pool == coverage.space(contract).pool and built < 1
    assert coverage.select(contract, again.pool, PAIRS, coverage.landmarks(contract)) == [
        case.replace(seed=0) for case in array(contract, 2)[len(contract.landmarks) :]
    ]


PUBLISHED = {
    "routers.softmax_topk": [(8, 2), (128, 8)],
    "routers.grouped_sigmoid_topk": [(256, 8)],
    "experts.fused_swiglu": [(8, 2), (128, 8)],
    "moe_layers.mixtral_moe": [(8, 2), (128, 8)],
    "auxiliary_losses.load_balancing_loss": [(8, 2), (128, 8)],
}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_configurations_that_people_run_are_always_visited(name, published):
    for demand in (CLASSES, PAIRS):
        found = {(case.parameters["num_experts"], case.parameters["top_k"]) for case in covering(contracts()[name], demand)}
        assert {*published} <= found


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "auxiliary_losses.router_z_loss"])
def test_every_expert_is_the_first_choice_of_some_token(name):
    """With 1, 2, a power of two and no power of two of experts."""
    contract = contracts()[name]
    with_every = [case for case in array(contract, 2) if any(trait.startswith("each expert") for trait in case.traits)]
    for kind in ("1", "2", "a power of two", "no power of two"):
        assert any(kind_of_count(case.parameters["num_experts"]) == kind for case in with_every), kind
    reference = implementations(name)[0]
    for case in with_every:
        trial = Trial(Subject(reference, "float32", "cpu"), case)
        tensors = trial.inputs() | trial.run()
        assert {*tensors["topk_ids"][:, 0].tolist()} == {*range(case.parameters["num_experts"])}, case


# ------------------------------------------------------------------------------------------------ what is visited


def test_what_is_compiled_visits_every_class_and_every_pair_of_options_at_few_points():
    demand = Demand(2, compiled=True)
    chosen = covering(ROUTER, demand)
    assert len(chosen) <= 10 and measure(ROUTER, chosen, demand, sparing=False).lacking is False
    options = {(min(case.parameters["top_k"], 4), case.parameters["renormalize"]) for case in chosen}
    assert len(options) == 8
    for regime in ROUTER.regimes:  # what was compiled once serves every regime
        points = visits(ROUTER, regime.name, demand)
        assert [case.parameters for case in points] == [case.parameters for case in chosen]


@of_each
def test_every_layout_of_every_argument_is_dealt(contract):
    points = covering(contract, CLASSES)
    dealt = laid_out(contract, points)
    due = {*LAYOUTS[1:]} - ({"broadcast"} if contract.chooses_inside else set())  # equal weights would tie all choices
    whole = due - ({"broadcast"} if contract.rigid else set())  # equal rows of all weights leave a model one channel
    for spec in contract.inputs if len(contract.inputs) > 1 else ():
        assert {case.layout for case in dealt if case.laid_out == spec.name} == (whole if spec.leaves else due)
    assert {case.layout for case in dealt if not case.laid_out} == whole
    assert {repr(case.parameters) for case in dealt} == {repr(case.parameters) for case in points}


@of_each
def test_every_regime_visits_every_class_that_is_built_and_some_landmarks(contract):
    main = visits(contract, contract.regimes[0].name, PAIRS)
    assert all(dict(each) in [case.parameters for case in main] for each in contract.landmarks)
    built = [factor.name for factor in contract.factors if factor.values]
    for regime in contract.regimes[1:]:
        visited = visits(contract, regime.name, PAIRS)
        assert not any(case.traits for case in visited) and {case.regime for case in visited} == {regime.name}
        assert any(dict(each) in [case.parameters for case in visited] for each in contract.landmarks)
        for factor in (each for each in contract.factors if each.name in built):
            due = {factor.classify(value) for value in factor.values}
            assert due <= {factor.class_of(case.parameters) for case in visited}, factor.name


def test_regimes_begin_with_other_landmarks_where_few_are_visited():
    first = [few_visits(EXPERTS, regime.name, CLASSES, 0) for regime in EXPERTS.regimes]
    assert [len(each) for each in first] == [1] * len(EXPERTS.regimes)
    assert len({repr(case.parameters) for (case,) in first}) == len(first)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("routers.grouped_sigmoid_topk", "num_groups", {6}),  # of one expert each
        ("objectives.rectified_flow_velocity", "velocity", {"noise - data", "data - noise"}),
        ("objectives.rectified_flow_loss", "velocity", {"noise - data", "data - noise"}),
    ],
)
def test_a_twin_visits_more_than_the_first_landmark(name, option, values):
    twin = next(each for each in implementations(name) if each.framework == "jax")
    verdict = examine(Subject(twin, "float32", "cpu"), properties()["parity"], PROFILES["quick"])
    assert verdict.coverage.sparing
    assert all(any(f"{option}={value!r}" in case for case in verdict.fingerprints) for value in values)


def test_ordinary_is_a_class_of_its_own():
    space = coverage.space(EXPERTS)
    plain = coverage.landmarks(EXPERTS)[0]
    assert space.classes(plain)[-len(space.traits) :] == (ORDINARY,) * len(space.traits)


def test_a_contract_without_factors_has_no_coverage():
    bare = replace(ROUTER, factors=(), traits=(), build=None)
    assert array(bare, 2) == coverage.landmarks(bare) and measure(bare, array(bare, 2), PAIRS, sparing=False) is None


# ------------------------------------------------------------------------------------------------- the verdict


def mine(**claims) -> Subject:
    return Subject(Implementation(ROUTER.name, "mine", ROUTER.reference, **claims), "float32", "cpu")


def test_a_candidate_visits_all_that_is_due():
    for name, of in (("parity", "pairs"), ("layout", "classes, and layouts of each argument")):
        verdict = examine(mine(), properties()[name], PROFILES["quick"])
        assert verdict.status == "pass" and verdict.coverage.visited == verdict.coverage.due and verdict.coverage.of == of
        assert Verdict.from_json(verdict.to_json()) == verdict


def test_what_is_built_in_visits_less_and_says_so():
    subject = Subject(implementations(ROUTER.name)[0], "float32", "cpu")
    verdict = examine(subject, properties()["parity"], PROFILES["quick"])
    assert verdict.status == "pass" and verdict.coverage.sparing and verdict.coverage.visited < verdict.coverage.due


def test_a_property_that_visits_less_than_it_should_is_a_warning():
    slow = replace(properties()["parity"], check=lambda trial: time.sleep(0.1))
    verdict = examine(mine(), slow, replace(PROFILES["quick"], verdict_seconds=2.0))
    assert verdict.status == "warning" and verdict.coverage.lacking
    assert verdict.reason.startswith(f"visits only {verdict.coverage}")


def test_coverage_is_lacking_unless_it_is_sparing_on_purpose():
    assert Coverage(3, 4, "pairs").lacking and not Coverage(4, 4, "pairs").lacking
    assert not Coverage(3, 4, "pairs", sparing=True).lacking and str(Coverage(3, 4, "pairs")) == "3 of 4 pairs"


def test_a_failure_in_one_pair_of_classes_is_found():
    def wrong(router_logits, *, top_k, renormalize):
        weights, ids = ROUTER.reference(router_logits, top_k=top_k, renormalize=renormalize)
        return weights * (1.01 if (len(weights), top_k) == (15, 3) else 1), ids

    subject = Subject(Implementation(ROUTER.name, "wrong", wrong), "float32", "cpu")
    verdict = examine(subject, properties()["parity"], replace(PROFILES["quick"], shrink_seconds=0))
    assert verdict.status == "fail"
    (case,) = verdict.failure.cases
    assert (case["num_tokens"], case["top_k"]) == (15, 3)


def test_of_our_models_what_their_kernels_answer_for_is_left_out_and_layouts_are_halved():
    row = next(each for each in implementations("dit.dit") if each.name == "torch-library")
    ours, another = (Subject(each, "float32", "cpu") for each in (row, replace(row, name="another")))
    left_out = examine(ours, properties()["far_strides"], PROFILES["quick"])
    assert left_out.status == "not supported" and "--profile ci" in left_out.reason
    assert examine(another, properties()["far_strides"], PROFILES["quick"]).status == "pass"
    counts = [examine(ours, properties()[name], PROFILES["quick"]).cases for name in ("layout", "gradient_layout")]
    assert sum(counts) == len(LAYOUTS) - 1
    reference = Subject(implementations("dit.dit")[0], "float32", "cpu")
    assert examine(reference, properties()["far_strides"], PROFILES["quick"]).status == "pass"
