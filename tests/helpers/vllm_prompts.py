"""Print the tokens of the prompts that vLLM makes of chats: `python -m tests.helpers.vllm_prompts MODEL JOBS`.

JOBS is a JSON list of chats, each an object of messages and tools. The last line printed is a JSON list of token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    model, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    llm = LLM(model=model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=50_000_000, max_num_seqs=1)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    prompts = [llm.chat(job["messages"], one, tools=job["tools"], use_tqdm=False)[0].prompt_token_ids for job in jobs]
    print(json.dumps(prompts))


if __name__ == "__main__":
    main()
