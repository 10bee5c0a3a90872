"""Training throughput on a CPU: Steadfast against a plain Hugging Face loop, its best forms and TRL, in real tokens per CPU-second.

The setting: a Llama of 7.15 M parameters with random weights (width 256, 4 layers, vocabulary 8,192; with `--model 100m` one of 101 M:
width 768, 14 layers), LoRA of rank 16 on all linear layers (`--adapter qlora`: on a base in 4 bits; `--adapter full`: all weights trained),
AdamW, 500 chats with a mean of 122 tokens of which 45% are supervised, about a thousand tokens a step, one thread. The chats' lengths are
long-tailed, as those of real sets are; with `--data` they are a real set's own; with `--lengths equal` all are alike, so that nothing is
gained by packing. Every line starts from the same weights and adapter and sees the same tokens, and before anything is timed its losses are
compared with Steadfast's, step by step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from datasets.utils import logging as datasets_logging
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from benchmarks.harness import record, timing
from benchmarks.harness.costs import STEPS as COST_STEPS
from benchmarks.harness.costs import Costs, step_costs
from benchmarks.harness.timing import Line, Samples, StepResult, counted
from benchmarks.speed.baselines import (
    PlainLoop,
    Trl,
    checkpointed,
    compiled,
    grouped_loop,
    load_stock,
    missing,
    packed_batches,
    packed_loop,
    padded_batches,
    padded_loop,
)
from trainer import config as options
from trainer.data.batch import collate, pad_batch
from trainer.data.prepare import prepare_data
from trainer.data.samples import Piece
from trainer.errors import UserError
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases
from trainer.runtime.device import fast_bf16
from trainer.runtime.distributed import Distributed
from trainer.training.build import build
from trainer.training.loader import StepWork, TokenCounts
from trainer.training.loop import train_step

VOCABULARY, CHATS, BATCH, TOKENS_PER_STEP, RANK, LEARNING_RATE = 8192, 500, 8, 1024, 16, 2e-4
PROMPT_TOKENS, ANSWER_TOKENS, LOG_SPREAD = 62, 54, 0.8  # means of the two log-normal lengths, and the deviation of their logarithms
SPECIAL = ["<s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
AGREEMENT_STEPS = 20
MODELS = {
    "7m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12, "num_key_value_heads": 4},
}
ADAPTERS = {"lora": f"LoRA, rank {RANK}, all linear layers", "qlora": f"LoRA, rank {RANK}, on a base in NF4", "full": "all weights trained"}
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of losses, at most


# ---------------------------------------------------------------- the setting


@dataclass
class Setting:
    """A folder with model/, adapter/ and chats.jsonl, and the chats as tokens."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    samples: Samples
    data: str  # where the chats come from, in words
    adapter: str = "lora"  # of ADAPTERS


def make_setting(folder: Path, data: Path | None, lengths: str = "tailed", model: str = "7m", seed: int = 0,
                 adapter: str = "lora") -> Setting:
    """Write the model, the adapter that every line starts from, and the chats; tokenize the chats independently of the trainer."""
    if data is None:
        chats, name = synthetic_chats(seed, lengths), "synthetic, " + {"tailed": "log-normal lengths", "equal": "equal lengths"}[lengths]
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + ["user", "assistant"] + words())}, unk_token="<s>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.add_special_tokens(SPECIAL)
    else:
        chats, texts = real_chats(data, seed)
        name = f"{CHATS} of {data.name}"
        core = byte_pair_encoding(texts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="<|im_end|>",
                                        chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder / "model")
    save_model(folder, model, seed)
    lines = (json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) for q, a in chats)
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return Setting(folder, tokenizer, [tokenized(tokenizer, *chat) for chat in chats], name, adapter)


def words() -> list[str]:
    return [f"w{i}" for i in range(VOCABULARY - len(SPECIAL) - 2)]


def synthetic_chats(seed: int, lengths: str = "tailed") -> list[tuple[str, str]]:
    """Prompts and answers of random words: lengths are the quantiles of two log-normal distributions, paired at random, or all the mean."""
    rng, vocabulary = np.random.default_rng(seed), np.array(words())
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / CHATS) for i in range(CHATS)])
    factor = np.exp(LOG_SPREAD * normal - LOG_SPREAD**2 / 2) if lengths == "tailed" else np.ones(CHATS)  # of mean 1

    def texts(mean: float) -> list[str]:
        lengths = np.maximum(1, (mean * rng.permutation(factor)).round().astype(int))
        return [" ".join(rng.choice(vocabulary, n)) for n in lengths]

    return list(zip(texts(PROMPT_TOKENS), texts(ANSWER_TOKENS), strict=True))


def real_chats(path: Path, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """A random choice of (question, answer) from JSON lines, and the texts of all lines."""
    if not path.is_file():
        raise UserError(f"--data: expected a JSONL file with question and answer, found no file {path}")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [(row["question"], row["answer"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data: expected JSON lines with question and answer in {path}, found otherwise ({error})") from None
    if len(pairs) < CHATS:
        raise UserError(f"--data: expected at least {CHATS} lines in {path}, found {len(pairs)}")
    chosen = np.random.default_rng(seed).choice(len(pairs), CHATS, replace=False)
    return [pairs[i] for i in chosen], [text for pair in pairs for text in pair]


def byte_pair_encoding(texts: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    return core


def save_model(folder: Path, size: str = "7m", seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        **MODELS[size], vocab_size=VOCABULARY, max_position_embeddings=2048, bos_token_id=0, pad_token_id=1, eos_token_id=3,
        use_cache=False))
    model.save_pretrained(folder / "model")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")


def tokenized(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """TEMPLATE in three pieces, of which the middle one is supervised: input_ids int32[L], supervised bool[L]."""
    pieces = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>", "\n"
    ids = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    return np.array(sum(ids, []), np.int32), np.repeat([False, True, False], [len(piece) for piece in ids])


# ---------------------------------------------------------------- the lines


class Steadfast:
    """The trainer's own step on the trainer's own plan of packs: what `python -m trainer.run` does between two log lines."""

    def __init__(self, setting: Setting, precision: str, steps: int):
        self.begin(setting, run_options(setting, precision, steps))

    def begin(self, setting: Setting, config: options.Config) -> None:
        self.config, inputs = config, prepare_data(config, setting.tokenizer)
        begun = time.process_time()
        with redirect_stdout(StringIO()):
            self.run, _ = build(config, inputs, torch.device("cpu"), Distributed())
        self.seconds = time.process_time() - begun  # CPU time that it took to build
        self.samples, self.phases = self.run.loader.samples, Phases(self.run.device)
        self.run.model.train()
        self.works = self.run.loader.prefetch(0, self.phases)

    def step(self) -> StepResult:
        work = next(self.works)
        loss = train_step(self.run, work, self.phases).loss
        done = work.counts
        flops = self.run.size.flops(done.tokens, done.supervised, done.squared_lengths)
        padding = sum(len(batch.input_ids) for batch in work.batches) - done.tokens
        return StepResult(loss.item(), done.tokens, done.supervised, padding, flops)

    def step_on(self, samples: Samples) -> StepResult:
        batch = pad_batch(collate([Piece(ids, supervised) for ids, supervised in samples]), self.run.loader.pad_to, TOKENS_PER_STEP)
        loss = train_step(self.run, StepWork(0, [batch], batch.weight_sum, TokenCounts(), []), self.phases).loss
        return counted(samples, loss.item(), batch.tokens, self.run.size)


def run_options(setting: Setting, precision: str, steps: int) -> options.Config:
    folder = setting.folder
    return options.Config(
        output=tempfile.mkdtemp(prefix="run-", dir=folder),
        model=options.Model(path=str(folder / "model")), method=setting.adapter,
        lora=options.Lora() if setting.adapter == "full" else options.Lora(path=str(folder / "adapter")),
        data=options.Data(train=str(folder / "chats.jsonl"), max_length=TOKENS_PER_STEP, cache_dir=str(folder / "cache"), num_proc=1),
        batch=options.BatchSize(tokens_per_pack=TOKENS_PER_STEP, tokens_per_step=TOKENS_PER_STEP),
        optim=options.Optim(lr=LEARNING_RATE, lr_scheduler="constant", warmup_ratio=0.0, weight_decay=0.0), epochs=steps, max_steps=steps,
        precision=precision, device="cpu", logging=options.Logging(tensorboard=False, progress=False))


def plain_loop(setting: Setting) -> PlainLoop:
    return padded_loop(stock(setting), setting.samples, setting.tokenizer.pad_token_id, BATCH, LEARNING_RATE)


def grouped(setting: Setting) -> PlainLoop:
    return grouped_loop(stock(setting), setting.samples, setting.tokenizer.pad_token_id, BATCH, LEARNING_RATE)


def packed(setting: Setting) -> PlainLoop:
    return packed_loop(stock(setting), setting.samples, TOKENS_PER_STEP, LEARNING_RATE)


def trl(setting: Setting, batches: dict) -> Trl:
    return Trl(stock(setting), setting.samples, setting.tokenizer, batches | {"learning_rate": LEARNING_RATE, "max_grad_norm": 1.0})


def stock(setting: Setting) -> nn.Module:
    adapter = None if setting.adapter == "full" else setting.folder / "adapter"
    return load_stock(setting.folder / "model", adapter, in_4bit=setting.adapter == "qlora")


# ---------------------------------------------------------------- agreement


def check_tokens(setting: Setting) -> None:
    """The trainer's tokens and masks are those that the other lines are given."""
    samples = Steadfast(setting, "fp32", 1).samples
    for i, (ids, supervised) in enumerate(setting.samples):
        if not (np.array_equal(samples[i][0], ids) and np.array_equal(samples[i][1], supervised)):
            raise AssertionError(f"chat {i}: the trainer's tokens or mask differ from the ones the baselines get")


def agreement(setting: Setting, precision: str, other: PlainLoop | Trl, steps: int | None = None) -> float:
    """Largest relative difference between Steadfast's losses and another line's, over steps on the same samples from the same start."""
    steps = steps or AGREEMENT_STEPS
    ours, pairs = Steadfast(setting, precision, steps), []
    for _ in range(steps):
        batch = other.next_batch()
        pairs.append((ours.step_on(other.samples_of(batch)).loss, other.step_on(batch).loss))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    if not worst <= AGREEMENT[precision]:
        raise AssertionError(f"the losses of Steadfast in {precision} and of {type(other).__name__} differ by {worst:.1e}, more than "
                             f"{AGREEMENT[precision]:.0e}; pairs: {pairs}")
    return worst


# ---------------------------------------------------------------- the suite

PLAIN, TRL_PADDED, TRL_PACKED, FP32, BF16 = "plain HF loop", "TRL padded", "TRL packed", "Steadfast fp32", "Steadfast bf16"
BASES = (PLAIN, TRL_PACKED)  # that every table has a ratio to, beside the fastest of all others
COMPILED = "HF loop, torch.compile"
OTHERS: dict[str, Callable[[Setting], PlainLoop | Trl]] = {
    PLAIN: plain_loop,  # batches of 8, as TRL's are
    "HF loop, like lengths": grouped,
    "HF loop, packed": packed,
    COMPILED: lambda setting: compiled(plain_loop(setting)),
    "HF loop, checkpointing": lambda setting: checkpointed(plain_loop(setting)),
    TRL_PADDED: lambda setting: trl(setting, padded_batches(BATCH)),
    TRL_PACKED: lambda setting: trl(setting, packed_batches(TOKENS_PER_STEP)),
}
FOR_GPUS = {"TRL packed, Liger": "liger_kernel", "Unsloth": "unsloth"}  # and the package that each needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="JSONL with question and answer to draw the chats from (default: synthetic chats)")
    parser.add_argument("--lengths", choices=("tailed", "equal"), default="tailed", help="of synthetic chats (default: %(default)s)")
    parser.add_argument("--lines", nargs="+", metavar="NAME", default=list(OTHERS), help="what to measure beside ours, of: " +
                        "; ".join(OTHERS).replace("%", "%%"))
    parser.add_argument("--model", choices=tuple(MODELS), default="7m", help="default: %(default)s; 100m takes far longer a step")
    parser.add_argument("--adapter", choices=tuple(ADAPTERS), default="lora", help="what is trained (default: %(default)s)")
    parser.add_argument("--compared", type=int, default=None, metavar="STEPS",
                        help=f"steps whose losses are compared first (default: {AGREEMENT_STEPS})")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of all lines (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each line in a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    """Check, time and summarise; returns the record."""
    if arguments.rounds < 2 or arguments.steps < 1:
        raise UserError(f"--rounds, --steps: expected at least 2 and 1, got {arguments.rounds} and {arguments.steps}")
    if arguments.compared is not None and arguments.compared < 1:
        raise UserError(f"--compared: expected 1 step or more, got {arguments.compared}")
    if unknown := [name for name in arguments.lines if name not in OTHERS]:
        raise UserError(f"--lines: expected names of {', '.join(OTHERS)}, got {', '.join(unknown)}")
    if arguments.data and arguments.lengths == "equal":
        raise UserError("--lengths equal: a real set's chats have lengths of their own; expected no --data beside it")
    if arguments.adapter == "qlora" and find_spec("bitsandbytes") is None:
        raise UserError("--adapter qlora: expected bitsandbytes, which is not installed; pip install 'bitsandbytes>=0.50'")
    torch.set_num_threads(arguments.threads)
    quiet()
    with tempfile.TemporaryDirectory(prefix="steadfast-benchmark-") as folder:
        setting = make_setting(Path(folder), arguments.data, arguments.lengths, arguments.model, adapter=arguments.adapter)
        check_tokens(setting)
        steps_counted = min(COST_STEPS, arguments.rounds * arguments.steps)
        agreed = {f"{FP32} / {name}": agreement(setting, "fp32", OTHERS[name](setting), arguments.compared)
                  for name in arguments.lines}
        if fast_bf16():
            agreed[f"{BF16} / {PLAIN}"] = agreement(setting, "bf16", plain_loop(setting), arguments.compared)
        lines = make_lines(setting, arguments.lines, steps=2 * (timing.WARMUP + arguments.rounds * arguments.steps) + steps_counted)
        samples = timing.interleave(lines, arguments.rounds, arguments.steps)
        phases = {line.name: shares(line.step.__self__.phases.read()) for line in lines if line.name in (PLAIN, FP32, BF16)}
        costs = {line.name: step_costs(line.step, line.name != COMPILED, steps_counted) for line in lines
                 if samples[line.name][0].tokens and not line.note}
        size = model_size(stock(setting))
    lengths = [len(ids) for ids, _ in setting.samples]
    conditions = {
        "model": f"Llama, {size.parameters - size.trainable * (arguments.adapter != 'full'):,} parameters, random weights",
        "adapter": ADAPTERS[arguments.adapter], "data": setting.data, "chats": CHATS,
        "mean_tokens": float(np.mean(lengths)), "longest": max(lengths),
        "supervised": sum(int(mask.sum()) for _, mask in setting.samples) / sum(lengths), "tokens_per_step": TOKENS_PER_STEP,
        "rounds": arguments.rounds, "steps_per_round": arguments.steps, "steps_counted": steps_counted, "phases": phases,
        "left_out": {name: missing(package, torch.device("cpu")) for name, package in FOR_GPUS.items()}}
    kind = arguments.data.stem if arguments.data else "equal" if arguments.lengths == "equal" else ""
    adapter = "" if arguments.adapter == "lora" else arguments.adapter
    suite = "-".join(filter(None, ("training", "cpu", "" if arguments.model == "7m" else arguments.model, adapter, kind)))
    return record.make(suite, conditions, agreed, summary(samples, costs), timing.raw(samples))


def quiet() -> None:
    """Only our own table on the terminal."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()


def make_lines(setting: Setting, names: list[str], steps: int) -> list[Line]:
    ours = Line(FP32, Steadfast(setting, "fp32", steps).step)
    lines = [*(Line(name, OTHERS[name](setting).step) for name in names), ours, timing.again(ours)]
    lines.append(timing.product(torch.float32))
    if fast_bf16():
        lines += [Line(BF16, Steadfast(setting, "bf16", steps).step), timing.product(torch.bfloat16)]
    return lines


def shares(seconds: dict[str, float]) -> dict[str, float]:
    whole = sum(seconds.values())
    return {name: spent / whole for name, spent in seconds.items()}


def summary(samples: dict[str, list[timing.Sample]], costs: dict[str, Costs]) -> list[dict]:
    """One row a line: its rates, its share of the machine's product rate (MFU), its other costs, and its ratio to each baseline."""
    rows, others = [], [name for name in samples if name in OTHERS]
    fastest = max(others, key=lambda name: timing.spread(samples[name]).value, default=None)
    bases = [name for name in others if name in BASES or name == fastest]
    for name, line in samples.items():
        if not line[0].tokens:  # a matrix product
            continue
        dtype = torch.bfloat16 if name == BF16 else torch.float32
        tokens, computed = sum(s.tokens for s in line), sum(s.tokens + s.padding for s in line)
        against = [FP32] if name.endswith(timing.AGAIN) else [base for base in bases if base != name]
        rows.append({
            "line": name, "tokens_per_cpu_second": asdict(timing.spread(line)),
            "supervised_per_cpu_second": asdict(timing.spread(line, lambda s: s.supervised / s.cpu)),
            "steps_per_cpu_second": asdict(timing.spread(line, lambda s: s.steps / s.cpu)),
            "useful_flops": asdict(timing.spread(line, flop_rate)), "padding": 1 - tokens / computed,
            "mfu": asdict(timing.ratio(line, samples[timing.product(dtype).name], flop_rate)),
            **asdict(costs[name.removesuffix(timing.AGAIN)]),
            "ratio": {base: asdict(timing.ratio(line, samples[base])) for base in against}})
    return rows


def flop_rate(sample: timing.Sample) -> float:
    return sample.flops / sample.cpu
