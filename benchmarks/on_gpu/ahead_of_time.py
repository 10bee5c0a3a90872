"""Compile every kernel for GPUs that are not here, and check the results against budgets.

A kernel file lists its launches in `AOT`: functions that call its real launchers on tensors of device "meta". Each is recorded as if on the
GPU architecture in question, with its own launch settings, and compiled with the type, value-is-1 and divisible-by-16 specialisations
that a launch on the device would make. Registers, spills, shared memory and machine instructions are read from the result. The compilers
and disassemblers come with Triton; kernels that are to be compiled must not have been made for the interpreter, so this needs a process
without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels._launch import SHARED_MEMORY, Recorded, recording, triton

BUDGETS = Path(__file__).parents[2] / "tests" / "kernels" / "budgets.json"
README = Path(kernels.__file__).parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- budgets -->\n).*?(?=<!-- end of budgets -->)", re.DOTALL)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
    torch.int8: "*i8", torch.bool: "*i1",
}
# Instructions worth counting in NVIDIA's machine code: tensor-core products, spilled registers, atomics, asynchronous copies.
INSTRUCTIONS = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "STL", "LDL", "ATOMG", "RED", "LDGSTS", "UTMALDG")


def cases() -> dict[str, Callable[[], Any]]:
    """Return every entry of every kernel file's AOT, by label."""
    found: dict[str, Callable] = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        entries = getattr(importlib.import_module(f"kernels.{info.name}"), "AOT", {})
        assert not found.keys() & entries.keys(), f"two kernel files use one label: {found.keys() & entries.keys()}"
        found |= entries
    return found


def _argument(value: Any, place: tuple[int, ...], signature: list, constants: dict, hints: dict) -> None:
    """Add what a launch would make of one argument: its type or constant, and its divisibility."""
    if isinstance(value, tuple):
        inner: list = []
        for i, v in enumerate(value):
            _argument(v, (*place, i), inner, constants, hints)
        signature.append(tuple(inner))
    elif isinstance(value, torch.Tensor):
        signature.append(POINTERS[value.dtype])
        if value.storage_offset() * value.itemsize % 16 == 0:
            hints[place] = [["tt.divisibility", 16]]
    elif value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
        signature.append("constexpr")
        constants[place] = value
    elif isinstance(value, bool):
        signature.append("i1")
    elif isinstance(value, int):
        signature.append("i32" if -(2**31) <= value < 2**31 else "i64")
        if value % 16 == 0:
            hints[place] = [["tt.divisibility", 16]]
    else:
        signature.append("fp32")


def build(launch: Recorded, part: str):
    """Return the compiled kernel of one recorded launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: list = []
    constants, hints = {}, {}
    for i, value in enumerate(launch.args):
        _argument(value, (i,), signature, constants, hints)
    names = launch.kernel.arg_names
    types = dict(zip(names, signature))
    for name, value in launch.constexprs.items():
        types[name] = "constexpr"
        constants[(names.index(name),)] = value
    missing = [name for name in names if name not in types]
    assert not missing, f"{launch.kernel.__name__}: launched without {missing}"
    target = GPUTarget("cuda", int(part[3:]), 32) if part.startswith("sm_") else GPUTarget("hip", part, 64)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True)
    return triton.compile(ASTSource(launch.kernel, types, constants, hints), target=target, options=options)


def figures(compiled, part: str) -> dict[str, int]:
    """Return registers, spills, shared memory in bytes, matmuls in the source, and instructions.

    Spills are bytes of stack on NVIDIA, registers on AMD.
    """
    counts = {"shared": compiled.metadata.shared, "dots": len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"]))}
    if not part.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        read = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        atomics = len(re.findall(r"\b(?:global|buffer|flat)_atomic", text))
        return counts | {"registers": read["vgpr_count"], "spills": read["vgpr_spill_count"], "ATOMG": atomics}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")))
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL)[: ]+(\d+)", usage)}
    counts |= {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    spilled = counts["STL"] + counts["LDL"]
    return counts | {"registers": found["REG"], "spills": spilled}


def measure(label: str, part: str) -> dict[str, dict[str, int]]:
    """Return the figures of every kernel that one case launches on one architecture.

    They are keyed "label / kernel", numbered where a kernel is launched in several forms.
    """
    with recording(part) as launches:
        cases()[label]()
    assert launches, f"{label}: its AOT case launches nothing"
    found: dict[str, dict[str, int]] = {}
    for launch in launches:
        name = f"{label} / {launch.kernel.__name__.strip('_')}"
        result = figures(build(launch, part), part)
        if result not in [f for key, f in found.items() if key.startswith(name)]:
            n = sum(key == name or key.startswith(f"{name} #") for key in found)
            found[name if not n else f"{name} #{n + 1}"] = result
    return found


def measure_all(parts=tuple(SHARED_MEMORY), workers: int = 2) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(kernel, part, figures) of everything, two compilers at a time."""
    jobs = [(label, part) for label in cases() for part in parts]
    with ProcessPoolExecutor(workers) as pool:
        for (_, part), found in zip(jobs, pool.map(measure, *zip(*jobs), chunksize=1)):
            for name, result in found.items():
                yield name, part, result


def faults(name: str, part: str, found: dict[str, int], budget: dict[str, int] | None) -> list[str]:
    """Return the faults of one compiled kernel.

    It may be over its budget, spill, use atomics, or have a matmul that bypasses sm_90's tensor cores.
    """
    where = f"{name} on {part}: "
    if budget is None:
        return [where + "no budget; write one with python -m benchmarks.on_gpu.ahead_of_time"]
    # another point release of the compiler moves a few registers; a change of consequence moves many
    slack = {"registers": 8, "spills": 0, "shared": 0}
    wrong = [f"{key}: budget {budget[key]}, found {found[key]}" for key, extra in slack.items() if found[key] > budget[key] + extra]
    atomics = found.get("ATOMG", 0) + found.get("RED", 0)
    if atomics:
        wrong.append(f"{atomics} atomics")
    if part == "sm_90" and found["dots"] and not found["HGMMA"]:
        wrong.append("a product without HGMMA")
    return [where + fault for fault in wrong]


def check_budgets() -> int:
    """Prints what exceeds its budget, and budgets of kernels that are no more; returns how many."""
    budgets, seen, wrong = json.loads(BUDGETS.read_text()), set(), []
    for name, part, found in measure_all():
        seen.add(name)
        wrong += faults(name, part, found, budgets.get(name, {}).get(part))
    wrong += [f"{name}: a budget without a kernel" for name in budgets.keys() - seen]
    print("\n".join(wrong) or f"{len(seen)} kernels within their budgets")
    return len(wrong)


def table(budgets: dict) -> str:
    """Return the budgets as a table: "registers / shared KiB" of every kernel and architecture.

    A cell is empty where launches on an architecture take other forms.
    """
    lines = [["kernel", *SHARED_MEMORY], ["---"] + ["---:"] * len(SHARED_MEMORY)]
    for name, by_part in budgets.items():
        cells = (by_part.get(part) for part in SHARED_MEMORY)
        lines.append([name, *("" if cell is None else f"{cell['registers']} / {cell['shared'] / 1024:.3g}" for cell in cells)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_budgets() -> None:
    """Write the present figures as the budgets that tests hold kernels to.

    Their table in kernels/README.md is renewed too.
    """
    budgets: dict[str, dict[str, dict[str, int]]] = {}
    for name, part, result in measure_all():
        kept = {key: result[key] for key in ("registers", "spills", "shared")}
        budgets.setdefault(name, {})[part] = kept | {key: result[key] for key in ("dots", "HGMMA") if result.get(key)}
    budgets = dict(sorted(budgets.items()))
    # a line for each kernel and part
    text = json.dumps({name: {part: json.dumps(kept) for part, kept in by_part.items()} for name, by_part in budgets.items()}, indent=1)
    BUDGETS.write_text(re.sub(r'"(\{.*?\})"', lambda found: found[1].replace('\\"', '"'), text) + "\n")
    README.write_text(BLOCK.sub(lambda _: table(budgets), README.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with tests/kernels/budgets.json instead of writing it")
    if parser.parse_args().check:
        sys.exit(bool(check_budgets()))
    write_budgets()
