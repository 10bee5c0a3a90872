"""Test the languages of real sentences, and the weights that give languages their wanted shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth.filters.language import UNKNOWN, check_codes, check_shares, language_of, weight_factors
from tests.helpers import real_prompts
from trainer.errors import UserError

SENTENCES = {
    "en": "Could you please explain to me how vaccines work?",
    "de": "Kannst du mir bitte erklären, wie eine Wärmepumpe funktioniert?",
    "fr": "Peux-tu m'expliquer pourquoi le ciel est bleu ?",
    "es": "¿Puedes escribir un poema sobre el mar y las estrellas?",
    "it": "Scrivi una breve storia su un gatto che vive a Roma.",
    "pt": "Você pode me explicar como funciona a fotossíntese?",
    "ru": "Объясни, пожалуйста, как работает двигатель внутреннего сгорания.",
    "zh": "请解释一下人工智能的基本原理。",
    "ja": "人工知能の仕組みをわかりやすく説明してください。",
    "ko": "인공지능이 어떻게 작동하는지 설명해 주세요.",
    "ar": "من فضلك اشرح لي كيف تعمل الطاقة الشمسية.",
    "hi": "कृपया मुझे बताइए कि सौर ऊर्जा कैसे काम करती है।",
    "tr": "Bana güneş enerjisinin nasıl çalıştığını açıklar mısın?",
    "pl": "Czy możesz wyjaśnić, jak działa silnik elektryczny?",
}


@pytest.mark.slow
@pytest.mark.parametrize("code, text", SENTENCES.items())
def test_sentences(code, text):
    assert language_of(text) == code


@pytest.mark.parametrize("text", ["hi", "What is oqulih reversed?", "", "17 + 4 = ?", "xqzt"])
def test_what_has_no_language_is_not_guessed(text):
    assert language_of(text) in UNKNOWN


@pytest.mark.slow
def test_real_prompts_are_english_or_cannot_be_told():
    found = [language_of(text) for text in real_prompts.prompts(*real_prompts.COLUMNS)]
    assert sum(code not in ("en", *UNKNOWN) for code in found) <= 2 and found.count("en") > 0.99 * len(found)


def test_codes_and_shares_are_checked():
    check_codes("clean.languages", ["en", "zh"])
    check_shares("instruct.languages", {"en": 0.6, "de": 0.4})
    with pytest.raises(UserError, match="clean.languages: expected ISO 639-1 codes .* got 'english'"):
        check_codes("clean.languages", ["english"])
    for wrong in ({"en": 0.7, "de": 0.4}, {"en": 0.0}, {"en": -0.1}):
        with pytest.raises(UserError, match="instruct.languages: expected shares above 0 that sum to at most 1"):
            check_shares("instruct.languages", wrong)


def shares(actual, wanted):
    """Shares after the weights, among the languages that are known; and the sum of all."""
    now = {code: weight * factor for (code, weight), factor in zip(actual.items(), weight_factors(actual, wanted).values())}
    known = sum(weight for code, weight in now.items() if code not in UNKNOWN)
    return {code: pytest.approx(weight / known) for code, weight in now.items() if code not in UNKNOWN}, pytest.approx(sum(now.values()))


@pytest.mark.parametrize("actual, wanted, expected", [
    ({"en": 80, "de": 20, "und": 50}, {"en": 0.5, "de": 0.5}, {"en": 0.5, "de": 0.5}),
    ({"en": 90, "de": 10}, {"de": 0.3}, {"en": 0.7, "de": 0.3}),
    ({"en": 60, "fr": 30, "de": 10, "zxx": 5}, {"de": 0.4}, {"en": 0.4, "fr": 0.2, "de": 0.4}),
    ({"en": 80, "fr": 10, "de": 10}, {"en": 0.5, "de": 0.5}, {"en": 0.45, "fr": 0.1, "de": 0.45}),  # nothing is left: fr as it comes
    ({"en": 80, "fr": 20}, {"en": 0.5, "de": 0.5}, {"en": 0.8, "fr": 0.2}),
    ({"en": 80, "fr": 20}, {"de": 1.0}, {"en": 0.8, "fr": 0.2}),
    ({"und": 3}, {"en": 1.0}, {}),
])
def test_wanted_shares_are_reached(actual, wanted, expected):
    assert shares(actual, wanted) == (expected, sum(actual.values()))
    assert all(weight_factors(actual, wanted)[code] == 1 for code in UNKNOWN if code in actual)


@given(st.dictionaries(st.sampled_from(["en", "de", "fr", "zh", "und"]), st.floats(0.01, 1000), min_size=1),
       st.dictionaries(st.sampled_from(["en", "de", "fr", "ja"]), st.floats(0.01, 0.25)))
def test_the_sum_stays_and_no_weight_vanishes(actual, wanted):
    found = weight_factors(actual, wanted)
    assert found.keys() == actual.keys() and min(found.values()) > 0
    assert sum(actual[code] * found[code] for code in actual) == pytest.approx(sum(actual.values()))
