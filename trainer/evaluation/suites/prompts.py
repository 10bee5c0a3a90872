"""Turn rows of known benchmarks into items, with the prompts of lm-evaluation-harness (zero-shot).

Each function takes a row of the hub's data set, or of the file that llm-foundry has of it (`query`, `choices`, `gold`), and returns a row
for `trainer/evaluation/items.py`. Both give one prompt, but llm-foundry's files have four of the five choices of CommonsenseQA, and
passages of BoolQ without their titles.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def as_it_is(row: Row) -> Row:
    """Return a row that has our columns."""
    return row


def arc(row: Row) -> Row:
    """Return an item of ARC."""
    if "query" in row:
        return _of_foundry(row, f"{row['query']}\nAnswer:")
    return {"prompt": f"Question: {row['question']}\nAnswer:", **_labelled(row)}


def piqa(row: Row) -> Row:
    """Return an item of PIQA."""
    if "query" in row:
        return _of_foundry(row, f"{row['query'].strip()}\nAnswer:")
    return {"prompt": f"Question: {row['goal']}\nAnswer:", "choices": [row["sol1"], row["sol2"]], "answer": row["label"]}


def openbookqa(row: Row) -> Row:
    """Return an item of OpenBookQA."""
    return _of_foundry(row, row["query"]) if "query" in row else {"prompt": row["question_stem"], **_labelled(row)}


def commonsense_qa(row: Row) -> Row:
    """Return an item of CommonsenseQA, whose choices are the letters of the answers in the prompt."""
    if "query" in row:
        return _of_foundry(row, row["query"].replace("\nChoices:\n", "\n"))
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    listed = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts))
    prompt = f"Question: {row['question'].strip()}\n{listed}\nAnswer:"
    return {"prompt": prompt, "choices": labels, "answer": labels.index(row["answerKey"])}


def winogrande(row: Row) -> Row:
    """Return an item of WinoGrande, whose choices are beginnings with one continuation."""
    if "context_options" in row:
        return {"choices": row["context_options"], "continuation": row["continuation"], "answer": row["gold"]}
    before, _, after = row["sentence"].partition("_")
    return {"choices": [before + row["option1"], before + row["option2"]], "continuation": after.strip(), "answer": int(row["answer"]) - 1}


def boolq(row: Row) -> Row:
    """Return an item of BoolQ."""
    if "query" in row:
        return _of_foundry(row, f"{row['query'].removeprefix('Passage: ')}\nAnswer:")
    return {"prompt": f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", "choices": ["no", "yes"], "answer": int(row["label"])}


def lambada(row: Row) -> Row:
    """Return an item of LAMBADA: a passage and its last word."""
    if "context" in row:
        return {"prompt": row["context"], "answer": row["continuation"]}
    prompt, _, answer = row["text"].rpartition(" ")
    return {"prompt": prompt, "answer": answer}


def gsm8k(row: Row) -> Row:
    """Return an item of GSM8K."""
    return {"prompt": f"Question: {row['question']}\nAnswer:", "answer": row["answer"]}


def ifeval(row: Row) -> Row:
    """Return an item of IFEval."""
    return {"id": row["key"], "prompt": row["prompt"], "rules": row["instruction_id_list"], "kwargs": row["kwargs"]}


def _of_foundry(row: Row, prompt: str) -> Row:
    return {"prompt": prompt, "choices": row["choices"], "answer": row["gold"]}


def _labelled(row: Row) -> Row:
    """Return the choices of a row with labels, and the index of the right one."""
    return {"choices": row["choices"]["text"], "answer": row["choices"]["label"].index(row["answerKey"].strip())}
