"""How a property becomes a test: `@conformance_property` over a function of one trial."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from gaugeblock.conformance.engine.registry import RegistrationError, import_folder
from gaugeblock.conformance.engine.suggestion import suggest
from gaugeblock.conformance.engine.trial import Property, Trial

FIRST = ("parity", "gradients")  # in the report; the others follow by name


def conformance_property(**fields: Any) -> Callable[[Callable[[Trial], None]], Callable[..., None]]:
    """Turns `test_<name>(trial)` into a pytest test that is generic over contracts and implementations.

    Args are fields of `Property` other than those that the function tells. The test asks the plugin for a verdict on its
    subject; the property itself stays reachable as the attribute `property`, so that the engine, the selftest and
    `gaugeblock reproduce` run it without pytest.
    """

    def decorate(check: Callable[[Trial], None]) -> Callable[..., None]:
        statement = inspect.getdoc(check) or ""
        prop = Property(name=check.__name__.removeprefix("test_"), check=check, statement=statement, **fields)

        def test(gauge_verdict: Callable[[Property], None]) -> None:
            gauge_verdict(prop)

        test.__name__ = test.__qualname__ = check.__name__
        test.__doc__ = check.__doc__
        test.property = prop  # type: ignore[attr-defined]
        return test

    return decorate


@cache
def properties() -> dict[str, Property]:
    """Every property by name, in the order of the report."""
    members = [member for module in import_folder("gaugeblock.conformance.properties") for member in vars(module).values()]
    found = [prop for member in members if isinstance(prop := getattr(member, "property", None), Property)]
    found.sort(key=lambda each: (FIRST.index(each.name) if each.name in FIRST else len(FIRST), each.name))
    return {each.name: each for each in found}


def find_property(name: str) -> Property:
    """The property of that name.

    Raises:
        RegistrationError: If there is none.
    """
    if name not in properties():
        raise RegistrationError(f"unknown property {name!r}{suggest(name, properties())}")
    return properties()[name]
