"""The torch.compile versions, which the gate judges on GPUs only: on a CPU each kind of call takes seconds to compile."""

import pytest

from gaugeblock.conformance.engine.exploration import check
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import contracts, implementations
from gaugeblock.conformance.engine.trial import Ledger, Subject


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "layers.layer_norm_modulate",
        "layers.gated_residual_layer_norm_modulate",
        "norms.rms_norm",
        "norms.layer_norm_affine",
        "norms.group_norm_silu",
    ],
)
def test_compiled_layers_have_the_oracles_values_and_gradients(name):
    compiled = next(each for each in implementations(name) if each.name == "compiled")
    contract = contracts()[name]
    for regime in contract.regimes:
        case = Case(**contract.landmarks[0], regime=regime.name)
        prop = properties()["gradients" if regime.differentiable else "parity"]
        violation = check(Subject(compiled, "float32", "cpu"), prop, case, Ledger())
        assert violation is None, f"{regime.name}: {violation} {violation and violation.details}"
