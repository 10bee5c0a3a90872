"""Train one arm on the real model with one seed, and score it; what is done stays done."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.forgetting.job import MAX_EPOCHS
from benchmarks.forgetting.real_model.arms import BASE, KL_WEIGHT, PUBLIC, Arm
from benchmarks.forgetting.real_text_data import precision
from benchmarks.harness.parallel import quietly
from trainer.config import BatchSize, Checkpoint, Config, Data, Items, Logging, Lora, Model, Optim, Replay, Retention
from trainer.evaluate import evaluate
from trainer.evaluation import config as evaluation
from trainer.files import atomic_file
from trainer.run import train

MLP = ["gate_proj", "up_proj", "down_proj"]
NUMBER = {"metric": "regex", "regex": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "answer_regex": r"#### (-?[0-9.,]+)", "take": "last"}


@dataclass(frozen=True)
class Size:
    """Sizes of data, training and scoring."""

    domain_rows: int = 1000
    instructions: int = 600  # that the base is sampled for; as many public chats
    answer_tokens: int = 512  # longest response in the pool
    steps: int = 108
    tokens: int = 4096  # a step
    pack: int = 2048  # tokens of a pack, and of the longest chat
    learning_rate: float = 5e-4
    choices: int = 200  # items of each suite of choices
    suites: tuple[str, ...] = ("arc_easy", "arc_challenge", "piqa", "openbookqa", "commonsense_qa", "winogrande", "boolq")
    words: int = 300  # items of LAMBADA
    rules: int = 200  # prompts of IFEval
    rules_tokens: int = 400  # longest answer to them
    public: int = 200  # held-out public chats
    problems: int = 200  # of the domain
    problem_tokens: int = 256
    mini: bool = True  # score the mini suite too


QUICK = Size(domain_rows=500, instructions=200, answer_tokens=192, steps=24, tokens=2048, pack=1024, choices=60,
             suites=("arc_easy", "piqa", "openbookqa"), words=60, rules=48, rules_tokens=192, public=40, problems=40, problem_tokens=160,
             mini=False)


@dataclass(frozen=True)
class Study:
    """The base and the files that all jobs share."""

    base: str  # folder or hub name
    size: Size
    work: Path
    domain: str  # name of the domain
    suites: str | None = None  # folder with files of suites; None: the hub

    @property
    def base_scores(self) -> Path:
        return self.work / BASE / "scores"


@dataclass(frozen=True)
class Job:
    """One arm with one seed, or with `arm` None the base."""

    study: Study
    arm: Arm | None
    seed: int = 0

    @property
    def folder(self) -> Path:
        if self.arm is None:
            return self.study.work / BASE
        return self.study.work / f"seed {self.seed}" / self.arm.name.replace("/", " of ")

    @property
    def outcome(self) -> Path:
        return self.folder / "outcome.json"


def run(job: Job) -> dict:
    """Return the outcome of a job: read it where an earlier sitting finished it, else train and score.

    A job that was stopped goes on with its checkpoint, or with its trained adapter.
    """
    if job.outcome.is_file():
        return json.loads(job.outcome.read_text(encoding="utf-8"))
    seconds = {"training": 0.0}
    with quietly(job.folder / "log.txt"):
        if job.arm is not None and not (job.folder / "run" / "adapter" / "adapter_model.safetensors").is_file():
            begun = time.process_time()
            if train(recipe(job)).signal:  # its checkpoint is saved
                raise KeyboardInterrupt
            seconds["training"] = time.process_time() - begun
        begun = time.process_time()
        shutil.rmtree(job.folder / "scores", ignore_errors=True)
        results = evaluate(scoring(job))
        seconds["scoring"] = time.process_time() - begun
    outcome = {"arm": job.arm.name if job.arm else BASE, "seed": job.seed, "cpu_seconds": seconds, "roles": results["roles"],
               "files": {file["name"]: {key: value for key, value in file.items() if key != "path"} for file in results["files"]}}
    with atomic_file(job.outcome) as tmp:
        tmp.write_text(json.dumps(outcome), encoding="utf-8")
    return outcome


def recipe(job: Job) -> Config:
    """Return the configuration of an arm's run."""
    study, arm, size = job.study, job.arm, job.study.size
    set_file = None if arm.replay is None else f"public {job.seed}.jsonl" if arm.replay == PUBLIC else f"{arm.replay}.jsonl"
    return Config(
        output=str(job.folder / "run"), model=Model(path=study.base),
        lora=Lora(arm.rank, 2.0 * arm.rank, target_modules=MLP if arm.mlp_only else "all-linear"),
        data=Data(train=str(study.work / f"domain {job.seed}.jsonl"), max_length=size.pack, on_overlong="drop",
                  cache_dir=str(study.work / "cache"), num_proc=1),
        replay=Replay(str(study.work / "replay" / set_file), arm.ratio, "tokens") if set_file else Replay(),
        retention=Retention(kl_weight=KL_WEIGHT, kl_sources="all", kl_positions="all") if arm.kl else Retention(),
        batch=BatchSize(tokens_per_pack=size.pack, tokens_per_step=size.tokens), optim=Optim(lr=size.learning_rate * arm.lr_factor),
        epochs=MAX_EPOCHS, max_steps=size.steps, seed=job.seed, precision=precision(), resume="auto",
        checkpoint=Checkpoint(every=20, keep=1), logging=Logging(every=10, tensorboard=False, progress=False))


def scoring(job: Job) -> evaluation.Config:
    """Return the configuration of a job's evaluation; an arm is compared with the base's scores."""
    study, size = job.study, job.study.size
    general = [Items(f"suite:{name}", max_records=size.choices) for name in size.suites]
    general += [Items("suite:lambada_openai", max_records=size.words)] * (size.words > 0)
    general += [Items("suite:ifeval", max_records=size.rules, max_tokens=size.rules_tokens)] * (size.rules > 0)
    general += [Items(str(study.work / "public items.jsonl"), "public", metric="logprob")] * (size.public > 0)
    general += [Items("suite:mini")] * size.mini
    problems = Items(str(study.work / "problems.jsonl"), "problems", max_tokens=size.problem_tokens,
                     **(NUMBER if study.domain == "gsm8k" else {"metric": "logprob"}))
    config = evaluation.Config(
        output=str(job.folder / "scores"), data=evaluation.Data(general=general, domain=[problems], suite_folder=study.suites),
        generation=evaluation.Generation(batch=32), precision=precision())
    if job.arm is None:
        return replace(config, model=Model(path=study.base))
    return replace(config, adapter=str(job.folder / "run" / "adapter"), base=evaluation.Base(results=str(study.base_scores)))
