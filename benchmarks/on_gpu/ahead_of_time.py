"""Compile every kernel for GPUs that are not here, and check the results against budgets.

A kernel file lists its launches in `AOT`: functions that call its real launchers on tensors of device "meta". Each is recorded as if on the
GPU architecture in question, with its own launch settings, and compiled with the type, value-is-1 and divisible-by-16 specialisations
that a launch on the device would make. Registers, spills, shared memory and machine instructions are read from the result. The compilers
and disassemblers come with Triton; kernels that are to be compiled must not have been made for the interpreter, so this needs a process
without TRITON_INTERPRET.

Each minor version of Triton that we pin, one for CPUs and one for CUDA, has its own budgets. Beside them stand digests of what they were
compiled from: sources, types, settings, architecture and Triton's version. Machine code follows from these, so that a check compiles only
the cases whose digest is another one.
"""

import argparse
import hashlib
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels._launch import SHARED_MEMORY, Recorded, recording, triton

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "kernels" / "budgets"
PINS = [re.search(r"^triton==(\d+\.\d+)", (ROOT / f"requirements-{build}.txt").read_text(), re.MULTILINE)[1] for build in ("cpu", "cuda")]
INSTALLED = re.match(r"\d+\.\d+", triton.__version__)[0]
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


def compiler_input(launch: Recorded, part: str) -> dict[str, Any]:
    """Return the arguments of `triton.compile` for one recorded launch."""
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
    return dict(src=ASTSource(launch.kernel, types, constants, hints), target=target, options=options)


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


def launches_of(label: str, part: str) -> list[Recorded]:
    """Return the launches of one case on one architecture."""
    with recording(part) as launches:
        cases()[label]()
    assert launches, f"{label}: its AOT case launches nothing"
    return launches


def measure(label: str, part: str) -> dict[str, dict[str, int]]:
    """Return the figures of every kernel that one case launches on one architecture.

    They are keyed "label / kernel", numbered where a kernel is launched in several forms.
    """
    found: dict[str, dict[str, int]] = {}
    read: dict[str, dict[str, int]] = {}  # by the compiled kernel's hash
    for launch in launches_of(label, part):
        name = f"{label} / {launch.kernel.__name__.strip('_')}"
        compiled = triton.compile(**compiler_input(launch, part))
        if compiled.hash not in read:
            read[compiled.hash] = figures(compiled, part)
        result = read[compiled.hash]
        if result not in [f for key, f in found.items() if key.startswith(name)]:
            n = sum(key == name or key.startswith(f"{name} #") for key in found)
            found[name if not n else f"{name} #{n + 1}"] = result
    return found


def measure_all(jobs: Sequence[tuple[str, str]], workers: int = 2) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(kernel, part, figures) of these cases on these parts, two compilers at a time."""
    with ProcessPoolExecutor(workers) as pool:
        for (_, part), found in zip(jobs, pool.map(measure, [label for label, _ in jobs], [part for _, part in jobs], chunksize=1)):
            for name, result in found.items():
                yield name, part, result


def digest(label: str, part: str) -> str:
    """Return a digest of all that the machine code of one case on one architecture follows from."""
    whole = hashlib.sha256(triton.__version__.encode())
    for launch in launches_of(label, part):
        given = compiler_input(launch, part)
        whole.update(f"{given['src'].hash()} {given['target']} {given['options']}".encode())
    return whole.hexdigest()[:16]


def digests() -> dict[str, dict[str, str]]:
    """Return the digest of every case on every architecture.

    Where in its file a kernel stands is no part of it.
    """
    labels = cases()  # imports every kernel file
    for module in (module for name, module in sys.modules.items() if name.startswith("kernels.")):
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction):
                value.starting_line_number = 0
    return {label: {part: digest(label, part) for part in SHARED_MEMORY} for label in labels}


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


def budgets_file(version: str = INSTALLED) -> Path:
    """Return the file of the budgets under a minor version of Triton."""
    return FOLDER / f"triton-{version}.json"


def digests_file(version: str = INSTALLED) -> Path:
    """Return the file of the digests that belong to the budgets."""
    return FOLDER / f"triton-{version}-digests.json"


def read(file: Path) -> dict:
    """Return what a file of budgets or digests holds; nothing where there is none yet."""
    return json.loads(file.read_text()) if file.is_file() else {}


def check_budgets(compiled: Collection[str] = ()) -> int:
    """Prints what exceeds its budget, and budgets of kernels that are no more; returns how many.

    It compiles the cases that were changed since the budgets were written, and those named in `compiled`.
    """
    budgets, written, now = read(budgets_file()), read(digests_file()), digests()
    jobs = [(label, part) for label, by_part in now.items() for part, found in by_part.items()
            if label in compiled or written.get(label, {}).get(part) != found]
    seen, wrong = set(), []
    for name, part, found in measure_all(jobs):
        seen.add(name)
        wrong += faults(name, part, found, budgets.get(name, {}).get(part))
    again = {label for label in now if all((label, part) in jobs for part in SHARED_MEMORY)}
    wrong += [f"{name}: a budget without a kernel" for name in budgets
              if name not in seen and (name.split(" / ")[0] in again or name.split(" / ")[0] not in now)]
    print("\n".join(wrong) or f"{len(budgets)} kernels within their budgets; compiled {len(jobs)} of {len(now) * len(SHARED_MEMORY)} cases")
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


def write_budgets(compiled: Collection[str] = ()) -> None:
    """Write the present figures as the budgets that tests hold kernels to.

    It compiles the cases that were changed since the budgets were written, and those named in `compiled`. The table of the budgets in
    kernels/README.md, which is that of the first pin, is renewed too.
    """
    written, now = read(digests_file()), digests()
    changed = [label for label in now if label in compiled or written.get(label) != now[label]]
    budgets: dict[str, dict[str, dict[str, int]]] = {
        name: by_part for name, by_part in read(budgets_file()).items()
        if (label := name.split(" / ")[0]) in now and label not in changed}
    for name, part, result in measure_all([(label, part) for label in changed for part in SHARED_MEMORY]):
        kept = {key: result[key] for key in ("registers", "spills", "shared")}
        budgets.setdefault(name, {})[part] = kept | {key: result[key] for key in ("dots", "HGMMA") if result.get(key)}
    budgets = dict(sorted(budgets.items()))
    # a line for each kernel and part
    text = json.dumps({name: {part: json.dumps(kept) for part, kept in by_part.items()} for name, by_part in budgets.items()}, indent=1)
    budgets_file().write_text(re.sub(r'"(\{.*?\})"', lambda found: found[1].replace('\\"', '"'), text) + "\n")
    digests_file().write_text(json.dumps(now, indent=1) + "\n")
    if INSTALLED == PINS[0]:
        README.write_text(BLOCK.sub(lambda _: table(budgets), README.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with tests/kernels/budgets instead of writing there")
    parser.add_argument("--compile", nargs="+", default=[], metavar="CASE", choices=["all", *cases()],
                        help="cases to compile though unchanged since the budgets were written, or all")
    given = parser.parse_args()
    if INSTALLED not in PINS:
        parser.error(f"expected a Triton with budgets, {' or '.join(PINS)}, found {triton.__version__}; install one of them")
    compiled = cases() if "all" in given.compile else given.compile
    if given.check:
        sys.exit(bool(check_budgets(compiled)))
    write_budgets(compiled)
