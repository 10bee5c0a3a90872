"""Profile steps FIRST to LAST: the costliest operations, and the host's waits for the device.

Step FIRST is watched, operation by operation. Every operation that hands a device value to the host (`.item()`, `bool(t)`, `.tolist()`,
a blocking copy) or makes a size depend on values (`nonzero`, a boolean index) is counted under the line of code that called it. A CPU run
counts the waits that a GPU run would have; on a GPU torch's sync debug mode counts them a second time, independently. Watching is slow, so
torch.profiler traces the steps after FIRST, to LAST. (Both slow the run: ignore the rates in log lines around these steps.)

The run folder gets profile/trace.json.gz, for Perfetto or chrome://tracing, and profile/summary.txt, which is also printed: the ten
costliest operations, and every wait.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.errors import UserError
from trainer.metrics.timers import Phases, synchronize

COSTLIEST = 10
OURS = ("trainer", "kernels", "benchmarks", "tests")  # packages whose lines are reported
READS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.cpu: "cpu"}  # on a CPU these dispatch no operation
SYNC_WARNING = "called a synchronizing"  # start of the warnings of torch's sync debug mode


# ---------------------------------------------------------------- waits of the host


def waits_for_device(func, args: tuple, kwargs: dict) -> bool:
    """Return whether the host must wait for the device before this aten operation returns."""
    base, tensors = func.overloadpacket, [a for a in args if isinstance(a, Tensor)]
    if base in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if base in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
        target = kwargs.get("device") if base is torch.ops.aten._to_copy else args[0].device
        crosses = target is not None and torch.device(target).type != tensors[-1].device.type
        return crosses and not (kwargs.get("non_blocking") or (base is torch.ops.aten.copy_ and args[2:3] == (True,)))
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def any_on(device: torch.device, values) -> bool:
    """Return whether any of the values is a tensor on this kind of device."""
    return any(isinstance(v, Tensor) and v.device.type == device.type for v in values)


def calling_line() -> str:
    """Return the innermost running line of our packages, else the innermost outside torch."""
    frame, other = sys._getframe(1), None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__:
            here = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
            if module.split(".")[0] in OURS:
                return f"{module.rpartition('.')[0].replace('.', '/')}/{here}".lstrip("/")
            if other is None and module.split(".")[0] != "torch":
                other = here
        frame = frame.f_back
    return other or "unknown"


class HostWaits(TorchDispatchMode):
    """Counter of waits, by operation and calling line, of everything that runs inside `watching`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.found, self.by_torch = device, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits_for_device(func, args, kwargs) and any_on(self.device, args):
            self.found[str(func), calling_line()] += 1
        return func(*args, **kwargs)

    @contextmanager
    def watching(self) -> Iterator[HostWaits]:
        """Count inside this context."""
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(self._sync_debug())
            else:
                stack.enter_context(HostReads(self))
            stack.enter_context(self)
            yield self

    @contextmanager
    def _sync_debug(self):
        """Count the warnings of torch's sync debug mode."""
        def count_sync(message, *_, **__) -> None:
            if str(message).startswith(SYNC_WARNING):
                self.by_torch += 1

        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = count_sync
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)


class HostReads(TorchFunctionMode):
    """Counter of a CPU tensor's `.tolist()`, `.numpy()` and `.cpu()`.

    They dispatch no operation on a CPU, but would wait for a GPU.
    """


    def __init__(self, counter: HostWaits):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if name := READS.get(func):
            self.counter.found[name, calling_line()] += 1
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- steps of a run


class Profile:
    """Watcher of step `steps[0]` and tracer of the others, driven by calls of `step_done`."""

    def __init__(self, steps: range, folder: Path, device: torch.device, phases: Phases):
        self.steps, self.folder, self.device, self.phases = steps, folder / "profile", device, phases
        self.waits = HostWaits(device)
        self.watch: ExitStack | None = None  # while step `steps[0]` runs
        self.tracer: torch.profiler.profile | None = None  # while the others run
        self.traced = 0  # steps

    def step_done(self, done: int) -> None:
        """Stop or start watching and tracing, now that `done` steps of the run are done."""
        self._end(done)
        if done + 1 == self.steps[0]:
            self.watch = ExitStack()
            self.watch.enter_context(self.waits.watching())
        elif done == self.steps[0]:
            self._trace()

    def _trace(self) -> None:
        """Start torch.profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        synchronize(self.device)
        self.tracer = torch.profiler.profile(activities=activities)
        self.tracer.start()
        self.phases.label = torch.profiler.record_function

    def _end(self, done: int) -> None:
        """Stop watching, and tracing after the last step."""
        if self.watch:
            self.watch.close()
            self.watch = None
        if self.tracer:
            self.traced = done - self.steps[0]
            if done >= self.steps[-1]:
                self.close()

    def close(self) -> None:
        """Write the steps traced so far, even if the run ended before the last one."""
        if self.watch:
            self.watch.close()
            self.watch = None
        if self.tracer:
            synchronize(self.device)
            self.tracer.stop()
            self.phases.label = nullcontext
            if self.traced:
                self._write()
            self.tracer = None

    def _write(self) -> None:
        """Write the trace and the summary, and print the summary."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tracer.export_chrome_trace(str(self.folder / "trace.json.gz"))
        text = summary(self.tracer.key_averages(), self.traced, self.waits, self.steps[0])
        (self.folder / "summary.txt").write_text(text)
        print(f"{text}trace: {self.folder / 'trace.json.gz'}", flush=True)


@contextmanager
def profiling(steps: range | None, folder: Path, device: torch.device, phases: Phases, done: int) -> Iterator[Callable[[int], None]]:
    """Yield the function to call after each step with the number of steps done; a no-op without `steps`."""
    if steps is None:
        yield lambda done: None
        return
    if done >= steps[0]:
        print(f"profile: nothing is profiled: step {steps[0]} was done before this start, which resumes from step {done}", flush=True)
    profile = Profile(steps, folder, device, phases)
    profile.step_done(done)
    try:
        yield profile.step_done
    finally:
        profile.close()


def check_steps_within(steps: range | None, total: int) -> None:
    """Check that a run of `total` steps has the steps to profile. Raises UserError."""
    if steps is not None and steps[-1] > total:
        raise UserError(f"logging.profile_steps: expected steps of this run, which has {total}, got {steps[0]}-{steps[-1]}")


# ---------------------------------------------------------------- summary


def summary(averages: list, steps: int, found: HostWaits, watched: int) -> str:
    """Return the summary: the costliest operations by their own time on the device, then every wait."""
    cuda = found.device.type == "cuda"

    def own(event) -> float:
        """Return the event's own time in µs."""
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    total = sum(own(e) for e in averages) or 1.0
    lines = [f"profile: {steps} steps, {total / steps / 1e3:.2f} ms a step on the {'GPU' if cuda else 'CPU'}; the {COSTLIEST} costliest "
             "operations by their own time:", f"{'operation':<52}{'ms a step':>10}{'share':>8}{'calls a step':>14}"]
    for event in sorted(averages, key=own, reverse=True)[:COSTLIEST]:
        name = event.key + (", outside any operation" if event.is_user_annotation else "")
        lines.append(f"{name[:50]:<52}{own(event) / steps / 1e3:>10.3f}{own(event) / total:>8.1%}{event.count / steps:>14.1f}")
    runtime = [e for e in averages if "Synchronize" in e.key]
    lines += [f"{e.key[:50]:<52}{e.cpu_time_total / steps / 1e3:>10.3f}{'':>8}{e.count / steps:>14.1f}" for e in runtime]
    return "\n".join(lines + wait_lines(found, watched)) + "\n"


def wait_lines(found: HostWaits, watched: int) -> list[str]:
    """Return the lines of the summary about step `watched`."""
    cuda = found.device.type == "cuda"
    waits: Counter[tuple[str, str]] = Counter()
    cpu_only = 0
    for (operation, line), count in found.found.items():
        if not cuda and line.startswith("kernels/"):
            cpu_only += count
        else:
            waits[operation, line] += count
    qualifier = f" (torch's sync debug mode counts {found.by_torch})" if cuda else ", had the tensors been on a GPU"
    lines = [f"step {watched}: the host waits for the device {waits.total()} times{qualifier}{':' if waits else ''}"]
    lines += [f"{count:>6}  {operation:<44}  {line}" for (operation, line), count in waits.most_common()]
    if cpu_only:
        lines.append(f"{cpu_only:>6}  reads in the CPU versions of kernels/, which a GPU does not run")
    return lines
