"""The page of `make gpu`: what it says of a record in which targets are met, missed or not measured."""

import copy
import json
import re

import pytest

from benchmarks.on_gpu import page as gpu_page
from benchmarks.on_gpu.page import MET, MISSED, UNKNOWN, judge, step_targets, targets

B8, OURS, PLAIN = "Llama-3.1-8B", "Steadfast", "plain HF loop"


def interval(value):
    return {"value": value, "low": 0.98 * value, "high": 1.02 * value}


def step_row(contender, rate, mfu, held, added, ratio=None, padding=0.0, **changes):
    row = {"case": f"{B8}, lora, tailed", "model": B8, "method": "lora", "lengths": "tailed", "tokens": 8192, "product_flops": 7.1e14,
           "contender": contender, "outcome": "timed",
           "micro_batch": None if contender == OURS else 4, "resident_mib": held, "step_mib": added,
           "launches": 5210, "tokens_per_second": interval(rate), "supervised_per_second": interval(rate / 2),
           "steps_per_second": interval(rate / 8192), "mfu": interval(mfu), "padding": padding}
    return row | ({"ratio": interval(ratio)} if ratio else {}) | changes


def height(contender, mode, tokens, seconds, added=30000.0, outcome="timed"):
    climb = f"{contender}, checkpointing {mode}"
    row = {"case": f"{climb}, {tokens} tokens", "climb": climb, "contender": contender, "checkpointing": mode,
           "tokens": tokens, "outcome": outcome}
    return row | ({"resident_mib": 16000.0, "step_mib": added, "tokens_per_second": interval(tokens / seconds),
                   "steps_per_second": interval(1 / seconds)} if outcome == "timed" else {})


def kernel(operation, ms, contender=OURS, share=0.6, ratio=None, peak=900.0, model=B8):
    return {"operation": operation, "model": model, "contender": contender, "outcome": "timed", "ms": interval(ms),
            "host_ms": interval(0.2),
            "peak_mib": peak, "share_of_product": share, "share_of_copy": share,
            "ratio": {name: interval(value) for name, value in (ratio or {}).items()}}


def made():
    """A record such as a day on an H200 leaves."""
    sizes = [step_row(PLAIN, 5100.0, 0.21, 15900.0, 81000.0, padding=0.27), step_row(OURS, 17340.0, 0.72, 15900.0, 29000.0, ratio=3.4),
             step_row(PLAIN, 0, 0, 0, 0, method="qlora", outcome="bitsandbytes is not installed"),
             step_row(OURS, 15020.0, 0.62, 6100.0, 29000.0, method="qlora")]
    context = [height(OURS, "none", 2048, 0.15), height(OURS, "none", 4096, 0.3), height(OURS, "none", 8192, 0, outcome="out of memory"),
               height(PLAIN, "full", 2048, 0.5), height(PLAIN, "full", 4096, 0, outcome="failed: RuntimeError: <too> long")]
    kernels = [kernel("linear CE, frozen head", 23.4, ratio={"torch eager": 0.35}),
               kernel("linear CE, frozen head", 66.0, contender="torch eager", ratio={OURS: 2.82}),
               kernel("linear CE, trained head", 34.0, peak=1800.0), kernel("LoRA linear", 5.5, ratio={"base products": 1.06}),
               kernel("RMSNorm", 0.05, share=0.81), kernel("GLU", 0.3, share=0.9)]
    kernels.append(kernel("RoPE", 0) | {"ms": None, "outcome": "failed: OutOfResources"})
    files = {"test_glu.py": {"tests": 40, "failures": 0, "errors": 0, "skipped": 3, "failed": {}, "status": 0, "seconds": 31.0,
                                     "skipped_because": {"needs sm_100": 3}},
             "test_nf4.py": {"tests": 22, "failures": 1, "errors": 0, "skipped": 1, "failed": {"test_bits": "assert <a> == b"},
                                     "status": 1, "seconds": 44.5, "skipped_because": {"needs sm_100": 1}}}
    return {
        "suite": "gpu", "time": "2026-11-21T15:00:00+00:00", "commit": "0123456789abcdef", "dirty": False, "device": "NVIDIA H200",
        "command": "python -m benchmarks.gpu --parts sizes", "versions": {"torch": "2.13.0", "triton": "3.9.0"}, "parts": {
            "tests": {"outcome": "failed: test_nf4.py", "files": files, "seconds": 130.2, "measured": "2026-11-21T14:10:00+00:00"},
            "compile": {"outcome": "passed", "seconds": 40.0},
            "capture": {"outcome": "failed: see the record", "output": "Segmentation fault"},
            "kernels": {"outcome": "passed", "record": {"summary": kernels}, "seconds": 200.0},
            "rivals": {"outcome": "passed", "model": "Llama-3.2-1B", "outcomes": {OURS: "timed", "TRL packed": "out of memory"},
                       "tokens_per_second": {OURS: interval(61000.0)}, "ratio": {}, "step_mib": {OURS: 9000.0}},
            "sizes": {"outcome": "passed", "rows": sizes, "not_reached": ["Qwen3-4B, full, equal"], "seconds": 480.0},
            "context": {"outcome": "passed", "model": B8, "rows": context, "not_reached": [], "longest": {
                f"{OURS}, checkpointing none": 4096, f"{PLAIN}, checkpointing full": 2048}}}}


def verdicts(record):
    return {target.what.partition(",")[0] if "step" in target.what else target.what.rpartition(",")[0]: target.verdict
            for target in targets(record)}


def text_of(record, folder):
    gpu_page.write(record, folder / "x.html")
    assert [path.name for path in folder.iterdir()] == ["x.html"]
    page = (folder / "x.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # it opens without a network
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<body>")[2]))


# ---------------------------------------------------------------- targets


def test_targets_are_met_missed_or_not_measured():
    found = verdicts(made())
    assert found["MFU"] == found["Real tokens/s"] == found["Peak memory"] == MET  # 44 900 of 96 900 MiB
    assert found["linear CE, frozen head"] == found["LoRA linear"] == found["GLU"] == MET
    assert found["linear CE, trained head"] == MISSED  # in time, but of 1.89 GB
    assert found["RMSNorm"] == found["RoPE"] == MISSED
    assert found["linear CE, half ignored"] == found["LoRA QKV"] == found["NF4, all layers"] == UNKNOWN


@pytest.mark.parametrize(("figure", "value", "at_the_edge", "missed"), [
    ("mfu", 0.69, 0.70, "MFU"), ("ratio", 2.9, 3.0, "Real tokens/s"), ("step_mib", 32600.0, 32550.0, "Peak memory")])
def test_a_step_target_is_missed_just_below_it(figure, value, at_the_edge, missed):
    for given, expected in ((value, {missed}), (at_the_edge, set())):
        record = made()
        record["parts"]["sizes"]["rows"][1][figure] = given if figure == "step_mib" else interval(given)
        assert {target.what.partition(",")[0] for target in step_targets(record) if target.verdict == MISSED} == expected


def test_without_the_plain_loop_only_mfu_is_judged_and_without_ours_all_are_missed():
    record = made()
    rows = record["parts"]["sizes"]["rows"]
    rows[0] = {name: rows[0][name] for name in ("case", "model", "method", "lengths", "tokens", "contender")} | {"outcome": "out of memory"}
    del rows[1]["ratio"]
    assert [target.verdict for target in step_targets(record)] == [MET, UNKNOWN, UNKNOWN]
    rows[1] = rows[0] | {"contender": OURS}
    assert {(target.measured, target.verdict) for target in step_targets(record)} == {("out of memory", MISSED)}


def test_nothing_is_judged_on_another_card_or_with_fewer_tokens():
    record = made() | {"device": "NVIDIA A100-SXM4-80GB"}
    assert set(verdicts(record).values()) == {UNKNOWN}
    record = made()
    record["parts"]["sizes"]["rows"][1]["tokens"] = 4096
    assert {target.verdict for target in step_targets(record)} == {UNKNOWN}


def test_every_target_of_a_kernel_can_be_read():
    for wanted in gpu_page.TARGETS.values():
        assert judge(wanted, kernel("x", 1e6, share=0.01, ratio={"base products": 2.0}))[1] == MISSED
        assert judge(wanted, kernel("x", 1e-6, share=0.99, ratio={"base products": 1.0}))[1] == MET
        assert judge(wanted, None)[1] == UNKNOWN
    assert judge("≤ 25", kernel("x", 25.5)) == ("25.5 ms", MISSED) and judge("≤ +8%", kernel("x", 1.0, ratio={"base products": 1.09})) == (
        "+9.0%", MISSED)
    assert judge("≤ 35, 1.6 GB", kernel("x", 34.0, peak=None)) == ("34 ms, – GB", UNKNOWN)


# ---------------------------------------------------------------- the page


def test_the_page_says_what_the_record_has(tmp_path):
    text = text_of(made(), tmp_path)
    assert "NVIDIA H200" in text and "Commit 01234567, 2026-11-21 15:00 UTC, torch 2.13.0, Triton 3.9.0." in text
    assert "Targets met 6 of 13 3 missed, 4 not measured" in text
    assert "Parts passed 5 of 7" in text and "Tests passed 57 1 failed, 4 skipped" in text
    assert f"MFU, a step of {B8}, LoRA ≥ 70% of a measured product 72.0% met" in text
    assert "Peak memory, a step of Llama-3.1-8B, LoRA ≤ 0.5 × the plain loop&#39;s 0.46 × met" in text
    assert "linear CE, frozen head, Llama-3.1-8B ≤ 25 ms 23.4 ms met" in text
    assert "RMSNorm, Llama-3.1-8B ≥ 85% of copying 81.0% missed" in text
    assert "RoPE, Llama-3.1-8B ≥ 85% of copying failed: OutOfResources missed" in text
    assert "passed; not reached: Qwen3-4B, full, equal" in text and "2 min 10 s 2026-11-21 14:10" in text
    assert "test_nf4.py: test_bits assert &lt;a&gt; == b" in text and "capture Segmentation fault" in text
    assert "needs sm_100 4" in text and "test_nf4.py failed 22 1 1 44.5 s" in text
    assert "linear CE, frozen head Llama-3.1-8B 23.4 24.3 0.2 0.879 60.0% 60.0% torch eager 2.82" in text
    assert (f"{B8}, lora, tailed (sizes) {OURS} 17,340 (16,993-17,687) 8,670 2.117 3.40 (3.33-3.47) 72.0% 0.0% – 15.5 28.3 5,210") in text
    assert f"{B8}, qlora, tailed (sizes) {PLAIN} bitsandbytes is not installed – –" in text
    assert "TRL packed out of memory – – –" in text
    assert "4,096 0.3 s, 13,653/s, 44.9 GiB failed: RuntimeError: &lt;too&gt; long" in text and "longest that fits 4,096 2,048" in text


def test_a_record_with_nothing_in_it_yet_has_a_page(tmp_path):
    record = made() | {"parts": dict.fromkeys(("tests", "kernels", "sizes", "context", "rivals"), {"outcome": "not begun"}), "commit": None}
    text = text_of(record, tmp_path)
    assert "Targets met 0 of 13 0 missed, 13 not measured" in text and "sizes not begun" in text and "Commit none" in text
    assert "Whole steps" not in text and "Context" not in text


def test_files_and_parts_that_ended_early_are_shown(tmp_path):
    record = made()
    record["parts"]["tests"]["files"]["test_rope.py"] = {
        "tests": 0, "output": "ImportError: nothing", "status": None, "seconds": 220.0}
    record["parts"]["sizes"]["rows"] = [{"case": "Qwen3-4B, full, equal", "contender": OURS, "outcome": "failed: RuntimeError: no"}]
    text = text_of(record, tmp_path)
    assert "test_rope.py ImportError: nothing" in text and "test_rope.py out of time 0 0 0" in text
    assert "Qwen3-4B, full, equal (sizes) Steadfast failed: RuntimeError: no" in text


def test_the_command_makes_the_page_of_a_record(tmp_path, capsys):
    path = tmp_path / "gpu-x.json"
    path.write_text(json.dumps(copy.deepcopy(made())))
    assert gpu_page.main([str(path)]) == 0 and capsys.readouterr().out == f"page: {tmp_path / 'gpu-x.html'}\n"
    assert "NVIDIA H200" in (tmp_path / "gpu-x.html").read_text()
    path.write_text(json.dumps({"suite": "demo-cpu"}))
    assert gpu_page.main([str(path)]) == 2 and "expected a record of `make gpu`, got one of demo-cpu" in capsys.readouterr().err
    assert gpu_page.main([str(tmp_path / "none.json")]) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow(10)
def test_in_a_browser_the_page_fits_is_readable_and_reachable(browser, tmp_path):
    gpu_page.write(made(), tmp_path / "gpu.html")
    assert browser.mistakes((tmp_path / "gpu.html").as_uri(), tmp_path) == []
