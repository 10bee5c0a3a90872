"""Call vLLM as its own examples do, with the engine settings of `synth` but none of its patches.

`python -m benchmarks.speed.bare_vllm MODEL`: for every line on standard input (a JSON file of requests) it makes one `LLM.generate` call
with all of them, and prints how long that took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from synth.config import Model
from synth.engines.protocol import LoadRequest
from synth.engines.vllm import start_vllm


def main() -> None:
    folder = sys.argv[1]
    llm = start_vllm(LoadRequest("vllm", Model(path=folder), folder, 1))
    print("ready", flush=True)
    for line in sys.stdin:
        requests = json.loads(Path(line.strip()).read_text())
        began = time.perf_counter()
        params = [SamplingParams(temperature=r["temperature"], top_p=r["top_p"], max_tokens=r["max_tokens"], stop_token_ids=r["stop_ids"],
                                 seed=r["seed"], logprobs=r["logprobs"]) for r in requests]
        said = llm.generate([TokensPrompt(prompt_token_ids=r["token_ids"]) for r in requests], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": sum(len(out.outputs[0].token_ids) for out in said),
                          "texts": [out.outputs[0].text for out in said]}), flush=True)


if __name__ == "__main__":
    main()
