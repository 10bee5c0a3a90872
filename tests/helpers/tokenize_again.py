"""Print the fingerprint of tokenized rows that a cache holds: `python -m tests.helpers.tokenize_again ROWS CACHE`."""

import sys

import trainer.data.tokenize
from tests.helpers.tiny import tokenizer
from trainer.config import Data
from trainer.data.chat_template import ChatTemplate
from trainer.data.sources import load_sources


def again(*args, **options):
    raise AssertionError("tokenized again")


if __name__ == "__main__":
    trainer.data.tokenize._encode = again
    loaded = load_sources(sys.argv[1], "domain", cache_dir=sys.argv[2])
    print(trainer.data.tokenize.tokenize(loaded, ChatTemplate(tokenizer()), Data(cache_dir=sys.argv[2])).fingerprint)
