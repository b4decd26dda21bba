"""The pytest plugin: every property test is run for every subject, and its verdict kept.

`pytest --pyargs gaugeblock.conformance --candidate my_kernels.py` judges what a file registers; without candidates the built-in
implementations are judged. Each is judged anew: what `gaugeblock check` keeps is neither used nor added to. Loaded into every
pytest run where gaugeblock is installed, so it imports nothing heavy by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from gaugeblock.conformance.commands.options import FILTERS, add_filters, add_profile

if TYPE_CHECKING:
    from gaugeblock.conformance.engine.trial import Property, Subject

VERDICT = "gauge_verdict"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The gate's options; `gaugeblock check` has the same without the prefix."""
    group = parser.getgroup("gaugeblock", "conformance of kernels")
    group.addoption(
        "--candidate",
        action="append",
        default=[],
        metavar="FILE_OR_MODULE",
        help="judge what this registers (repeatable)",
    )
    add_profile(group.addoption, "--gauge-")
    add_filters(group.addoption, "--gauge-")


@dataclass(frozen=True)
class Selected:
    """A subject, and the candidate file or module it came from."""

    subject: "Subject"
    source: str | None

    @property
    def identity(self) -> str:
        """As in test ids: `contract/implementation/dtype/device`."""
        implementation = self.subject.implementation
        return "/".join((implementation.contract, implementation.name, self.subject.dtype, self.subject.device))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes each property test with the selected subjects."""
    if VERDICT not in metafunc.fixturenames:
        return
    subjects = select(metafunc.config)
    metafunc.parametrize(VERDICT, subjects, ids=[each.identity for each in subjects], indirect=True)


@pytest.fixture
def gauge_verdict(request: pytest.FixtureRequest) -> Callable[["Property"], None]:
    """Examines the subject under a property; fails or skips the test as the verdict says."""
    from gaugeblock.conformance.engine.exploration import PROFILES, examine
    from gaugeblock.conformance.engine.judging.verdict import FAILED
    from gaugeblock.conformance.report.failure_text import failure_lines

    selected: Selected = request.param

    def judge(prop: "Property") -> None:
        verdict = examine(selected.subject, prop, PROFILES[request.config.getoption("--gauge-profile")], selected.source)
        if verdict.status == "not supported":
            pytest.skip(verdict.reason)
        if verdict.status in FAILED:
            pytest.fail("\n".join(failure_lines(verdict)), pytrace=False)

    return judge


def select(config: pytest.Config) -> list[Selected]:
    """The subjects of this run, ordered so that those that share cases (and budgets) come together.

    Raises:
        pytest.UsageError: If a candidate cannot be registered.
    """
    cached: list[Selected] | None = getattr(config, "_gauge_selected", None)
    if cached is None:
        cached = config._gauge_selected = _select(config)  # type: ignore[attr-defined]
    return cached


def _select(config: pytest.Config) -> list[Selected]:
    from gaugeblock.conformance.engine.devices import set_up_process

    set_up_process()  # before any candidate imports triton
    from gaugeblock.conformance.engine.registry import RegistrationError
    from gaugeblock.conformance.engine.selection import Filters, subjects_of

    filters = Filters(*(tuple(config.getoption(f"--gauge-{name}")) for name in FILTERS))
    try:
        found = subjects_of(tuple(config.getoption("--candidate")), filters)
    except RegistrationError as error:
        raise pytest.UsageError(str(error)) from None
    if not found:
        raise pytest.UsageError("gaugeblock: nothing to test: no implementation fits the options on this machine")
    return [Selected(subject, source) for subject, source in found]
