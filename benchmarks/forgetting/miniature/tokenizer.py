"""Make a tokenizer with one token per character and seven special tokens.

Characters let a tiny model learn spelling; all tools load it as a tokenizer of transformers.
"""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
BOS, EOT, PAD, UNKNOWN, USER, ASSISTANT, SYSTEM = SPECIAL = (
    "<|bos|>", "<|eot|>", "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|system|>",
)
# A header token opens a turn, an end-of-turn token closes it, and the end of turn is the end of generation, as in Llama 3 and Phi 3.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    core = Tokenizer(models.BPE(vocabulary, merges=[], unk_token=UNKNOWN))
    core.decoder = decoders.Fuse()  # characters join without spaces
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOT, pad_token=PAD, unk_token=UNKNOWN, padding_side="left",
        additional_special_tokens=[USER, ASSISTANT, SYSTEM], clean_up_tokenization_spaces=False, model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
