"""Lines that a run prints on serving its adapter with vLLM."""

import shlex

import pytest
import torch

from tests.helpers import mixtures, tiny
from tests.helpers.adapters import save_random_adapter
from trainer.config import Lora
from trainer.model.lora import add_adapter
from trainer.model.serving import how_to_serve, vllm_line


@pytest.mark.parametrize(("family", "settings", "said"), [
    ("llama", {}, []), ("llama", dict(dora=True), ["vLLM refuses DoRA"]),
    ("qwen3_moe", {}, []), ("qwen3_moe", dict(experts=True), ["enable_mixed_moe_lora_format"]),
])
def test_a_run_says_what_vllm_has_to_be_told(family, settings, said):
    with torch.device("meta"):
        model = tiny.model("llama") if family == "llama" else mixtures.sketch(family)
        lines = how_to_serve(add_adapter(model, Lora(rank=4, **settings)))
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


@pytest.mark.slow
def test_vllms_own_parser_takes_the_command(model_folder, tmp_path):
    parsers = pytest.importorskip("vllm.utils.argparse_utils")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    adapter = save_random_adapter(model_folder, tmp_path / "adapter", rank=20, spread=0.1)
    program, *words = shlex.split(vllm_line(adapter, template=True).removeprefix("serve: "))
    parsed = make_arg_parser(parsers.FlexibleArgumentParser()).parse_args(words[1:])
    assert (program, words[0], parsed.model_tag) == ("vllm", "serve", str(model_folder)) and parsed.enable_lora
    assert [(module.name, module.path) for module in parsed.lora_modules] == [("tuned", str(adapter))] and parsed.max_lora_rank == 32
    assert parsed.chat_template == str(adapter / "chat_template.jinja")
