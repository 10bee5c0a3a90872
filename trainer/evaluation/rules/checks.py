"""Check an answer's text against one rule: one of IFEval's 25, or of ours.

J. Zhou et al., arXiv 2311.07911. A check takes the text, and the rule's arguments by IFEval's names. It follows the published checkers,
faults included, so that figures compare: a numbered list has a sentence per number, and a keyword is found inside longer words, but a
forbidden word is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from trainer.evaluation.rules.language import is_in_language
from trainer.evaluation.rules.text_units import count_capital_words, count_sentences, count_words

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = {"less than": lambda count, bound: count < bound, "at least": lambda count, bound: count >= bound}


def _found(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


# ---------------------------------------------------------------- keywords and language


def has_keywords(text: str, *, keywords: list[str]) -> bool:
    """Return whether every keyword occurs, also inside a longer word."""
    return all(_found(re.escape(word), text) for word in keywords)


def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """Return whether a keyword occurs so often, also inside longer words."""
    return RELATIONS[relation](_found(re.escape(keyword.strip()), text), frequency)


def lacks_words(text: str, *, forbidden_words: list[str]) -> bool:
    """Return whether none of the words occurs as a word of its own."""
    return not any(_found(rf"\b{re.escape(word)}\b", text) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Return whether a letter or sign occurs so often, whatever its case."""
    return RELATIONS[let_relation](text.lower().count(letter.strip().lower()), let_frequency)


def in_language(text: str, *, language: str) -> bool:
    """Return whether the text is in a language, named by its ISO 639-1 code."""
    return is_in_language(text, language)


# ---------------------------------------------------------------- lengths


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """Return whether the text has so many sentences."""
    return RELATIONS[relation](count_sentences(text), num_sentences)


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    """Return whether the text has so many words."""
    return RELATIONS[relation](count_words(text), num_words)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Return whether lines of three asterisks part the text into so many paragraphs, none empty."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\s?\*\*\*\s?", text)]
    return all(paragraphs[1:-1]) and len([paragraph for paragraph in paragraphs if paragraph]) == num_paragraphs


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Return whether blank lines part the text into so many paragraphs, and one begins with a word."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    filled = sum(map(bool, paragraphs))
    if nth_paragraph > filled or not paragraphs[nth_paragraph - 1]:
        return False
    word = re.split(r"[.,?!'\"]", paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"'))[0]
    return filled == num_paragraphs and word.lower() == first_word.lower()


# ---------------------------------------------------------------- content and format


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """Return whether so many placeholders in square brackets occur."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def has_postscript(text: str, *, postscript_marker: str) -> bool:
    """Return whether a postscript with this marker occurs."""
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, marker.lower()), text.lower()) is not None


def number_bullets(text: str, *, num_bullets: int) -> bool:
    """Return whether exactly so many lines begin with an asterisk or a hyphen."""
    return sum(len(re.findall(bullet, text, re.MULTILINE)) for bullet in (r"^\s*\*[^*].*$", r"^\s*-.*$")) == num_bullets


def is_one_of_the_options(text: str) -> bool:
    """Return whether one of IFEval's three fixed answers occurs."""
    return any(option in text for option in OPTIONS)


def number_highlights(text: str, *, num_highlights: int) -> bool:
    """Return whether so many parts stand between asterisks; those between double ones count again."""
    single = [part.strip("*") for part in re.findall(r"\*[^\n*]*\*", text)]
    double = [part[2:-2] for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def number_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """Return whether so many section headings occur: the word and a number."""
    return len(re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) >= num_sections


def is_json(text: str) -> bool:
    """Return whether the whole text is JSON, with or without a Markdown fence around it."""
    try:
        json.loads(_without_fence(text))
    except (ValueError, RecursionError):
        return False
    return True


def _without_fence(text: str) -> str:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    return text.removesuffix("```").strip()


def json_equals(text: str, *, value: Any) -> bool:
    """Return whether the whole text is JSON of this value, with or without a Markdown fence around it."""
    try:
        return json.loads(_without_fence(text)) == value
    except (ValueError, RecursionError):
        return False


def has_title(text: str) -> bool:
    """Return whether a title in double angular brackets occurs."""
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


# ---------------------------------------------------------------- combinations, start and end, case and punctuation


def two_responses(text: str) -> bool:
    """Return whether six asterisks part the text into two different answers."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def repeats_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """Return whether the text begins with the request, whatever its case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, *, end_phrase: str) -> bool:
    """Return whether the text ends with a phrase, whatever its case, and double quotes around the text."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_quoted(text: str) -> bool:
    """Return whether the whole text stands in double quotes."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Return whether so many words have capital letters only."""
    return RELATIONS[capital_relation](count_capital_words(text), capital_frequency)


def is_capital_english(text: str) -> bool:
    """Return whether the text is English without a small letter."""
    return text.isupper() and is_in_language(text, "en")


def is_lowercase_english(text: str) -> bool:
    """Return whether the text is English without a capital letter."""
    return text.islower() and is_in_language(text, "en")


def lacks_commas(text: str) -> bool:
    """Return whether no comma occurs."""
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": has_keywords, "keywords:frequency": keyword_frequency, "keywords:forbidden_words": lacks_words,
    "keywords:letter_frequency": letter_frequency, "language:response_language": in_language,
    "length_constraints:number_sentences": number_sentences, "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words, "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders, "detectable_content:postscript": has_postscript,
    "detectable_format:number_bullet_lists": number_bullets, "detectable_format:constrained_response": is_one_of_the_options,
    "detectable_format:number_highlighted_sections": number_highlights, "detectable_format:multiple_sections": number_sections,
    "detectable_format:json_format": is_json, "detectable_format:title": has_title, "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats_prompt, "startend:end_checker": ends_with, "startend:quotation": is_quoted,
    "change_case:capital_word_frequency": capital_word_frequency, "change_case:english_capital": is_capital_english,
    "change_case:english_lowercase": is_lowercase_english, "punctuation:no_comma": lacks_commas,
    "json:equals": json_equals,  # ours
}
PATTERNS = ("section_spliter", "postscript_marker")  # arguments that IFEval's checkers take for regular expressions
NEED_LANGUAGE = frozenset({"language:response_language", "change_case:english_capital", "change_case:english_lowercase"})
