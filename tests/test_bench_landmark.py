"""What is kept of every commit: the accuracy and the determinism of each implementation at its contract's first landmark."""

import pytest
import torch

from gaugeblock.conformance.bench import landmark
from gaugeblock.conformance.bench.accuracy import accuracy
from gaugeblock.conformance.bench.determinism import RUNS, bit_patterns
from gaugeblock.conformance.engine.registry import Implementation, find_contract
from gaugeblock.reference.torch.objectives import rectified_flow_interpolate, rectified_flow_velocity

INTERPOLATE = find_contract("objectives.rectified_flow_interpolate")
VELOCITY = find_contract("objectives.rectified_flow_velocity")  # a difference: exact in 16 bits, since it is rounded but once


def implementation(function) -> Implementation:
    contract = INTERPOLATE if "times" in function.__code__.co_varnames else VELOCITY
    return Implementation(contract.name, "planted", function, dtypes=("float32", "float16"))


def jittery(data, noise, *, velocity):
    return rectified_flow_velocity(data, noise, velocity=velocity) + 1e-6 * torch.rand(1)


def broken(data, noise, *, velocity):
    return 1.01 * rectified_flow_velocity(data, noise, velocity=velocity)


def shrunk(data, noise, times):
    return 0.99 * rectified_flow_interpolate(data, noise, times)


def failing(data, noise, *, velocity):
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_that_are_exact_have_an_rms_of_zero(dtype):
    assert accuracy(VELOCITY, implementation(rectified_flow_velocity), dtype) == {"rms": 0.0, "bias": 0.0}


def test_a_wrong_result_where_nothing_may_be_rounded_is_no_zero():
    with pytest.raises(ValueError, match="differs from the oracle where nothing may be rounded"):
        accuracy(VELOCITY, implementation(broken), "float16")


def test_errors_are_in_units_of_their_limits():
    right, wrong = (accuracy(INTERPOLATE, implementation(each), "float32") for each in (rectified_flow_interpolate, shrunk))
    assert 0.1 < right["rms"] < 1 < wrong["rms"] and right["bias"] < 1


def test_distinct_bit_patterns_are_counted():
    assert bit_patterns(VELOCITY, implementation(rectified_flow_velocity), "float32") == {"bit_patterns": 1.0}
    assert 1 < bit_patterns(VELOCITY, implementation(jittery), "float32")["bit_patterns"] <= RUNS


def test_what_fails_says_why(monkeypatch):
    monkeypatch.setattr(landmark, "implementations", lambda name: [implementation(failing)])
    found = dict(landmark.answers(VELOCITY, accuracy))
    assert found.keys() == {("float32", "planted"), ("float16", "planted")}
    assert set(found.values()) == {"raised RuntimeError: no such kernel"}


def test_what_is_not_installed_is_not_asked(monkeypatch):
    absent = Implementation(VELOCITY.name, "absent", "no_such_package.kernels:velocity")
    monkeypatch.setattr(landmark, "implementations", lambda name: [absent])
    assert not dict(landmark.answers(VELOCITY, accuracy))
