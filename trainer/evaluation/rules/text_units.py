"""Count the words, capital words, sentences and repetitions of a text.

Words and capital words are IFEval's: runs of word characters, and the tokens of the Penn Treebank that have no small letter. Sentences end
as in Punkt (T. Kiss and J. Strunk, Computational Linguistics 32, 2006, p. 485), which IFEval uses with a model of English: at every `?`
and `!`, and at a full stop unless the word before it is an abbreviation or an initial. Punkt learns from a corpus which words are
abbreviations and which start a sentence; here they are lists, so the two may differ at a rare abbreviation.
"""

from __future__ import annotations

import re

CLOSING = frozenset("\"')]}")  # belong to the sentence before them
SPLITTING = r"[)\";}\]*:@'({\[?!]"  # end a word, and may follow the mark that ends a sentence
RUN = r"-{2,}|\.{2,}"
TOKEN = re.compile(rf"""{RUN}|[^("`{{\[:;&#*@)}}\]\-,\s]\S*?(?=\s|$|{SPLITTING}|{RUN}|,(?:\s|$|{SPLITTING}|{RUN}))|\S""")
ABBREVIATIONS = frozenset((
    "mr mrs ms messrs dr prof st jr sr rev rep reps sen gov col gen maj sgt lt capt adm co corp inc ltd cie bros cos ct jan feb mar "
    "aug sep sept oct nov dec mon tues wed fri ala ariz ark calif colo conn del fla ga ill ind kan ky la mass md mich minn miss mo "
    "mont nev okla ore pa tenn tex va vt wash wis ave ft vs v yr mg p.m u.s u.k u.n u.s.a u.s.s.r ph.d d.c n.y n.j n.c s.c n.d n.h "
    "n.m r.i w.va a.m j.k j.j j.r b.v n.v s.a s.p.a s.s m.b.a a.d a.c t n m h s d g c l w r j p k e f ok"
).split())
# Words that start a sentence where they follow an abbreviation with a capital letter.
STARTERS = frozenset((
    "although among and are as at because before both but can could did do does during each even every few for from have he how "
    "however i if in indeed instead is it its let make many meanwhile more moreover most neither nevertheless no nonetheless nor "
    "not once one or others please separately she should similarly since so some still such than that the their them then there "
    "therefore these they this those though through thus to under until unlike use was we were what when where whether which while "
    "who why will with without would yes yet you your"
).split())
NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.")
# What the Penn Treebank's rules split off a word, in the order in which they are applied.
TREEBANK = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"([«“‘„]|`+)", r" \1 "), (r"(?i)(')(?!re|ve|ll|m|t|s|d|n)(\w)\b", r"\1 \2"), (r"([^.])(\.)([\])}>\"'»”’ ]*)\s*$", r"\1 \2 \3 "),
    (r"([:,])([^\d])", r" \1 \2"), (r"([:,])$", r" \1 "), (r"(\.{2,})", r" \1 "), (r"([;@#$%&])", r" \1 "),
    (r"([^.])(\.)([\])}>\"']*)\s*$", r"\1 \2\3 "), (r"([?!])", r" \1 "), (r"([^'])' ", r"\1 ' "), (r"([*\]\[(){}<>]|--)", r" \1 "),
    (r"^|$", " "), (r"([»”’]|''|\")", r" \1 "), (r"\s+", " "), (r"([^' ])('[sSmMdD]|') ", r"\1 \2 "),
    (r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 "), (r"(?i)\b(can)(not)\b", r"\1 \2"), (r"(?i)\b(d)('ye)\b", r"\1 \2"),
    (r"(?i)\b(gim|lem)(me)\b", r"\1 \2"), (r"(?i)\b(gon|wan)(na)\b", r"\1 \2"), (r"(?i)\b(got)(ta)\b", r"\1 \2"),
    (r"(?i)\b(more)('n)\b", r"\1 \2"), (r"(?i) ('t)(is|was)\b", r" \1 \2")))


def count_words(text: str) -> int:
    """Return the number of runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def repetition(text: str, n: int = 4) -> float:
    """Return the share of runs of n words that occurred before in the text.

    It is seq-rep-n of S. Welleck et al., arXiv 1908.04319, over words instead of tokens; a sign is a word of its own.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    runs = list(zip(*(words[i:] for i in range(n))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def count_capital_words(text: str) -> int:
    """Return the number of tokens with a letter and without a small one; "I" is one, and "DON'T" two."""
    return sum(token.isupper() for sentence in split_sentences(text) for token in _treebank_tokens(sentence))


def _treebank_tokens(sentence: str) -> list[str]:
    for pattern, replacement in TREEBANK:
        sentence = pattern.sub(replacement, sentence)
    return sentence.split()


def count_sentences(text: str) -> int:
    """Return the number of sentences; a text without a mark is one."""
    return len(split_sentences(text))


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, none of them empty."""
    sentences, start = [], 0
    words = list(re.finditer(r"\S+", text))
    for word, following in zip(words, [*words[1:], None]):
        for end in _ends_in(word[0], following[0] if following else ""):
            sentences.append(text[start:word.start() + end].strip())
            start = word.start() + end
    return [sentence for sentence in (*sentences, text[start:].strip()) if sentence]


def _ends_in(word: str, following: str) -> list[int]:
    """Return where sentences end in a word: after its last mark, and after one in front."""
    marks = [i for i, letter in enumerate(word)
             if letter in ".?!" and (re.match(SPLITTING, word[i + 1:]) or not word[i + 1:] and following)]
    if not marks:
        return []
    mark = marks[-1]
    rest = word[mark + 1:]
    in_front = [1] if marks[0] == 0 < mark else []
    tokens = TOKEN.findall(word[:mark + 1] + (rest[:1] or f" {following}"))
    if not any(_ends_sentence(token, after) for token, after in zip(tokens, tokens[1:])):
        return in_front
    return [*in_front, len(word) if set(rest) <= CLOSING else mark + 1]


def _ends_sentence(token: str, following: str) -> bool:
    """Return whether a sentence ends between two tokens of a text."""
    if token in (".", "?", "!"):
        return True
    if not token.endswith("."):
        return False
    word, starts = token[:-1].lower(), _starts_sentence(following)
    if token.endswith(".."):
        return starts is True
    abbreviated = not ABBREVIATIONS.isdisjoint((word, word.split("-")[-1]))
    if len(word) == 1 and word.isalpha():  # an initial
        return not abbreviated and starts is not False and not (following[:1].isupper() and starts is None)
    if abbreviated:
        return starts is True
    return not (NUMBER.fullmatch(token) and starts is False)


def _starts_sentence(token: str) -> bool | None:
    """Return whether a token starts a sentence after an abbreviation; None where its form does not tell."""
    if token in (";", ":", ",", ".", "!", "?") or token[:1].islower():
        return False
    return True if token[:1].isupper() and token.rstrip(".").lower() in STARTERS else None
