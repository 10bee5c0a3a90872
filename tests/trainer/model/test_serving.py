"""Lines that a run prints on serving its adapter with vLLM."""

import pytest
import torch

from tests.helpers import mixtures, tiny
from trainer.config import Lora
from trainer.model.lora import add_adapter
from trainer.model.serving import how_to_serve


@pytest.mark.parametrize(("family", "settings", "said"), [
    ("llama", {}, []), ("llama", dict(dora=True), ["vLLM refuses DoRA"]),
    ("qwen3_moe", {}, []), ("qwen3_moe", dict(experts=True), ["enable_mixed_moe_lora_format"]),
])
def test_a_run_says_what_vllm_has_to_be_told(family, settings, said):
    with torch.device("meta"):
        model = tiny.model("llama") if family == "llama" else mixtures.sketch(family)
        lines = how_to_serve(add_adapter(model, Lora(rank=4, **settings)))
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))
