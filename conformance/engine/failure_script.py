"""The script that a failure is told with."""

from collections.abc import Sequence

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.trial import Subject

SCRIPT = '''"""{title}

{message}
"""
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.reproduction import reproduce

reproduce(
    source={source!r},  # the file or module that registers the implementation; None: built in
    contract={contract!r},
    implementation={implementation!r},
    property={property!r},
    dtype={dtype!r},
    device={device!r},
    cases=[
{cases}
    ],
)
'''


def script_for(subject: Subject, prop: str, cases: Sequence[Case], message: str, source: str | None) -> str:
    """A stand-alone script that puts the implementation through the failing cases again."""
    implementation = subject.implementation
    return SCRIPT.format(
        title=f"{implementation.contract}: {implementation.name} fails {prop} in {subject.dtype} on {subject.device}.",
        message=message.replace("\\", "\\\\").replace('"""', "'''"),
        source=source,
        contract=implementation.contract,
        implementation=implementation.name,
        property=prop,
        dtype=subject.dtype,
        device=subject.device,
        cases="\n".join(f"        {case!r}," for case in cases),
    )
