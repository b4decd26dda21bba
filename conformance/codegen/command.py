"""`gaugeblock codegen`: what the GPU compiler makes of each Triton kernel, on a machine without a GPU.

The launchers run unchanged, on CPU tensors; a driver that only compiles turns every launch into a compilation
for the chip, with the launch's own specialization, since alignment and strides decide what becomes of it.
Checked is what the compiler lets pass: spilled registers, more shared memory than the chip has, and dots of
fp16, bf16 or e4m3 that do not become matrix instructions.
"""

import argparse
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gaugeblock.conformance.engine.triton.chips import CHIPS, MULTIPLIED, Chip, dots
from gaugeblock.conformance.engine.triton.driver import driver_of
from gaugeblock.conformance.engine.triton.patching import wrapped

Launches = Iterable[tuple[str, Callable[[], object]]]

MODULE = "gaugeblock.conformance.codegen.command"
PASSED, FAILED, NOTHING_COMPILED = 0, 1, 3


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, compiled for one chip in one configuration and specialization."""

    label: str
    """the first launch that asked for it."""
    target: str
    """the chip's name."""
    kernel: str = ""
    """the function's name; empty if the launch compiled nothing, as `problems` explains."""
    config: str = ""
    """its constants, num_warps and num_stages, in parentheses."""
    registers: int = 0
    """per thread."""
    spilled_bytes: int = 0
    """of registers, to memory, per thread."""
    shared_bytes: int = 0
    shared_limit: int = 0
    """shared memory per program, and what the chip has."""
    matrix_instructions: dict[str, int] = field(default_factory=dict)
    """how many of which."""
    tile_copies: int = 0
    """instructions that copy a tile as a descriptor says."""
    problems: tuple[str, ...] = ()
    """what is wrong with it, in words; empty if nothing."""


def compile_all(launches: Launches, targets: Iterable[str]) -> list[CompiledKernel]:
    """Compiles every kernel that the launches launch, for each target, and looks at the result.

    Must run in a process of its own: it leaves a driver behind that launches nothing. Results that host code
    reads from kernels are garbage, so launches must not depend on them.

    Args:
        launches: pairs of a label and a function that calls a launcher with CPU tensors.
        targets: names in `CHIPS`.

    Returns:
        One row per kernel, target, configuration and specialization, and one per launch that raised or
        launched nothing.

    Raises:
        RuntimeError: the kernels would be interpreted, as TRITON_INTERPRET is set.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled")
    rows: dict[Any, CompiledKernel] = {}
    launches = list(launches)
    for chip in (CHIPS[target] for target in targets):
        for label, launch in launches:
            with _compiling(chip) as compiled:
                problem = None
                try:
                    launch()
                except Exception as error:  # one bad launch must not hide the others
                    lines = str(error).strip().splitlines() or [""]  # the compiler's begin with the source
                    problem = f"raises {type(error).__name__}: {lines[-1]}"
            if problem or not compiled:
                problems = (problem or "launches no Triton kernel",)
                rows[chip.name, label] = CompiledKernel(label, chip.name, problems=problems)
            for kernel in compiled:
                if (chip.name, kernel.hash) not in rows:
                    rows[chip.name, kernel.hash] = _examine(label, kernel, chip)
    return list(rows.values())


@contextmanager
def _compiling(chip: Chip) -> Iterator[list[Any]]:
    """Turns launches into compilations for the chip, and collects them."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled = []

    def compile_only(run: Callable, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    def try_every_config(run: Callable, autotuner: Any, *args: Any, **kwargs: Any) -> Any:
        autotuner.cache.clear()  # what was chosen for another chip
        return run(autotuner, *args, **kwargs)

    driver.set_active(driver_of(chip))
    with wrapped(JITFunction, "run", compile_only), wrapped(Autotuner, "run", try_every_config):
        yield compiled


def _examine(label: str, kernel: Any, chip: Chip) -> CompiledKernel:
    registers, spilled_bytes = _resources(kernel)
    assembly = kernel.asm["ptx"] if chip.backend == "cuda" else kernel.asm["amdgcn"]
    found = {known.name: assembly.count(known.name) for known in chip.matrix_instructions}
    shared_bytes = kernel.metadata.shared

    problems = []
    if spilled_bytes:
        problems.append(f"spills {spilled_bytes} bytes of registers per thread")
    if shared_bytes > chip.shared_bytes:
        problems.append(f"needs {shared_bytes} bytes of shared memory, {chip.name} has {chip.shared_bytes}")
    for dot in sorted(set(dots(kernel.asm["ttir"]))):
        expected = chip.matrix_instruction(dot.rows)
        if dot.dtype in MULTIPLIED and not found[expected]:
            problems.append(f"has a tl.dot of {dot.rows} rows of {dot.dtype}, but no {expected}")

    return CompiledKernel(
        label=label,
        target=chip.name,
        kernel=kernel.src.fn.fn.__name__,
        config=_config(kernel),
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=shared_bytes,
        shared_limit=chip.shared_bytes,
        matrix_instructions={name: count for name, count in found.items() if count},
        tile_copies=assembly.count(chip.tile_copy) if chip.tile_copy else 0,
        problems=tuple(problems),
    )


def _resources(kernel: Any) -> tuple[int, int]:
    """Registers, and bytes of them spilled to memory, per thread."""
    if "amdgcn" in kernel.asm:
        fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"]))
        return int(fields["vgpr_count"]), 4 * int(fields["vgpr_spill_count"])

    import triton

    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return fields["REG"], _ptxas_spills(kernel) if fields["STACK"] + fields["LOCAL"] else 0


def _ptxas_spills(kernel: Any) -> int:
    """Bytes that ptxas says it spills: the stack may also hold arrays, as for the angle of a float64 sine."""
    import triton
    from triton.compiler.compiler import make_backend

    backend = make_backend(kernel.metadata.target)
    options = backend.parse_options(kernel.metadata._asdict())
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, options, kernel.metadata.target.arch)
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", log.getvalue())))


def _config(kernel: Any) -> str:
    params = kernel.src.fn.params
    constants = {
        params[path[0]].name: value
        for path, value in kernel.src.constants.items()
        if params[path[0]].is_constexpr  # the others are arguments that equal 1
    }
    constants |= {"num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}
    return "(" + ", ".join(f"{name}={value}" for name, value in constants.items()) + ")"


def compile_in_subprocesses(launches: str, targets: list[str]) -> list[CompiledKernel]:
    """Runs `compile_all` in fresh processes, one per processor core, where Triton does not interpret.

    Args:
        launches: where the launches are, as "module:name".
        targets: names in `CHIPS`.

    Raises:
        subprocess.CalledProcessError: a process died; its errors were printed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment.setdefault("TRITON_CACHE_DIR", str(Path(".cache/triton").absolute()))
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9's default, which 3.10 changes
    num_workers = min(len(targets), os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{worker}.json") for worker in range(num_workers)]
        processes = []
        for worker, path in enumerate(paths):
            command = [sys.executable, "-m", MODULE, "--launches", launches, "--worker-output", str(path)]
            command += ["--target", *targets[worker::num_workers]]
            processes.append(subprocess.Popen(command, env=environment))
        try:
            for process in processes:
                if process.wait():
                    raise subprocess.CalledProcessError(process.returncode, process.args)
        finally:
            for process in processes:
                process.kill()
        outputs = [json.loads(path.read_text()) for path in paths]
    return [CompiledKernel(**row | {"problems": tuple(row["problems"])}) for rows in outputs for row in rows]


def summarize(rows: list[CompiledKernel]) -> str:
    """A table with a line per kernel and chip: the most that any version of it uses."""
    versions: dict[tuple[str, str], list[CompiledKernel]] = {}
    for row in filter(attrgetter("kernel"), rows):
        versions.setdefault((row.kernel, row.target), []).append(row)
    lines = []
    for (kernel, target), group in sorted(versions.items()):
        instructions = {name for row in group for name in row.matrix_instructions}
        lines.append(
            {
                "kernel": kernel,
                "chip": target,
                "versions": len(group),
                "registers": max(row.registers for row in group),
                "spilled B": max(row.spilled_bytes for row in group),
                "shared B": max(row.shared_bytes for row in group),
                "of": group[0].shared_limit,
                "matrix instructions": ", ".join(sorted(instructions)),
                "tile copies": max(row.tile_copies for row in group),
                "problems": sum(len(row.problems) for row in group),
            }
        )
    return tabulate(lines, headers="keys")


def main(arguments: list[str] | None = None) -> int:
    """Compiles, prints a table and the problems; returns 0, 1 if any problems, 3 if nothing compiled."""
    parser = argparse.ArgumentParser(prog="gaugeblock codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS), help="default: all")
    parser.add_argument(
        "--launches",
        default="gaugeblock.conformance.codegen.launches:LAUNCHES",
        help="what to launch, as module:name of pairs (label, function without arguments)",
    )
    parser.add_argument("--json", type=Path, help="write every compiled version of every kernel to this file")
    parser.add_argument("--worker-output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    if options.worker_output:
        module, _, name = options.launches.partition(":")
        compiled = compile_all(getattr(importlib.import_module(module), name), options.target)
        options.worker_output.write_text(_to_json(compiled))
        return PASSED

    rows = compile_in_subprocesses(options.launches, options.target)
    if options.json:
        options.json.write_text(_to_json(rows))
    print(summarize(rows))
    for row in rows:
        for problem in row.problems:
            print(f"{row.target}, {row.label}: {row.kernel or 'the call'} {problem} {row.config}".rstrip())
    kernels = [row.kernel for row in rows if row.kernel]
    problems = sum(len(row.problems) for row in rows)
    print(f"{len(kernels)} versions of {len(set(kernels))} kernels compiled, {problems} problems")
    if not kernels:
        return NOTHING_COMPILED
    return FAILED if problems else PASSED


def _to_json(rows: list[CompiledKernel]) -> str:
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1)


if __name__ == "__main__":
    sys.exit(main())
