"""Tell the language of an answer with py3langid, which works offline.

IFEval's own checkers use langdetect, which has no wheel, draws random numbers, and takes a tenth of English texts in capital letters for
German. The two agree on prose of some sentences; on lists of names and on a few words they may not. Letters are made small first.
"""

from __future__ import annotations

from functools import lru_cache

# The languages that langdetect tells apart.
LANGUAGES = ("af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro ru sk "
             "sl so sq sv sw ta te th tl tr uk ur vi zh").split()


@lru_cache(1)
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(LANGUAGES)
    return identifier


def is_in_language(text: str, language: str) -> bool:
    """Return whether a text is in a language (ISO 639-1); one without letters is in any."""
    return not any(map(str.isalpha, text)) or _identifier().classify(text.lower())[0] == language
