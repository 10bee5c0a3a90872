"""Do one case of the suite `scale` in a process of its own.

`python -m benchmarks.speed.scale_worker CASE SIZE FOLDER`: the last line of the output is JSON, CPU seconds of each part, and
the peak memory of the process with what it was before the work.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.harness.synthetic_models import byte_pair_encoding, chat_tokenizer, quiet
from synth.config import Config as SynthConfig
from synth.config import Judge, Model, Report, resolve_presets
from synth.pool.store import Pool
from synth.pool.synthesis_run import SynthesisRun
from synth.stages.judge import pin_judge_settings
from synth.stages.report import report
from synth.stages.select import select
from trainer.config import BatchSize, Data
from trainer.config import Model as Evaluated
from trainer.data.chat_template import ChatTemplate
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.sources import load_sources
from trainer.data.step_plan import StepPlan
from trainer.data.tokenize import tokenize
from trainer.evaluate import evaluate
from trainer.evaluation.config import Base, Statistics
from trainer.evaluation.config import Config as EvaluationConfig
from trainer.evaluation.config import Data as Items
from trainer.evaluation.significance import mcnemar
from trainer.metrics.log import keep_records
from trainer.report.run_page import write_report

WORDS = "the a quick brown fox jumps over lazy dogs what is three and four it makes seven how many clips did she sell in April".split()
BASE = str(FAMILY["base"].folder)
JUDGES = ("one", "two")
SAMPLES = 5  # responses to each instruction
EPOCHS = 3


class Parts(dict):
    """CPU seconds of the parts of a case."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the CPU seconds of what runs inside to a part."""
        begun = time.process_time()
        yield
        self[name] = self.get(name, 0.0) + time.process_time() - begun


def texts(count: int, words: int, seed: int) -> Iterator[str]:
    """Yield texts of `words` words."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words))


def write_chats(path: Path, count: int, words: int = 10) -> Path:
    """Write chats of a question and an answer, unless they are there."""
    if not path.exists():
        with path.open("w") as file:
            for n, (question, answer) in enumerate(zip(texts(count, words, 0), texts(count, words, 1))):
                chat = [{"role": "user", "content": f"{question} {n}?"}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": chat}) + "\n")
    return path


def start(parts: Parts, paths: list[Path], folder: Path, max_length: int = 2048) -> None:
    """Read, tokenize and plan chats, as a run does before its first step."""
    template = ChatTemplate(chat_tokenizer(byte_pair_encoding([" ".join(WORDS)] * 20)))
    data = Data(train=[], cache_dir=str(folder / "cache"), num_proc=1, max_length=max_length)
    with parts.part("read"):
        sources = load_sources([str(path) for path in paths], "domain", data.cache_dir)
    with parts.part("tokenize"):
        samples = tokenize(sources, template, data)
    with parts.part("plan"):
        roles = [MixtureSource(name, "domain") for name in samples.names]
        batch = BatchSize(tokens_per_pack=max_length, tokens_per_step=8 * max_length)
        StepPlan(samples.lengths, Mixture(samples.lengths, samples.sources, roles), batch, EPOCHS, None, 0)


def rows(parts: Parts, size: int, folder: Path) -> None:
    """Start a run on many short chats."""
    start(parts, [write_chats(folder / "rows.jsonl", size)], folder)


def document(parts: Parts, size: int, folder: Path) -> None:
    """Start a run on one chat of many words."""
    start(parts, [write_chats(folder / "document.jsonl", 1, size // 2)], folder, max_length=2**22)


def sources_alike(parts: Parts, size: int, folder: Path) -> None:
    """Start a run on many files of one name."""
    paths = [folder / f"shard-{n}" / "data.jsonl" for n in range(size)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    start(parts, [write_chats(path, 1) for path in paths], folder)


def sources_apart(parts: Parts, size: int, folder: Path) -> None:
    """Start a run on many files of different names."""
    start(parts, [write_chats(folder / f"data-{n}.jsonl", 1) for n in range(size)], folder)


def items(parts: Parts, size: int, folder: Path) -> None:
    """Evaluate a model on items of two choices, beside its base."""
    with (folder / "items.jsonl").open("w") as file:
        for n, question in enumerate(texts(size, 5, 0)):
            file.write(json.dumps({"question": f"{question} {n}?", "choices": ["seven", "four"], "answer": n % 2}) + "\n")
    with parts.part("evaluate"):
        evaluate(EvaluationConfig(str(folder / "evaluation"), model=Evaluated(path=BASE), base=Base(path=BASE), device="cpu",
                                  data=Items(general=str(folder / "items.jsonl")), statistics=Statistics()))


def pool(parts: Parts, size: int, folder: Path) -> None:
    """Select from a pool of `size` scores, and report on it."""
    config = resolve_presets(SynthConfig(
        output=str(folder / "pool"), base=Model(path=BASE, name="one"), responders=[Model(path=BASE, name="two")],
        judge=Judge(exclude_self=False), report=Report(embeddings=False)))
    count = size // (2 * SAMPLES * len(JUDGES))
    with Pool(folder / "pool" / "pool.sqlite") as opened:
        run, rng = SynthesisRun(config, opened, lambda line: None), np.random.default_rng(0)
        pin_judge_settings(run)
        with opened.transaction():
            opened.insert("items", ((i, 1.0, 1.0, None, 1) for i in range(count)))
            opened.insert("turns", ((i, 0, text, 8, "stop", -1.0, 0) for i, text in enumerate(texts(count, 8, 0))))
            opened.insert("fresh", ((i, text, 8, "stop", -1.0, 0) for i, text in enumerate(texts(count // 10, 8, 1))))
            opened.insert("traits", ((i, "en", i, 1.0) for i in range(count)))
            keys = [(i, author, sample) for i in range(count) for author in JUDGES for sample in range(SAMPLES)]
            opened.insert("responses", ((*key, text, 8, "stop", None, -8.0, 8, 0, None) for key, text in zip(keys, texts(len(keys), 8, 2))))
            opened.insert("scores", ((*key, judge, float(value), None, None, 0, None) for judge in JUDGES
                                     for key, value in zip(keys, rng.integers(1, 6, size=len(keys)))))
            for stage in ("probe", "instruct", "clean", "respond", "judge"):
                opened.set(f"done.{stage}", True)
        del keys
    with Pool(folder / "pool" / "pool.sqlite") as opened:
        run = SynthesisRun(config, opened, lambda line: None)
        with parts.part("select"):
            select(run)
        with parts.part("report"):
            report(run)


def metrics(parts: Parts, size: int, folder: Path) -> None:
    """Resume a run with a line of figures for each of `size` steps, and report on it."""
    path = folder / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, size + 1):
            file.write(json.dumps({"kind": "step", "step": step, "loss": 1 + 1 / step, "lr": 1e-4, "grad_norm": 1.0, "tokens": 4096,
                                   "supervised": 2048, "tokens_per_s": 9e3, "supervised_per_s": 4e3, "mfu": None, "memory_gb": 1.0,
                                   "seconds": {"forward": 0.1, "backward": 0.2}, "time": 1e9 + step}) + "\n")
    with parts.part("resume"):
        keep_records(path, size)
    with parts.part("report"):
        write_report(folder)


def mcnemar_tail(parts: Parts, size: int, folder: Path) -> None:
    """Compute the exact p-value of `size` lost and three more gained items."""
    with parts.part("p-value"):
        mcnemar(size, size + 3)


CASES: dict[str, Callable[[Parts, int, Path], None]] = {
    case.__name__: case for case in (rows, document, sources_alike, sources_apart, items, pool, metrics, mcnemar_tail)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    name, size, folder = sys.argv[1:]
    quiet()
    before, parts = peak_mib(), Parts()
    CASES[name](parts, int(size), Path(folder))
    print("\n" + json.dumps({"seconds": parts, "peak_mib": peak_mib(), "before_mib": before}))


if __name__ == "__main__":
    main()
