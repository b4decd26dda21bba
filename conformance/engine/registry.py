"""Who claims to fulfil which contract: the built-in rows, installed packages, and a user's own file or module."""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args

from gaugeblock.conformance.engine.contract import Contract, Row
from gaugeblock.conformance.engine.devices import available_devices, unknown_device
from gaugeblock.conformance.engine.implementation import CLAIMS, Candidate, Implementation, import_path
from gaugeblock.conformance.engine.only import wrong_with
from gaugeblock.conformance.engine.suggestion import one_line, suggest
from gaugeblock.conformance.engine.vocabulary import DEVICES

CONTRACTS = "gaugeblock.conformance.contracts"
ENTRY_POINTS = "gaugeblock.implementations"

Function = TypeVar("Function", bound=Callable[..., Any])


class RegistrationError(ValueError):
    """A registration that cannot be taken; the message is one line for the user."""


_registered: dict[tuple[str, str], Implementation] = {}
_functions: dict[tuple[str, str], Callable[..., Any]] = {}  # what was registered in this process
_origins: dict[tuple[str, str], dict[str, Any]] = {}  # the names of the module that was being run then


def implements(contract: str, *, name: str, **claims: Any) -> Callable[[Function], Function]:
    """Registers a function as an implementation of `contract`; it is returned unchanged.

    Args:
        contract: A contract's name, e.g. `"routers.softmax_topk"` (`gaugeblock list` shows them).
        name: How the report calls the implementation.
        **claims: Fields of `Implementation`: `framework`, `dtypes`, `devices`, `rounding`, `differentiable`,
            `deterministic`, `batch_invariant`, `validates`, `assumes_zero_masked_lanes`, `jit`, `world_sizes`, `sharding`,
            `only`, `memory_gib`, `kind`.

    Raises:
        RegistrationError: If the contract, a claim, a claim's value, or the function's signature is wrong, or the name is
            taken for this contract.
    """

    def register(function: Function) -> Function:
        row = find_contract(contract)
        _check_claims(contract, name, claims)
        _check_signature(row, name, function, bool(claims.get("world_sizes")))
        running = _running_module()
        if any(name == each.name for each in implementations(contract)) and not _is_run_again(contract, name, running):
            raise RegistrationError(f"{contract}: an implementation named {name!r} is already registered")
        _functions[contract, name], _origins[contract, name] = function, running
        _registered[contract, name] = _row(contract, name, function, claims)
        return function

    return register


def load(implementation: Implementation) -> Callable[..., Any]:
    """What is called.

    Raises:
        ImportError: If a package that it needs is not installed.
    """
    function = implementation.function
    if isinstance(function, Candidate):
        _run_once(function.source)
        return _functions[implementation.contract, implementation.name]
    return import_path(function) if isinstance(function, str) else function


def register_told(contract: str, name: str, source: str, claims: dict[str, Any]) -> Implementation:
    """Registers what a candidate's process has told of a file or module.

    Raises:
        RegistrationError: If the contract or a claim is wrong, or the name is taken by another source.
    """
    find_contract(contract)
    _check_claims(contract, name, claims)
    others = [each for each in implementations(contract) if each.name == name and each.function != Candidate(source)]
    if others:
        raise RegistrationError(f"{contract}: an implementation named {name!r} is already registered")
    _registered[contract, name] = _row(contract, name, Candidate(source), claims)
    return _registered[contract, name]


def claims_of(implementation: Implementation) -> dict[str, Any]:
    """All that it claims, by name."""
    return {claim: getattr(implementation, claim) for claim in CLAIMS}


def _row(contract: str, name: str, function: Callable[..., Any] | Candidate, claims: dict[str, Any]) -> Implementation:
    tuples = {
        key: (value,) if isinstance(value, str | int) else tuple(value)
        for key, value in claims.items()
        if key in ("dtypes", "devices", "world_sizes")
    }
    return Implementation(contract, name, function, **(claims | tuples))


def _check_claims(contract: str, name: str, claims: dict[str, Any]) -> None:
    for claim, value in claims.items():
        if claim not in CLAIMS:
            raise RegistrationError(f"{contract} ({name}): unknown claim {claim!r}{suggest(claim, CLAIMS)}")
        kind = CLAIMS[claim]
        if claim == "world_sizes":
            _check_world_sizes(contract, name, value)
            continue
        if claim == "sharding":
            ways = find_contract(contract).shardings
            if value and value not in ways:
                raise RegistrationError(f"{contract} ({name}): no sharding {value!r}, only {', '.join(ways) or 'none'}")
            continue
        if claim == "memory_gib":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**20:
                raise RegistrationError(f"{contract} ({name}): memory_gib must be a positive number, got {value!r}")
            continue
        if claim == "only":
            if wrong_only := wrong_with(value, find_contract(contract)):
                raise RegistrationError(f"{contract} ({name}): only={value!r}: {wrong_only}")
            continue
        values = tuple(value) if claim in ("dtypes", "devices") and not isinstance(value, str) else (value,)
        if claim == "devices":
            unknown = [why for why in map(unknown_device, values) if why] or ([] if values else ["there is none"])
            if unknown:
                raise RegistrationError(
                    f"{contract} ({name}): devices must be of torch's device types, got {value!r}: {unknown[0]}"
                )
            continue
        allowed = (True, False) if kind is bool else get_args(get_args(kind)[0] if claim == "dtypes" else kind)
        wrong = [each for each in values if each not in allowed]
        if wrong or not values:
            raise RegistrationError(f"{contract} ({name}): {claim} must be of {allowed}, got {value!r}")


def _check_world_sizes(contract: str, name: str, value: Any) -> None:
    sizes = (value,) if isinstance(value, int) else value
    if not isinstance(sizes, tuple | list) or not all(isinstance(each, int) and each >= 1 for each in sizes):
        raise RegistrationError(f"{contract} ({name}): world_sizes must be positive integers, got {value!r}")
    if sizes and not find_contract(contract).shardings:
        raise RegistrationError(f"{contract} ({name}): world_sizes={value!r}, but the contract does not shard its inputs")


def _check_signature(contract: Contract, name: str, function: Callable[..., Any], distributed: bool) -> None:
    if not callable(function):
        raise RegistrationError(f"{contract.name} ({name}): expected a function, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin or an extension without a signature: the first call will tell
        return
    try:
        signature.bind(*contract.inputs, **dict.fromkeys((*contract.options, "mesh") if distributed else contract.options))
    except TypeError as error:
        expected = f"{contract.signature}{' with mesh=...' if distributed else ''}"
        raise RegistrationError(
            f"{contract.name} ({name}): wrong signature {name}{signature}, expected {expected}: {error}"
        ) from None


@cache
def contracts() -> dict[str, Contract]:
    """Every contract by name, a family's together."""
    rows = [row() for module in import_folder(CONTRACTS) for row in vars(module).values() if isinstance(row, Row)]
    return {row.name: row for row in sorted(rows, key=lambda row: row.family)}


@cache
def contract_modules() -> dict[str, str]:
    """The module whose row each contract is."""
    modules = import_folder(CONTRACTS)
    return {row().name: row.module for module in modules for row in vars(module).values() if isinstance(row, Row)}


def find_contract(name: str) -> Contract:
    """The contract of that name.

    Raises:
        RegistrationError: If there is none; the nearest name is suggested.
    """
    try:
        return contracts()[name]
    except KeyError:
        raise RegistrationError(f"unknown contract {name!r}{suggest(name, contracts())}") from None


def implementations(contract: str) -> tuple[Implementation, ...]:
    """All implementations of a contract: references, built-in rows, then registered ones."""
    registered = tuple(each for (key, _), each in _registered.items() if key == contract)
    return (*builtin_implementations(find_contract(contract)), *registered)


def is_built_in(implementation: Implementation) -> bool:
    """Whether it is ours."""
    return implementation in builtin_implementations(find_contract(implementation.contract))


def registered_implementations() -> tuple[Implementation, ...]:
    """Those that users registered, in order."""
    return tuple(_registered.values())


def registered_by_file() -> dict[tuple[str, str], tuple[Implementation, str]]:
    """What was registered in this process, and the file that did it."""
    return {key: (each, os.path.realpath(_origins.get(key, {}).get("__file__") or "")) for key, each in _registered.items()}


@cache
def builtin_implementations(contract: Contract) -> tuple[Implementation, ...]:
    """The two references and our optimized versions."""
    reference = Implementation(
        contract.name,
        "reference",
        contract.reference,
        kind="reference",
        dtypes=contract.dtypes,
        devices=tuple(dict.fromkeys((*DEVICES, *available_devices()))),  # it is plain torch: any that torch has
    )
    jit = contract.recurrence is None  # a step reads its loss, which jit has not
    twin = Implementation(contract.name, "reference-jax", contract.twin, kind="reference", framework="jax", jit=jit)
    return (reference, twin, *contract.implementations)


def load_candidates(source: str) -> tuple[Implementation, ...]:
    """Runs a user's file (or imports a module) and returns what it registered.

    Raises:
        RegistrationError: If it cannot be read, run or imported, or registers nothing; one line says where and why.
    """
    before = set(_registered)
    run_candidate(source)
    added = tuple(each for key, each in _registered.items() if key not in before)
    if not added:
        raise registers_nothing(source)
    return added


def registers_nothing(source: str) -> RegistrationError:
    """The error to raise where nothing is registered."""
    return RegistrationError(f"{source}: registers no implementation; decorate a function with gaugeblock.conformance.implements")


def run_candidate(source: str) -> None:
    """Runs a user's file, unless a neighbour has imported it, or imports a module.

    Raises:
        RegistrationError: If it cannot be read, run or imported; one line says where and why.
    """
    try:
        if source.endswith(".py"):
            _run_file(Path(source))
        else:
            importlib.import_module(source)
    except RegistrationError as error:
        raise RegistrationError(f"{source}: {error}") from None
    except FileNotFoundError as error:
        raise RegistrationError(f"{source}: no such file" if str(error.filename) == source else f"{source}: {error}") from None
    except SyntaxError as error:
        raise RegistrationError(f"{error.filename or source}:{error.lineno}: syntax error: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise RegistrationError(f"{source}{_line_of(error, source)}: {type(error).__name__}: {one_line(error)}") from None


@cache
def _run_once(source: str) -> None:
    run_candidate(source)


@cache
def load_entry_points() -> tuple[tuple[str, tuple[Implementation, ...]], ...]:
    """Imports the modules that installed packages name in the entry-point group `gaugeblock.implementations`.

    Returns:
        The modules, and what each registers.
    """
    found = []
    for point in entry_points(group=ENTRY_POINTS):
        before = set(_registered)
        try:
            point.load()
            found.append((point.module, tuple(each for key, each in _registered.items() if key not in before)))
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise RegistrationError(f"entry point {point.name!r} ({point.value}): {reason}") from error
    return tuple(found)


def import_folder(package: str) -> list[ModuleType]:
    """Every module that lies in the folder of a package, by name."""
    folder = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{name}") for name in sorted(each.name for each in pkgutil.iter_modules(folder))]


def _run_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    real = path.resolve()
    loaded = [getattr(each, "__dict__", {}).get("__file__") or "" for each in [*sys.modules.values()]]
    if any(os.path.basename(each) == real.name and os.path.realpath(each) == str(real) for each in loaded):
        return
    package, name = real.parent, path.stem
    while (package / "__init__.py").is_file() and package.name.isidentifier():
        package, name = package.parent, f"{package.name}.{name}"
    for folder in dict.fromkeys((str(package), str(real.parent))):
        sys.path.insert(0, folder)  # as `python path` would: its neighbours can be imported, and the package that it lies in
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _running_module() -> dict[str, Any]:
    """The names of the innermost module that is being run, from which a registration comes."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame.f_globals


def _is_run_again(contract: str, name: str, running: dict[str, Any]) -> bool:
    """Whether a file is run a second time, under another name: by its neighbours and by its own."""
    before = _origins.get((contract, name))
    return before is not None and before is not running and before.get("__file__", "") == running.get("__file__")


def _line_of(error: BaseException, source: str) -> str:
    trace = error.__traceback__
    lines = []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == source or trace.tb_frame.f_code.co_filename == str(Path(source).resolve()):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f":{lines[-1]}" if lines else ""
