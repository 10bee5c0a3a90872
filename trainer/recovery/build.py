"""Build a recovery: model, prompts, domain, and a training run whose steps come round by round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer import config as training
from trainer.data.chat_template import ChatTemplate
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.prepare import TrainingData, data_summary
from trainer.data.samples import Samples
from trainer.data.sources import load_sources
from trainer.data.step_plan import StepPlan, hash_seed
from trainer.data.tokenize import tokenize
from trainer.evaluation.items import ItemFile
from trainer.evaluation.models import LoadedModel
from trainer.metrics.log import Log
from trainer.metrics.throughput import model_size
from trainer.model.forward import padding_for
from trainer.model.loading import weights_fingerprint
from trainer.model.patch import PatchReport
from trainer.model.saved_adapter import adapter_digest
from trainer.on_policy import answers
from trainer.on_policy.engines import InMemory, Vllm
from trainer.on_policy.responder import Responder
from trainer.recovery.config import Recover
from trainer.recovery.goal import Goal, goal_of
from trainer.recovery.prompts import Prompts, read_prompts
from trainer.recovery.rounds import RoundLoader, RoundPlan
from trainer.retention import kl, monitor
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed
from trainer.training import run_folder
from trainer.training.build import build_model, build_optimizer, load_or_start, print_lines, print_summary
from trainer.training.export_trial import try_export
from trainer.training.loader import StepLoader
from trainer.training.training_run import TrainingRun

REMEDY = "give more rounds, other prompts, a higher lr, or a lower share"
DOMAIN = -1  # in place of a round's number: the domain's own answers


def build(config: Recover, options: training.Config, items: list[ItemFile], device: torch.device, dist: Distributed,
          tokenizer: PreTrainedTokenizerBase, resources: ExitStack) -> tuple[TrainingRun, checkpoint.State]:
    """Return a run that is ready for its next step, and the state it starts from.

    `options` are those of `config` as a run has them. `resources` closes what is opened. Raises UserError for anything that the user can
    mend.
    """
    output = Path(config.output)
    template = ChatTemplate(tokenizer)
    longest = config.batch.tokens_per_pack
    model, patched = build_model(options, device)
    context = LoadedModel("model", "", model, template).context
    longest = min(longest, context or longest)
    prompts = read_prompts("prompts", config.prompts, template, longest - 1)
    asked = read_prompts("domain", config.domain, template, longest - 1)
    ended = config.resume != "never" and checkpoint.has_ended(checkpoint.newest(output / "checkpoints"))
    try_export(options, model, tokenizer, ended)
    identity = checkpoint.identity(
        options, dist.size, prompts=prompts.fingerprint, asked=asked.fingerprint, items=monitor.fingerprint(items),
        base_weights=weights_fingerprint(options.model), adapter=adapter_digest(Path(options.lora.path)), answers=str(config.answers),
        engine=config.engine, scale=str(config.scale))
    forgetting = (monitor.unscored if ended else partial(monitor.prepare, dist=dist))(options, items, model, template)
    forgetting.remedy = REMEDY
    if config.resume == "never" or checkpoint.newest(output / "checkpoints") is None:
        shutil.rmtree(output / "rounds", ignore_errors=True)  # of a run that never came to its first checkpoint
    engine = InMemory(model, template) if ended or config.engine == "transformers" else Vllm(options, model, template, device, output)
    responder = Responder(resources.enter_context(closing(engine)), output / "rounds", config.max_tokens, longest, config.seed, tokenizer)
    domain, lines = domain_samples(options, template, asked, responder)
    goal = Goal(config.floor, None) if ended else goal_of(forgetting)
    scale_update(model, config.scale)
    kl_to_base = kl.prepare(options.retention, model, ["domain"] * len(domain.names) + ["replay"])
    optimizer = build_optimizer(options, model, dist)
    state = load_or_start(output, config.resume, identity, optimizer, dist)
    plan, pad_to = RoundPlan(config.rounds, config.steps, config.batch), padding_for(model)

    def load_round(samples: Samples, steps: StepPlan) -> StepLoader:
        return StepLoader(steps, samples, dist, device, kl_to_base, pad_to)

    loader = RoundLoader(plan, domain, partial(round_loader, config, prompts, domain, responder, load_round), state, goal)
    run = TrainingRun(options, output, device, dist, model, model_size(model), optimizer, plan, loader, kl_to_base, forgetting)
    if not state.ended:
        open_output(config, run, state, patched, template, [
            f"recovery: at most {config.rounds} rounds of {config.steps} steps, each on {config.answers:,} answers to {len(prompts.ids):,} "
            "prompts" + (f"; {prompts.too_long:,} longer prompts are left out" if prompts.too_long else ""), *lines])
    return run, state


def open_output(config: Recover, run: TrainingRun, state: checkpoint.State, patched: PatchReport, template: ChatTemplate,
                lines: list[str]) -> None:
    """Open the output folder and log, draw the next round's answers, and print what is trained on."""
    forget_rounds_after(run.folder / "rounds", state.step // config.steps)
    first = run.loader.open_round(min(state.step // config.steps, config.rounds - 1))
    data = TrainingData(first.samples, first.plan.mixture, first.plan, template, None, [])
    summary = data_summary(data, run.config) | {
        "model": {"path": run.config.model.path, "family": patched.family, "parameters": run.size.parameters,
                  "trainable": run.size.trainable},
        "backends": patched.backends}
    open_folder = partial(run_folder.open_run, run.folder, config, summary, fresh=not state.step)
    open_folder()
    print_summary(run.config, data, summary, patched, first.pad_to, run.device)
    print_lines(lines + ([f"adapter: scaled by {config.scale:g} before the first round"] if config.scale < 1 else [])
                + run.monitor.describe() + ([f"resuming from step {state.step}"] if state.step else []))
    run.log = Log(run.folder, run.config, run.plan.total, state.step, open_folder)


@torch.no_grad()
def scale_update(model: nn.Module, scale: float) -> None:
    """Multiply what the adapter adds to its layers by `scale`; what trains beside it stays."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in ("lora_B", "lora_embedding_B"):
                for parameter in getattr(layer, name).parameters():
                    parameter.mul_(scale)


def domain_samples(options: training.Config, template: ChatTemplate, asked: Prompts, responder: Responder) -> tuple[Samples, list[str]]:
    """Return the domain's samples, and the console line on them, if any.

    They are its chats; where none has an answer, the answers of the model as it is now: the adapter as it came.
    """
    if asked.answered:
        return tokenize(load_sources(options.data.train, "domain"), template, options.data), []
    return answers.as_samples("domain", responder.answer("domain", asked.ids, DOMAIN)), [
        f"domain: its {len(asked.ids):,} prompts have no answers; those of the adapter, as it came, are held to"]


def round_loader(config: Recover, prompts: Prompts, domain: Samples, responder: Responder,
                 load: Callable[[Samples, StepPlan], StepLoader], number: int) -> StepLoader:
    """Return the loader of the steps of a round, counted from 0.

    Its answers are drawn now, unless an earlier start of the round did so.
    """
    order = np.random.default_rng([config.seed, 2]).permutation(len(prompts.ids))
    count = min(config.answers, len(prompts.ids))
    chosen = [prompts.ids[order[i % len(order)]] for i in range(number * count, (number + 1) * count)]
    samples = domain.beside(answers.as_samples("answers", responder.answer(f"round-{number + 1:04d}", chosen, number)))
    parts = [*(MixtureSource(name, "domain") for name in domain.names), MixtureSource("answers", "replay")]
    seed = hash_seed(config.seed, number)
    mixture = Mixture(samples.lengths, samples.sources, parts, 1 - config.share, "samples", seed)
    return load(samples, StepPlan(samples.lengths, mixture, config.batch, config.steps, config.steps, seed))


def forget_rounds_after(folder: Path, number: int) -> None:
    """Remove the answers of rounds after this one, counted from 0, whose weights are gone."""
    for path in folder.glob("round-*"):
        if int(path.name.removeprefix("round-").partition(".")[0]) > number + 1:
            path.unlink()
