"""Read public sets as chats and items, and make a small base from them.

GSM8K is the domain; all else is what the base knows in general: PubMedQA (long answers and decisions), self-instruct's tasks written by
people, and the miniature's skills, whose answers can be right or wrong for a model of this size too. Their words are spelt in letters, as a
byte-pair tokenizer would hide them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.forgetting.miniature.skills import GENERAL, Skill, Slots
from benchmarks.forgetting.miniature.words import word
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from benchmarks.harness.public_sets import gsm8k, hub_rows
from benchmarks.harness.synthetic_models import SPECIAL, TEMPLATE
from trainer.config import BatchSize, Config, Data, Logging, Model, Optim, Source
from trainer.errors import UserError
from trainer.run import train
from trainer.runtime.device import fast_bf16

FILES = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "pubmedqa_ori_pqal.json", "self_instruct_seed_tasks.jsonl",
         "self_instruct_user_oriented.jsonl")
PUBMEDQA, SEED_TASKS, SELF_INSTRUCT = "qiaojin/PubMedQA", "HuggingFaceH4/self-instruct-seed", "yizhongw/self_instruct"  # on the hub
LONGEST = 1000  # bytes of a question and its answer
TOKENS = 512  # a pack and a step of the base's training; the few chats that are longer are left out
VOCABULARY = 4096
HELDOUT = 0.15  # share of the rows of PubMedQA and of self-instruct that nothing is trained on
DECISIONS = ("yes", "no", "maybe")
Chat = tuple[str, str]  # what is asked, and the answer


# ---------------------------------------------------------------- the public sets


@dataclass(frozen=True)
class Texts:
    """The chats of the five files; nothing is trained on those in `heldout`."""

    domain: list[Chat]
    domain_test: list[Chat]
    general: dict[str, list[Chat]]  # by set
    heldout: dict[str, list[Chat]]


def read(folder: Path) -> Texts:
    """UserError names the file that is missing or is not what its name says."""
    if absent := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(f"--data: expected a folder with {', '.join(FILES)}, found no {', '.join(absent)} in {folder}")
    train, test, pubmed, *tasks = (folder / name for name in FILES)
    medical, told = parsed(pubmed, papers), [chat for path in tasks for chat in parsed(path, instructions)]
    held = {name: heldout_rows(len(rows)) for name, rows in (("medical", medical), ("told", told))}
    general, heldout = ({
        "long answers": [long for i, (long, _) in enumerate(medical) if (i in held["medical"]) == out],
        "decisions": [short for i, (_, short) in enumerate(medical) if (i in held["medical"]) == out],
        "tasks": [chat for i, chat in enumerate(told) if (i in held["told"]) == out]} for out in (False, True))
    return Texts(parsed(train, problems), parsed(test, problems), general, heldout)


def download(folder: Path) -> Path:
    """Load the public sets from the hub and write them as `FILES`. Raises UserError where the hub cannot be reached."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [{"question": question, "answer": answer} for question, answer in gsm8k(split, None)]
        write_jsonl(rows, folder / f"gsm8k_{split}.jsonl")
    papers = {str(row["pubid"]): {"QUESTION": row["question"], "CONTEXTS": row["context"]["contexts"], "LONG_ANSWER": row["long_answer"],
                                  "final_decision": row["final_decision"]} for row in hub_rows(PUBMEDQA, "pqa_labeled", "train")}
    (folder / "pubmedqa_ori_pqal.json").write_text(json.dumps(papers), encoding="utf-8")
    for name, config, file in ((SEED_TASKS, None, FILES[3]), (SELF_INSTRUCT, "human_eval", FILES[4])):
        rows = [{"instruction": row["instruction"], "instances": [first_instance(row["instances"])]}
                for row in hub_rows(name, config, "train")]
        write_jsonl(rows, folder / file)
    return folder


def first_instance(instances: list[dict] | dict[str, list]) -> dict:
    """Return the first example of a task, whether the hub has them as a list of rows or as columns."""
    return instances[0] if isinstance(instances, list) else {name: values[0] for name, values in instances.items()}


def parsed(path: Path, kind) -> list:
    """Return the rows of a file that fit, as `kind` reads them.

    Raises UserError where they are not of that kind, or none fits.
    """
    try:
        rows = [row for row in kind(path.read_text(encoding="utf-8")) if short(row if isinstance(row[0], str) else row[0])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"--data: expected {kind.__doc__} in {path}, found otherwise ({type(error).__name__}: {error})") from None
    if len(rows) < 2:
        raise UserError(f"--data: expected two rows or more of at most {LONGEST} bytes in {path}, found {len(rows)}")
    return rows


def short(chat: Chat) -> bool:
    return all(chat) and len("".join(chat).encode()) <= LONGEST


def heldout_rows(count: int) -> set[int]:
    return set(Random(f"heldout {count}").sample(range(count), max(1, round(HELDOUT * count))))


def problems(text: str) -> Iterator[Chat]:
    """JSON lines with question and answer"""
    for row in map(json.loads, text.splitlines()):
        yield row["question"].strip(), row["answer"].strip()


def papers(text: str) -> Iterator[tuple[Chat, Chat]]:
    """JSON of papers with QUESTION, CONTEXTS, LONG_ANSWER and final_decision"""
    for row in json.loads(text).values():
        asked = f"{row['CONTEXTS'][0].strip()}\n\n{row['QUESTION'].strip()}"
        yield (asked, row["LONG_ANSWER"].strip()), (f"{asked} Answer yes, no or maybe.", DECISIONS[DECISIONS.index(row["final_decision"])])


def instructions(text: str) -> Iterator[Chat]:
    """JSON lines with instruction and instances"""
    for row in map(json.loads, text.splitlines()):
        first = row["instances"][0]
        yield f"{row['instruction'].strip()}\n\n{first['input'].strip()}".strip(), first["output"].strip()


# ---------------------------------------------------------------- the skills


def spelt(skill: Skill) -> Skill:
    """Return the skill with short words in letters: a token each, to be turned, sorted and counted."""
    if "{word}" not in skill.frames[0]:
        return skill

    def draw(rng: Random) -> Slots:
        return {"word": " ".join(word(rng, shortest=3, longest=5))}

    def solve(word: str) -> str:
        answer = skill.solve(word=word.replace(" ", ""))
        return " ".join(answer) if answer.isalpha() else answer

    return replace(skill, draw=draw, solve=solve)


# Without those that want every letter in a second form (capitals, or without a space before it), which take longer to learn.
SKILLS = tuple(spelt(skill) for skill in GENERAL if skill.name not in ("capitals", "spell"))


# ---------------------------------------------------------------- files for the trainer and its evaluation


def record(chat: Chat) -> dict:
    return {"messages": [{"role": "user", "content": chat[0]}, {"role": "assistant", "content": chat[1]}]}


def general_sources(texts: Texts, skills: int, seed: int, folder: Path, passes: float = 1.0) -> list[Source]:
    """Return the base's training data: each set `passes` times, and fresh records of skills."""
    sets = {name: [record(chat) for chat in chats] for name, chats in texts.general.items()}
    files = {name: write_jsonl(rows, folder / f"{name}.jsonl") for name, rows in sets.items()}
    own = write_jsonl(training_records(SKILLS, skills, seed), folder / f"skills {seed}.jsonl")
    return [Source(str(own), format="chat"), *(Source(str(path), format="chat", weight=passes) for path in files.values())]


@dataclass(frozen=True)
class Counts:
    """Items of each kind, at most."""

    per_skill: int = 50
    texts: int = 100  # of each set of held-out text
    problems: int = 150
    ranked: int = 60  # problems whose solution is to be told from others


def write_items(texts: Texts, counts: Counts, folder: Path) -> dict[str, Path]:
    """Item files of `trainer.evaluate`, by name."""
    asked = texts.domain_test[: counts.problems]
    rows = {
        "skills": [{"prompt": item.instruction, "answer": item.answer} for item in heldout_items(SKILLS, counts.per_skill)],
        "decisions": [{"prompt": prompt, "choices": list(DECISIONS), "answer": answer}
                      for prompt, answer in texts.heldout["decisions"][: counts.texts]],
        **{name: [record(chat) for chat in texts.heldout[name][: counts.texts]] for name in ("long answers", "tasks")},
        "problems": [record(chat) for chat in asked],
        "solutions": [ranked(asked, i) for i in range(min(counts.ranked, len(asked)))]}
    return {name: write_jsonl(made, folder / f"{name}.jsonl") for name, made in rows.items()}


def ranked(chats: Sequence[Chat], i: int) -> dict:
    """Return a problem with its solution and those of three others, of which the likeliest is picked."""
    others = sorted({answer for _, answer in chats} - {chats[i][1]})
    return {"prompt": chats[i][0], "choices": [chats[i][1], *Random(i).sample(others, min(3, len(others)))], "answer": chats[i][1]}


# ---------------------------------------------------------------- the base


@dataclass(frozen=True)
class Schooling:
    """How long the base goes to school: whole chats first, which teach to ask as well, then answers only."""

    skills: int = 40_000  # records of skills that it reads, each once
    passes: float = 1.5  # over the sets of real text
    tuning: int = 6_000  # records of skills that it is tuned on, beside a third of a pass over the sets
    rate: float = 2e-3
    width: int = 192
    layers: int = 3


def make_base(texts: Texts, schooling: Schooling, work: Path) -> tuple[Path, Path]:
    """Return the folders of the random model and of the trained one."""
    start = work / "start"
    save_start(texts, schooling, start)
    learnt = general_sources(texts, schooling.skills, 0, work / "reading data", schooling.passes)
    again = general_sources(texts, schooling.tuning, 1, work / "tuning data", 1 / 3)
    long = Optim(lr=schooling.rate, beta2=0.99, lr_scheduler="wsd", warmup_steps=50, decay_ratio=0.4, min_lr_ratio=0.05)
    reading = train(lesson(work, "reading", learnt, Model(config=str(start)), long, train_on="all"))
    tuning = train(lesson(work, "tuning", again, Model(path=str(reading.folder / "model")),
                          Optim(lr=schooling.rate / 4, beta2=0.99, warmup_steps=20), train_on="assistant"))
    return start, tuning.folder / "model"


def lesson(work: Path, name: str, sources: list[Source], model: Model, optim: Optim, train_on: str) -> Config:
    return Config(
        output=str(work / name), model=model, method="full", optim=optim, batch=BatchSize(tokens_per_pack=TOKENS, tokens_per_step=TOKENS),
        data=Data(train=sources, train_on=train_on, max_length=TOKENS, on_overlong="drop", cache_dir=str(work / "cache"), num_proc=1),
        precision=precision(), logging=Logging(every=50, tensorboard=False, progress=False))


def precision() -> str:
    """Return the dtype of all training here: bf16 where a CPU multiplies in it."""
    return "bf16" if fast_bf16() else "fp32"


def save_start(texts: Texts, schooling: Schooling, folder: Path) -> None:
    """Save the tokenizer, and a Llama with random weights, as hub models are saved."""
    chats = [chat for own in (texts.domain, *texts.general.values()) for chat in own]
    spoken = [turn["content"] for row in training_records(SKILLS, 3000, seed=0) for turn in row["messages"]]
    tokenizer = make_tokenizer([text for chat in chats for text in chat] + spoken)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=schooling.width, intermediate_size=schooling.width * 8 // 3, tie_word_embeddings=True,
        num_hidden_layers=schooling.layers, num_attention_heads=schooling.width // 32, num_key_value_heads=schooling.width // 32,
        max_position_embeddings=2048, initializer_range=0.04, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs; every digit is a token, so that numbers can be counted with."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="<|im_end|>",
                                   chat_template=TEMPLATE)
