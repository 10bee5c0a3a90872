"""Read public sets as chats and items, and make a small base from them.

GSM8K is the domain; all else is what the base knows in general: PubMedQA (long answers and decisions), self-instruct's tasks written by
people, and the miniature's skills, which a model of this size can answer right. Their words are spelt in letters, because a BPE tokenizer
hides the letters of words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
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
MAX_CHAT_BYTES = 1000  # of a question and its answer
TOKENS = 512  # per pack and step of the base's training; the few chats that are longer are dropped
VOCABULARY = 4096
HELDOUT_SHARE = 0.15  # share of the rows of PubMedQA and of self-instruct on which no model is trained
DECISIONS = ("yes", "no", "maybe")
Chat = tuple[str, str]  # question and answer


# ---------------------------------------------------------------- the public sets


@dataclass(frozen=True)
class Texts:
    """The chats of the five files; nothing is trained on those in `heldout`."""

    domain: list[Chat]
    domain_test: list[Chat]
    general: dict[str, list[Chat]]  # by set
    heldout: dict[str, list[Chat]]


def read(folder: Path) -> Texts:
    """Read the five files of a folder.

    Raises UserError, with its name, if a file is missing or has another form than expected.
    """
    if absent := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(f"--data: expected a folder with {', '.join(FILES)}, found no {', '.join(absent)} in {folder}")
    train, test, pubmed, *tasks = (folder / name for name in FILES)
    medical = parse_file(pubmed, parse_papers, "JSON of papers with QUESTION, CONTEXTS, LONG_ANSWER and final_decision")
    task_chats = [chat for path in tasks for chat in parse_file(path, parse_tasks, "JSON lines with instruction and instances")]
    medical_heldout, tasks_heldout = heldout_rows(len(medical)), heldout_rows(len(task_chats))
    general, heldout = ({
        "long answers": [answer for i, (answer, _) in enumerate(medical) if (i in medical_heldout) == is_heldout],
        "decisions": [decision for i, (_, decision) in enumerate(medical) if (i in medical_heldout) == is_heldout],
        "tasks": [chat for i, chat in enumerate(task_chats) if (i in tasks_heldout) == is_heldout]} for is_heldout in (False, True))
    domain, domain_test = (parse_file(path, parse_problems, "JSON lines with question and answer") for path in (train, test))
    return Texts(domain, domain_test, general, heldout)


def download(folder: Path) -> Path:
    """Load the public sets from the hub, write them as `FILES`, and return the folder.

    Raises UserError if the hub cannot be reached.
    """
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


def parse_file(path: Path, parse: Callable[[str], Iterator], form: str) -> list:
    """Return the rows of a file that are short enough, as `parse` yields them.

    Raises UserError if the file is not of the form that `form` describes, or fewer than two rows are short enough.
    """
    try:
        rows = [row for row in parse(path.read_text(encoding="utf-8")) if is_short(row if isinstance(row[0], str) else row[0])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"--data: expected {form} in {path}, found otherwise ({type(error).__name__}: {error})") from None
    if len(rows) < 2:
        raise UserError(f"--data: expected two rows or more of at most {MAX_CHAT_BYTES} bytes in {path}, found {len(rows)}")
    return rows


def is_short(chat: Chat) -> bool:
    """Return whether a chat is complete and of at most `MAX_CHAT_BYTES`."""
    return all(chat) and len("".join(chat).encode()) <= MAX_CHAT_BYTES


def heldout_rows(count: int) -> set[int]:
    """Return the indices of the held-out rows among `count`."""
    return set(Random(f"heldout {count}").sample(range(count), max(1, round(HELDOUT_SHARE * count))))


def parse_problems(text: str) -> Iterator[Chat]:
    """Yield the chats of GSM8K."""
    for row in map(json.loads, text.splitlines()):
        yield row["question"].strip(), row["answer"].strip()


def parse_papers(text: str) -> Iterator[tuple[Chat, Chat]]:
    """Yield two chats of each paper of PubMedQA: the long answer and the decision."""
    for row in json.loads(text).values():
        question = f"{row['CONTEXTS'][0].strip()}\n\n{row['QUESTION'].strip()}"
        decision = DECISIONS[DECISIONS.index(row["final_decision"])]  # ValueError for any other
        yield (question, row["LONG_ANSWER"].strip()), (f"{question} Answer yes, no or maybe.", decision)


def parse_tasks(text: str) -> Iterator[Chat]:
    """Yield the chats of self-instruct's tasks, each with its first example."""
    for row in map(json.loads, text.splitlines()):
        first = row["instances"][0]
        yield f"{row['instruction'].strip()}\n\n{first['input'].strip()}".strip(), first["output"].strip()


# ---------------------------------------------------------------- the skills


def spell_words(skill: Skill) -> Skill:
    """Return the skill with short words that are spelt in letters, so that each letter is a token."""
    if "{word}" not in skill.frames[0]:
        return skill

    def draw(rng: Random) -> Slots:
        return {"word": " ".join(word(rng, shortest=3, longest=5))}

    def solve(word: str) -> str:
        answer = skill.solve(word=word.replace(" ", ""))
        return " ".join(answer) if answer.isalpha() else answer

    return replace(skill, draw=draw, solve=solve)


# Not those that need a second token for every letter (capitals, or without a space before it): they take longer to learn.
SKILLS = tuple(spell_words(skill) for skill in GENERAL if skill.name not in ("capitals", "spell"))


# ---------------------------------------------------------------- files for the trainer and its evaluation


def record(chat: Chat) -> dict:
    return {"messages": [{"role": "user", "content": chat[0]}, {"role": "assistant", "content": chat[1]}]}


def general_sources(texts: Texts, skills: int, seed: int, folder: Path, passes: float = 1.0) -> list[Source]:
    """Return the base's training data: each set with weight `passes`, and new records of skills."""
    sets = {name: [record(chat) for chat in chats] for name, chats in texts.general.items()}
    files = {name: write_jsonl(rows, folder / f"{name}.jsonl") for name, rows in sets.items()}
    skill_file = write_jsonl(training_records(SKILLS, skills, seed), folder / f"skills {seed}.jsonl")
    return [Source(str(skill_file), format="chat"), *(Source(str(path), format="chat", weight=passes) for path in files.values())]


@dataclass(frozen=True)
class Counts:
    """Upper bounds of the items of each kind."""

    per_skill: int = 50
    texts: int = 100  # of each set of held-out text
    problems: int = 150
    ranked: int = 60  # problems with a choice of solutions


def write_items(texts: Texts, counts: Counts, folder: Path) -> dict[str, Path]:
    """Write the item files for `trainer.evaluate`, and return their paths by name."""
    problems = texts.domain_test[: counts.problems]
    rows = {
        "skills": [{"prompt": item.instruction, "answer": item.answer} for item in heldout_items(SKILLS, counts.per_skill)],
        "decisions": [{"prompt": prompt, "choices": list(DECISIONS), "answer": answer}
                      for prompt, answer in texts.heldout["decisions"][: counts.texts]],
        **{name: [record(chat) for chat in texts.heldout[name][: counts.texts]] for name in ("long answers", "tasks")},
        "problems": [record(chat) for chat in problems],
        "solutions": [choice_item(problems, i) for i in range(min(counts.ranked, len(problems)))]}
    return {name: write_jsonl(made, folder / f"{name}.jsonl") for name, made in rows.items()}


def choice_item(chats: Sequence[Chat], i: int) -> dict:
    """Return an item with a problem and a choice of four solutions: its own and those of three others."""
    others = sorted({answer for _, answer in chats} - {chats[i][1]})
    return {"prompt": chats[i][0], "choices": [chats[i][1], *Random(i).sample(others, min(3, len(others)))], "answer": chats[i][1]}


# ---------------------------------------------------------------- the base


@dataclass(frozen=True)
class Schooling:
    """Size of the base and its training: pre-training on whole chats, then tuning on answers only."""

    skills: int = 40_000  # records of skills in pre-training, for one epoch
    passes: float = 1.5  # epochs over the sets of real text in pre-training
    tuning: int = 6_000  # records of skills in tuning, with a third of an epoch of the sets
    rate: float = 2e-3  # learning rate
    width: int = 192
    layers: int = 3


def make_base(texts: Texts, schooling: Schooling, work: Path) -> tuple[Path, Path]:
    """Return the folders of the random model and of the trained one."""
    start = work / "start"
    save_random_model(texts, schooling, start)
    reading_data = general_sources(texts, schooling.skills, 0, work / "reading data", schooling.passes)
    tuning_data = general_sources(texts, schooling.tuning, 1, work / "tuning data", 1 / 3)
    reading_optim = Optim(lr=schooling.rate, beta2=0.99, lr_scheduler="wsd", warmup_steps=50, decay_ratio=0.4, min_lr_ratio=0.05)
    reading = train(training_config(work, "reading", reading_data, Model(config=str(start)), reading_optim, train_on="all"))
    tuning = train(training_config(work, "tuning", tuning_data, Model(path=str(reading.folder / "model")),
                          Optim(lr=schooling.rate / 4, beta2=0.99, warmup_steps=20), train_on="assistant"))
    return start, tuning.folder / "model"


def training_config(work: Path, name: str, sources: list[Source], model: Model, optim: Optim, train_on: str) -> Config:
    return Config(
        output=str(work / name), model=model, method="full", optim=optim, batch=BatchSize(tokens_per_pack=TOKENS, tokens_per_step=TOKENS),
        data=Data(train=sources, train_on=train_on, max_length=TOKENS, on_overlong="drop", cache_dir=str(work / "cache"), num_proc=1),
        precision=precision(), logging=Logging(every=50, tensorboard=False, progress=False))


def precision() -> str:
    """Return the dtype of all training here: bf16 on a CPU with fast bf16 matmuls, else fp32."""
    return "bf16" if fast_bf16() else "fp32"


def save_random_model(texts: Texts, schooling: Schooling, folder: Path) -> None:
    """Save a Llama with random weights and its tokenizer as a model folder of transformers."""
    chats = [chat for group in (texts.domain, *texts.general.values()) for chat in group]
    skill_texts = [turn["content"] for row in training_records(SKILLS, 3000, seed=0) for turn in row["messages"]]
    tokenizer = make_tokenizer([text for chat in chats for text in chat] + skill_texts)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=schooling.width, intermediate_size=schooling.width * 8 // 3, tie_word_embeddings=True,
        num_hidden_layers=schooling.layers, num_attention_heads=schooling.width // 32, num_key_value_heads=schooling.width // 32,
        max_position_embeddings=2048, initializer_range=0.04, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="<|im_end|>",
                                   chat_template=TEMPLATE)
