"""Registers every planted bug as a candidate, for the scripts that make a failure again."""

from typing import Any

from gaugeblock.conformance import implements
from gaugeblock.conformance.selftest.fault import Fault, faults


class Planted:
    """A fault that is made at the first call: a script calls one of them."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if not hasattr(self, "candidate"):
            self.candidate = self.fault.candidate()
        return self.candidate(*inputs, **options)


for fault in faults():
    implements(fault.contract, name=fault.name, **fault.claims)(Planted(fault))
