"""Predicted time of every operation on GPUs that are not here, from the bytes, FLOPs and launches of its kernels.

A kernel takes the longer of its products at the part's product rate and its memory traffic at the part's bandwidth, and a launch; an
operation takes the sum of its kernels, forward and backward. What a kernel reads again soon enough to find it in the L2 cache is counted
once. Nothing here is measured: `python -m benchmarks.run kernels --predict` prints it beside what others have published, in their own
settings, and beside what a GPU run of `benchmarks.speed.kernels` measured, once there is one.

Letters: T tokens, D model width, F width of the MLP, V vocabulary, H query heads, G key heads, C channels of a head, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

TOKENS, RANK, DROPOUT = 8192, 16, 0.05
DOCUMENT = 1024  # tokens of each document in the pack that attention sees
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Part:
    """A GPU: what its datasheet states, and the share of it that is assumed to be reached."""

    name: str
    device: str  # how its driver's name for it is told
    product_rate: float  # FLOP/s, dense bf16 products with fp32 sums
    bandwidth: float  # bytes/s
    product_share: float = 0.75
    bandwidth_share: float = 0.85
    attention_share: float = 0.4  # of the product rate, by FlashAttention 2 on documents of 1024
    launch: float = 4e-6  # seconds a launch adds, in a stream that the host keeps full


# Datasheets: H200 SXM 989 TFLOP/s and 4.8 TB/s; A100 SXM 80 GB 312 and 2.039; RTX 4090 165.2 and 1.008. FlashAttention 2 has no Hopper
# instructions, so its share of an H200 is the smallest.
PARTS = (
    Part("H200", "H200", 989e12, 4.8e12, attention_share=0.25),
    Part("A100", "A100", 312e12, 2.039e12, attention_share=0.45),
    Part("RTX 4090", "4090", 165.2e12, 1.008e12, attention_share=0.55),
)


@dataclass(frozen=True)
class Model:
    """The shapes of a model."""

    name: str
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int
    qk_norm: bool = False

    @property
    def linear_weights(self) -> int:
        """Of all layers: what QLoRA stores in NF4."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp)


MODELS = (
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256, 32),
    Model("Qwen3-4B", 2560, 9728, 32, 8, 128, 151936, 36, qk_norm=True),
    Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, 16),
)


class Kernel(NamedTuple):
    """One launch, or `launches` alike, which share the FLOPs and the bytes."""

    flops: float
    bytes: float
    launches: int = 1
    attention: bool = False


class Work(NamedTuple):
    """An operation's kernels, forward and backward; and those that the layer would run without it (LoRA: the base products)."""

    forward: list[Kernel]
    backward: list[Kernel]
    base: list[Kernel] = []


def seconds(kernels: list[Kernel], part: Part) -> float:
    total = 0.0
    for kernel in kernels:
        rate = part.product_rate * (part.attention_share if kernel.attention else part.product_share)
        total += max(kernel.flops / rate, kernel.bytes / (part.bandwidth * part.bandwidth_share)) + kernel.launches * part.launch
    return total


def product(rows: int, inner: int, columns: int, added: bool = False, out: int = BF16) -> Kernel:
    """[rows, inner] x [inner, columns], `added` to what is there."""
    written = rows * columns * out
    return Kernel(2.0 * rows * inner * columns, BF16 * inner * (rows + columns) + written * (2 if added else 1))


def passes(elements: float, count: float, launches: int = 1) -> list[Kernel]:
    """`count` readings or writings of bf16 elements, in one launch."""
    return [Kernel(0.0, elements * count * BF16, launches)]


# ---------------------------------------------------------------- the operations


def cross_entropy(model: Model, rows: int, trained: bool, kept: float = 1.0, sides: int = 1) -> Work:
    """Chunks of rows: a product for the logits (of `sides` models), the row kernel, which reads them and writes the gradient over them, a
    product for ∂x, one for ∂W in fp32 when the head is trained. The upstream gradient scales ∂x (and rounds ∂W) in the backward."""
    D, V, rows = model.width, model.vocabulary, int(rows * kept)
    chunk = max(2048, D if trained else 0)
    forward = []
    for start in range(0, rows, chunk):
        n = min(chunk, rows - start)
        forward += [product(n, D, V)] * sides + passes(n * V, sides + 1) + [product(n, V, D)]
        forward += [product(V, n, D, added=start > 0, out=FP32)] * trained
        if kept < 1:
            forward += passes(n * D, 4, launches=2)  # gather x, scatter ∂x
    backward = passes(rows * D, 2)
    if trained:
        backward.append(Kernel(0.0, V * D * (FP32 + BF16)))
    return Work(forward, backward)


def lora(rows: int, width: int, outputs: list[int]) -> Work:
    """P projections of one x [rows, width], adapter first. Forward: one launch makes S = drop(x) Aᵀ and writes S Bᵀ, to which the P base
    products add. Backward: one launch makes ∂S = ∂Y B and writes drop(∂S A), to which the P base products add their ∂x; one more reads
    ∂Y and x again for ∂A and ∂B, in slices that a last one sums."""
    P, total = len(outputs), sum(outputs)
    base = [product(rows, width, n) for n in outputs] + [product(rows, n, width, added=i > 0) for i, n in enumerate(outputs)]
    narrow = 2.0 * rows * RANK * (P * width + total)  # FLOPs of S and S Bᵀ; of ∂S and ∂S A; of ∂A and ∂B
    forward = [Kernel(narrow, BF16 * rows * (width + total))] + [product(rows, width, n, added=True) for n in outputs]
    backward = [Kernel(narrow, BF16 * rows * (total + width)), *(product(rows, n, width, added=True) for n in outputs),
                Kernel(narrow, BF16 * rows * (total + width), launches=2)]
    return Work(forward, backward, base)


def together(*works: Work) -> Work:
    return Work(*(sum(kernels, []) for kernels in zip(*works, strict=True)))


def mlp(model: Model, rows: int) -> Work:
    """gate and up share x; the backward of their product also writes it again for the down projection's ∂A."""
    gated = Work(passes(rows * model.mlp, 3), passes(rows * model.mlp, 6))
    return together(lora(rows, model.width, [model.mlp] * 2), gated._replace(base=gated.forward + passes(rows * model.mlp, 5)),
                    lora(rows, model.mlp, [model.width]))


def attention(model: Model, rows: int) -> Work:
    """Causal FlashAttention over documents of DOCUMENT tokens: half of each document's square, 2 products forward and 5 backward."""
    pairs = rows * DOCUMENT / 2
    flops, q, kv = 4.0 * pairs * model.heads * model.head_dim, rows * model.heads * model.head_dim, rows * model.kv_heads * model.head_dim
    return Work([Kernel(flops, BF16 * 2 * (q + kv), attention=True)], [Kernel(2.5 * flops, BF16 * 4 * (q + kv), 3, attention=True)])


def channels(model: Model, rows: int) -> int:
    """Of q and k, which rotary embeddings turn."""
    return rows * (model.heads + model.kv_heads) * model.head_dim


def dequantisation(model: Model, rows: int) -> Work:
    """Of every weight once: half a byte and a byte for each 64 are read, two bytes written; a launch for each of a layer's 7 matrices."""
    return Work([Kernel(0.0, model.linear_weights * (0.5 + 1 / 64 + BF16), 7 * model.layers)], [])


def qkv(model: Model, rows: int) -> Work:
    return lora(rows, model.width, [model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2])


OPERATIONS: dict[str, Callable[[Model, int], Work]] = {
    "linear CE, frozen head": lambda m, T: cross_entropy(m, T, False),
    "linear CE, half ignored": lambda m, T: cross_entropy(m, T, False, kept=0.5),
    "linear CE, trained head": lambda m, T: cross_entropy(m, T, True),
    "linear KL, frozen head": lambda m, T: cross_entropy(m, T, False, sides=2),
    "LoRA linear": lambda m, T: lora(T, m.width, [m.mlp]),
    "LoRA QKV": qkv,
    "LoRA MLP": mlp,
    "RMSNorm": lambda m, T: Work(passes(T * m.width, 2), passes(T * m.width, 3)),
    "add + RMSNorm": lambda m, T: Work(passes(T * m.width, 4), passes(T * m.width, 4)),
    "RoPE": lambda m, T: Work(passes(channels(m, T), 2), passes(channels(m, T), 2)),
    "QK-norm + RoPE": lambda m, T: Work(passes(channels(m, T), 2), passes(channels(m, T), 3)),
    "GLU": lambda m, T: Work(passes(T * m.mlp, 3), passes(T * m.mlp, 5)),
    "NF4, all layers": dequantisation,
    "packed attention": attention,
}


# What others have published of the time of an operation, for the same work or the nearest to it, in their own setting.
PUBLISHED = {
    ("linear CE, trained head", "Llama-3.1-8B"):
        "Liger 53.0 ms in 1129 MiB, or 35.1 ms in 2068 MiB (H200, 8192 x 4096 x 128256, Liger#1472); Liger CuTe 50.4 ms (H100, V 131072)",
    ("linear CE, trained head", "Llama-3.2-1B"):
        "CCE 92.6 ms in 3.1 GB, Liger 321 ms in 6.1 GB (H100, 16384 x 2048 x 248320, trl#6858)",
}
# What we set out to reach on an H200 at Llama-3.1-8B's shapes.
TARGETS = {
    "linear CE, frozen head": "≤ 25", "linear CE, half ignored": "≤ 13", "linear CE, trained head": "≤ 35, 1.6 GB", "LoRA linear": "≤ +8%",
    "LoRA QKV": "≤ +8%", "LoRA MLP": "≤ +8%",
} | dict.fromkeys(("RMSNorm", "RoPE", "GLU", "NF4, all layers"), "≥ 85% of copying")


def applies(operation: str, model: Model) -> bool:
    return model.qk_norm or operation != "QK-norm + RoPE"


def predict() -> list[dict]:
    """A row for each operation of each model: ms of forward and backward on each part, and what LoRA adds to its base products."""
    rows = []
    for model in MODELS:
        for name, work_of in OPERATIONS.items():
            if not applies(name, model):
                continue
            work = work_of(model, TOKENS)
            kernels = work.forward + work.backward
            rows.append({
                "line": f"{name}, {model.name}", "operation": name, "model": model.name,
                "ms": {part.name: {"forward": 1e3 * seconds(work.forward, part), "backward": 1e3 * seconds(work.backward, part)}
                       for part in PARTS},
                "overhead": {part.name: seconds(kernels, part) / seconds(work.base, part) - 1 for part in PARTS} if work.base else None,
                "flops": sum(k.flops for k in kernels), "bytes": sum(k.bytes for k in kernels),
                "launches": sum(k.launches for k in kernels)})
    return rows


def record_of() -> dict:
    """The record of a prediction, in the form of a measured one."""
    from benchmarks.harness import record

    conditions = {"tokens": TOKENS, "rank": RANK, "dropout": DROPOUT, "document": DOCUMENT, "parts": [asdict(part) for part in PARTS],
                  "models": [asdict(model) for model in MODELS]}
    return record.make("kernels-predicted", conditions, {}, predict(), {})


def newest_measured() -> dict | None:
    """The latest record of `benchmarks.speed.kernels` on a GPU, by itself or in one of `make gpu`; None while there is none."""
    from benchmarks.harness import record

    records = record.newest()
    inside = records.get("gpu", {}).get("parts", {}).get("kernels", {}).get("record")
    return max((r for r in (records.get("kernels-cuda"), inside) if r), key=lambda r: r["time"], default=None)


# ---------------------------------------------------------------- the table


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def predicted_cell(row: dict, part: str) -> str:
    ms = row["ms"][part]
    cell = milliseconds(ms["forward"] + ms["backward"])
    return cell if row["overhead"] is None else f"{cell} (+{row['overhead'][part]:.1%})"


def measured_cell(row: dict, measured: dict | None) -> str:
    """Our median of the same operation and model in a GPU's record; OOM and failures show as what they are."""
    found = next((r for r in (measured or {}).get("summary", ()) if (r["operation"], r["model"]) == (row["operation"], row["model"])
                  and r["line"] == "Steadfast"), None)
    if found is None:
        return ""
    return found["outcome"] if found["ms"] is None else milliseconds(found["ms"]["value"])


def table(record: dict, measured: dict | None = None, models: tuple[str, ...] = tuple(m.name for m in MODELS)) -> str:
    """Markdown: predicted ms, forward and backward together, on every part; measured ones where `measured` is a GPU's record."""
    device = measured["device"] if measured else "a GPU"
    parts = [part["name"] for part in record["conditions"]["parts"]]
    several = len(models) > 1
    head = ["operation", *["model"] * several, *(f"{part}, predicted" for part in parts), f"measured on {device}", "target, H200",
            "published by others"]
    lines = [head, ["---", *["---"] * several, *["---:"] * (len(parts) + 2), "---"]]
    for row in (r for r in record["summary"] if r["model"] in models):
        operation, model = row["operation"], row["model"]
        target = TARGETS.get(operation, "") if model == MODELS[0].name else ""
        lines.append([operation, *[model] * several, *(predicted_cell(row, part) for part in parts), measured_cell(row, measured), target,
                      PUBLISHED.get((operation, model), "")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def conditions_of(record: dict) -> str:
    c, part = record["conditions"], record["conditions"]["parts"][0]
    return (
        f"Milliseconds, forward and backward together, bf16, {c['tokens']} tokens; LoRA of rank {c['rank']} with dropout, in "
        f"brackets what it adds to the bare base products; attention over documents of {c['document']}; NF4 once for every weight of every "
        f"layer. Predicted from bytes, FLOPs and launches at {part['product_share']:.0%} of the stated product rate, "
        f"{part['bandwidth_share']:.0%} of the stated bandwidth and {part['launch'] * 1e6:.0f} µs a launch: nothing of it is measured. "
        f"`python -m benchmarks.run kernels --predict`.")


def markdown(record: dict, measured: dict | None = None, models: tuple[str, ...] = tuple(m.name for m in MODELS)) -> str:
    """The table with the conditions under it."""
    return f"{table(record, measured, models)}\n\n{conditions_of(record)}\n"
