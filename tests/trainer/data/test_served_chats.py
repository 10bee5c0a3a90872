"""vLLM renders a chat for an exported folder exactly as the trainer rendered it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.families.served import vllm_environment
from tests.helpers import tiny
from tests.helpers.chat_templates import read, tokenizer_for
from trainer.config import Config, Data, Logging, Model
from trainer.data.prepare import prepare_data
from trainer.model.locate import load_tokenizer
from trainer.run import train

TOOLS = [{"type": "function", "function": {"name": "room_temp", "description": "Measures.", "parameters": {
    "type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "room_temp", "arguments": '{"room": "attic", "unit": "C"}'}}
USER, ANSWER = {"role": "user", "content": "How warm is the attic?"}, {"role": "assistant", "content": "31 degrees."}
CHATS = [
    {"messages": [USER, ANSWER], "tools": None},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, {"role": "user", "content": "Why?"},
                  {"role": "assistant", "content": "Summer."}], "tools": None},
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "31"},
                  ANSWER], "tools": TOOLS},
    {"messages": [USER, ANSWER | {"reasoning_content": "An early thought."}, {"role": "user", "content": "And now?"}, ANSWER],
     "tools": None},
]


@pytest.mark.slow(30)
@pytest.mark.parametrize("name", ["qwen3"])
def test_vllm_makes_the_prompts_that_were_trained(name, tmp_path):
    pytest.importorskip("vllm")
    tokenizer = tokenizer_for(read(name))
    tiny.model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")  # it has no template
    (tmp_path / "mine.jinja").write_text(read(name).replace("You are", "You are indeed"))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({k: v for k, v in chat.items() if v}) + "\n" for chat in CHATS))
    config = Config(output=str(tmp_path / "run"), model=Model(path=str(tmp_path / "base")), method="full", max_steps=1, precision="fp32",
                    data=Data(train=str(tmp_path / "chats.jsonl"), chat_template=str(tmp_path / "mine.jinja"), num_proc=1,
                              cache_dir=str(tmp_path / "cache")), logging=Logging(tensorboard=False))
    train(config)
    exported = load_tokenizer(Model(path=str(tmp_path / "run" / "model")))
    samples = prepare_data(config, exported).samples

    (tmp_path / "jobs.json").write_text(json.dumps([chat | {"messages": chat["messages"][:-1]} for chat in CHATS]))
    command = [sys.executable, "-m", "tests.helpers.vllm_prompts", str(tmp_path / "run" / "model"), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, env=vllm_environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for i, (prompt, chat) in enumerate(zip(json.loads(done.stdout.splitlines()[-1]), CHATS, strict=True)):
        ids, supervised = samples[i]
        spans = np.flatnonzero(np.diff(supervised.astype(int)) == 1) + 1
        assert ids[:spans[-1]].tolist() == prompt, exported.decode(prompt)
        assert len(spans) == sum(message["role"] == "assistant" for message in chat["messages"])
