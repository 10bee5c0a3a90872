"""Predict the time of every operation on GPUs from the bytes, FLOPs and launches of its kernels.

A kernel takes the longer of its matmuls at the GPU's matmul rate and its memory traffic at the GPU's bandwidth, and a launch; an operation
takes the sum of its kernels, forward and backward. Data that a kernel reads again soon enough to find in the L2 cache counts once. Nothing
here is measured: `python -m benchmarks.run kernels --predict` prints it beside figures that others have published, in their own settings,
and beside those that a GPU run of `benchmarks.speed.kernels` measured, once there is one.

Letters: T tokens, D model width, F width of the MLP, V vocabulary, H query heads, G key heads, C channels of a head, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from benchmarks.harness import show
from benchmarks.harness.model_shapes import MODELS, ModelShape
from benchmarks.harness.suite import Caption, View

TOKENS, RANK, DROPOUT = 8192, 16, 0.05
DOCUMENT = 1024  # tokens of each document in the pack that attention sees
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Arch:
    """A GPU: its datasheet's figures, and the share of them that is assumed to be reached."""

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
ARCHS = (
    Arch("H200", "H200", 989e12, 4.8e12, attention_share=0.25),
    Arch("A100", "A100", 312e12, 2.039e12, attention_share=0.45),
    Arch("RTX 4090", "4090", 165.2e12, 1.008e12, attention_share=0.55),
)


class Kernel(NamedTuple):
    """One launch, or `launches` alike, which share the FLOPs and the bytes."""

    flops: float
    bytes: float
    launches: int = 1
    attention: bool = False


class Work(NamedTuple):
    """An operation's kernels, forward and backward, and those of the layer without it (`base`)."""

    forward: list[Kernel]
    backward: list[Kernel]
    base: list[Kernel] = []


def seconds(kernels: list[Kernel], part: Arch) -> float:
    total = 0.0
    for kernel in kernels:
        rate = part.product_rate * (part.attention_share if kernel.attention else part.product_share)
        total += max(kernel.flops / rate, kernel.bytes / (part.bandwidth * part.bandwidth_share)) + kernel.launches * part.launch
    return total


def product(rows: int, inner: int, columns: int, added: bool = False, out: int = BF16) -> Kernel:
    """Return the kernel of [rows, inner] x [inner, columns], `added` to what is there."""
    written = rows * columns * out
    return Kernel(2.0 * rows * inner * columns, BF16 * inner * (rows + columns) + written * (2 if added else 1))


def passes(elements: float, count: float, launches: int = 1) -> list[Kernel]:
    """Return kernels that read or write bf16 elements `count` times in one launch."""
    return [Kernel(0.0, elements * count * BF16, launches)]


# ---------------------------------------------------------------- the operations


def cross_entropy(model: ModelShape, rows: int, trained: bool, kept: float = 1.0, sides: int = 1) -> Work:
    """Return the work of a linear cross entropy, chunk of rows by chunk.

    A chunk takes a matmul for the logits (of `sides` models), the row kernel, which reads them and writes the gradient over them, a matmul
    for ∂x, and one for ∂W in fp32 when the head is trained. The upstream gradient scales ∂x (and rounds ∂W) in the backward.
    """
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
    """Return the work of P projections of one x [rows, width].

    Forward: one launch makes S = drop(x) Aᵀ and writes S Bᵀ, to which the P base matmuls add. Backward: one launch makes ∂S = ∂Y B and
    writes drop(∂S A), to which the P base matmuls add their ∂x; one more reads ∂Y and x again for ∂A and ∂B, in slices that a last sums.
    """
    P, total = len(outputs), sum(outputs)
    base = [product(rows, width, n) for n in outputs] + [product(rows, n, width, added=i > 0) for i, n in enumerate(outputs)]
    narrow = 2.0 * rows * RANK * (P * width + total)  # FLOPs of S and S Bᵀ; of ∂S and ∂S A; of ∂A and ∂B
    forward = [Kernel(narrow, BF16 * rows * (width + total))] + [product(rows, width, n, added=True) for n in outputs]
    backward = [Kernel(narrow, BF16 * rows * (total + width)), *(product(rows, n, width, added=True) for n in outputs),
                Kernel(narrow, BF16 * rows * (total + width), launches=2)]
    return Work(forward, backward, base)


def together(*works: Work) -> Work:
    return Work(*(sum(kernels, []) for kernels in zip(*works, strict=True)))


def mlp(model: ModelShape, rows: int) -> Work:
    """Return the work of the MLP.

    gate and up share x; the backward of their gated product also writes it again for the down projection's ∂A.
    """
    gated = Work(passes(rows * model.mlp, 3), passes(rows * model.mlp, 6))
    return together(lora(rows, model.width, [model.mlp] * 2), gated._replace(base=gated.forward + passes(rows * model.mlp, 5)),
                    lora(rows, model.mlp, [model.width]))


def attention(model: ModelShape, rows: int) -> Work:
    """Return the work of causal FlashAttention over documents of DOCUMENT tokens.

    That is half of each document's square, 2 matmuls forward and 5 backward.
    """
    pairs = rows * DOCUMENT / 2
    flops, q, kv = 4.0 * pairs * model.heads * model.head_dim, rows * model.heads * model.head_dim, rows * model.kv_heads * model.head_dim
    return Work([Kernel(flops, BF16 * 2 * (q + kv), attention=True)], [Kernel(2.5 * flops, BF16 * 4 * (q + kv), 3, attention=True)])


def channels(model: ModelShape, rows: int) -> int:
    """Return the number of channels of q and k, which rotary embeddings turn."""
    return rows * (model.heads + model.kv_heads) * model.head_dim


def dequantisation(model: ModelShape, rows: int) -> Work:
    """Return the work of dequantising every weight once.

    Half a byte and a byte for each 64 are read, two bytes written, with a launch for each of a layer's 7 matrices.
    """
    return Work([Kernel(0.0, model.linear_weights * (0.5 + 1 / 64 + BF16), 7 * model.layers)], [])


def qkv(model: ModelShape, rows: int) -> Work:
    return lora(rows, model.width, [model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2])


OPERATIONS: dict[str, Callable[[ModelShape, int], Work]] = {
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


def applies(operation: str, model: ModelShape) -> bool:
    return model.qk_norm or operation != "QK-norm + RoPE"


def predict() -> list[dict]:
    """Return a row for each operation of each model.

    It holds ms of forward and backward on each GPU, and what LoRA adds to its base matmuls.
    """
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
                       for part in ARCHS},
                "overhead": {part.name: seconds(kernels, part) / seconds(work.base, part) - 1 for part in ARCHS} if work.base else None,
                "flops": sum(k.flops for k in kernels), "bytes": sum(k.bytes for k in kernels),
                "launches": sum(k.launches for k in kernels)})
    return rows


def record_of() -> dict:
    """Return the record of a prediction, in the form of a measured one."""
    from benchmarks.harness import record

    conditions = {"tokens": TOKENS, "rank": RANK, "dropout": DROPOUT, "document": DOCUMENT, "parts": [asdict(part) for part in ARCHS],
                  "models": [asdict(model) for model in MODELS]}
    return record.make("kernels-predicted", conditions, {}, predict(), {})


def newest_measured() -> dict | None:
    """Return the latest record of a GPU's kernels, or None while there is none.

    It is a record of `benchmarks.speed.kernels`, by itself or inside one of `make gpu`.
    """
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
    """Return our median of an operation in a GPU's record, or its outcome where it was not timed."""
    found = next((r for r in (measured or {}).get("summary", ()) if (r["operation"], r["model"]) == (row["operation"], row["model"])
                  and r["contender"] == "Steadfast"), None)
    if found is None:
        return ""
    return found["outcome"] if found["ms"] is None else milliseconds(found["ms"]["value"])


def table(record: dict, measured: dict | None = None, models: tuple[str, ...] | None = None) -> list[list[str]]:
    """Return predicted ms on every GPU, and measured ones where `measured` is a GPU's record.

    Forward and backward together. `models`: those to show (default: all of the record).
    """
    models = models or tuple(model["name"] for model in record["conditions"]["models"])
    device = measured["device"] if measured else "a GPU"
    archs = [arch["name"] for arch in record["conditions"]["parts"]]
    several = len(models) > 1
    rows = [["operation", *["model"] * several, *(f"{arch}, predicted" for arch in archs), f"measured on {device}", "target, H200",
             "published by others"]]
    for row in (r for r in record["summary"] if r["model"] in models):
        operation, model = row["operation"], row["model"]
        target = TARGETS.get(operation, "") if model == MODELS[0].name else ""
        rows.append([operation, *[model] * several, *(predicted_cell(row, arch) for arch in archs), measured_cell(row, measured), target,
                     PUBLISHED.get((operation, model), "")])
    return rows


def caption(record: dict) -> Caption:
    c, arch = record["conditions"], record["conditions"]["parts"][0]
    return Caption(
        f"Predicted milliseconds, forward and backward together, bf16, {c['tokens']:,} tokens; in brackets what LoRA of rank {c['rank']} "
        "adds to the base matmuls. Nothing of it is measured. `python -m benchmarks.run kernels --predict`.",
        (f"Predicted from bytes, FLOPs and launches at {arch['product_share']:.0%} of the stated matmul rate, "
         f"{arch['bandwidth_share']:.0%} of the stated bandwidth and {arch['launch'] * 1e6:.0f} µs a launch.",
         f"LoRA with dropout; attention over documents of {c['document']} tokens; NF4 once for every weight of every layer."))


def first_model(record: dict) -> tuple[str]:
    return (record["conditions"]["models"][0]["name"],)


def draw(record: dict, figure) -> None:
    """Draw predicted milliseconds of the first model's operations on every GPU, on a logarithmic axis."""
    (model,), archs = first_model(record), [arch["name"] for arch in record["conditions"]["parts"]]
    rows = [row for row in record["summary"] if row["model"] == model][::-1]
    axes = show.axes_of(figure, 8, 1.3 + 0.45 * len(rows))
    for i, (arch, colour) in enumerate(zip(archs, (show.OURS, show.SECOND, show.OTHERS))):
        axes.barh([j + 0.27 * (1 - i) for j in range(len(rows))], [sum(row["ms"][arch].values()) for row in rows], 0.25, color=colour,
                  label=arch)
    axes.set_yticks(range(len(rows)), [row["operation"] for row in rows])
    axes.set(xscale="log", xlabel=f"predicted ms, forward and backward, {model}")
    axes.legend(frameon=False)


VIEW = View(lambda record: table(record, newest_measured(), first_model(record)), caption, draw,
            lambda record: "Predicted times of the kernels: nothing here is measured")
FULL_VIEW = View(lambda record: table(record, newest_measured()), caption, draw)
