"""Read the domain and the public chats of the study on a real model, and write rows and items of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.forgetting.miniature.world import write_jsonl
from benchmarks.forgetting.real_text_data import Chat, parse_papers, record
from benchmarks.harness.public_sets import PLACE, gsm8k, hub_rows, json_lines
from trainer.errors import UserError

DOLLY, PUBMEDQA = "databricks/databricks-dolly-15k", "qiaojin/PubMedQA"  # on the hub
DOMAINS = ("gsm8k", "pubmedqa")
PAPERS = "pubmedqa_ori_pqal.json"
ALPACA = re.compile(r".*?### Instruction:\n(.*?)\n+(?:### Input:\n(.*?)\n+)?### Response:\n?", re.DOTALL)
LONGEST = 4000  # characters of a public chat
HELDOUT = 200  # of the public chats, and of PubMedQA


def domain_chats(name: str, folder: Path | None) -> tuple[list[Chat], list[Chat]]:
    """Return the chats of a domain to train on and those to test on.

    They are read from `folder`, else from the hub. Raises UserError where neither has them.
    """
    if name == "gsm8k":
        return tuple(gsm8k(split, folder and folder / f"gsm8k_{split}.jsonl") for split in ("train", "test"))
    chats = [long_answer for long_answer, _ in parse_papers(json.dumps(papers(folder)))]
    return chats[HELDOUT:], chats[:HELDOUT]


def papers(folder: Path | None) -> dict[str, dict]:
    """Return PubMedQA's labelled papers by number."""
    if folder is None:
        return {str(row["pubid"]): {"QUESTION": row["question"], "CONTEXTS": row["context"]["contexts"],
                                    "LONG_ANSWER": row["long_answer"], "final_decision": row["final_decision"]}
                for row in hub_rows(PUBMEDQA, "pqa_labeled", "train")}
    try:
        found = json.loads((folder / PAPERS).read_text(encoding="utf-8"))
        list(parse_papers(json.dumps(found)))
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{PLACE}: expected JSON of papers with QUESTION, CONTEXTS, LONG_ANSWER and final_decision in {folder / PAPERS}, "
                        f"found otherwise ({type(error).__name__}: {error})") from None


def public_chats(folder: Path | None) -> tuple[list[Chat], list[Chat]]:
    """Return chats of dolly that people wrote: those to train on, and the held-out ones."""
    if folder is None:
        rows = [(f"{row['instruction']}\n\n{row['context']}".strip(), row["response"].strip()) for row in hub_rows(DOLLY, None, "train")]
    else:
        file = next((path for path in (folder / "dolly_small.jsonl", folder / "general" / "dolly_small.jsonl") if path.is_file()), None)
        if file is None:
            raise UserError(f"{PLACE}: expected dolly_small.jsonl in {folder} or its folder general, found none")
        rows = [(plain(row["prompt"]), row["response"].strip()) for row in json_lines(file)]
    rows = [row for row in rows if all(row) and len("".join(row)) <= LONGEST]
    return rows[HELDOUT:], rows[:HELDOUT]


def plain(prompt: str) -> str:
    """Return the instruction, and the input if there is one, of a prompt in Alpaca's form."""
    found = ALPACA.fullmatch(prompt)
    return "\n\n".join(part.strip() for part in found.groups() if part) if found else prompt.strip()


def write_rows(chats: Sequence[Chat], count: int, seed: int, path: Path) -> Path:
    """Write `count` chats, or all where there are fewer, drawn by the seed."""
    drawn = Random(f"{path.stem} {seed}").sample(list(chats), min(count, len(chats)))
    return write_jsonl([record(chat) for chat in drawn], path)


def write_problems(chats: Sequence[Chat], count: int, path: Path) -> Path:
    """Write the first chats as items with a prompt and a right answer."""
    return write_jsonl([{"question": question, "answer": answer} for question, answer in chats[:count]], path)
