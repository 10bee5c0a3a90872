"""Compile a small kernel of one matmul ahead of time, and print its figures and its digests as JSON.

It needs a process without Triton's interpreter.
"""

import json

import torch

from benchmarks.on_gpu import ahead_of_time
from kernels._launch import Launch, constexpr, jit, launch, tl


@jit
def _product(a, b, c, SIZE: constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None]
    tl.store(c + rows * SIZE + columns, tl.dot(tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns)))


def case(dtype=torch.bfloat16, size=64, warps=4):
    """Return an AOT entry that launches the kernel."""
    def run():
        a, b, c = (torch.empty(size, size, dtype=d, device="meta") for d in (dtype, dtype, torch.float32))
        launch(_product, (1,), Launch({"SIZE": size}, num_warps=warps), a, b, c)
    return run


def digest(**settings) -> str:
    """Return the digest of a case of these settings."""
    ahead_of_time.cases = lambda: {"product": case(**settings)}
    return ahead_of_time.digest("product", "sm_90")


def figures(part: str) -> dict:
    """Return the figures of the kernel on one architecture."""
    ahead_of_time.cases = lambda: {"product": case()}
    return ahead_of_time.measure("product", part)["product / product"]


if __name__ == "__main__":
    found = {"figures": {part: figures(part) for part in ("sm_90", "gfx942")}, "same": [digest(), digest()]}
    found["other"] = [digest(dtype=torch.float16), digest(size=32), digest(warps=8)]
    source = _product.src
    _product._unsafe_update_src(source.replace("rows * SIZE", "SIZE * rows"))
    _product.hash = None
    found["other"].append(digest())
    print(json.dumps(found))
