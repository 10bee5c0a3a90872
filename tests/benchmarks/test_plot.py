"""READMEs say what the records say, and every suite shows its records alike."""

import json
import re

import pytest

from benchmarks import plot, run
from benchmarks.harness import record, show
from benchmarks.harness.suite import Caption, Suite, View, view_of
from benchmarks.suites import SUITES, VIEWS
from tests.helpers.records import drawn, shown
from trainer.errors import UserError


def interval(value):
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def row(contender, rate, dtype="fp32", fp32=None, **ratio):
    return {"contender": contender, "dtype": dtype, "tokens_per_cpu_second": interval(rate), "padding": 0.25, "mib": rate / 10,
            "operations": None if "compile" in contender else 1234.0, "mfu": interval(0.5), "ratio_fp32": fp32 and interval(fp32),
            "ratio": {name: interval(value) for name, value in ratio.items()}}


@pytest.fixture
def kept():
    return {
        "suite": "training-cpu", "time": "2026-11-21T10:00:00+00:00", "commit": "0123456789", "dirty": True,
        "command": "python -m x", "cpu": "Some CPU", "threads": 1, "versions": {"torch": "2.13.0", "transformers": "5.19.0"},
        "agreement": {"a": 1e-6, "c": 2e-5},
        "conditions": {"model": "Llama", "method": "LoRA", "chats": 500, "data": "synthetic", "mean_tokens": 122.4, "supervised": 0.45,
                       "tokens_per_step": 1024, "rounds": 16, "steps_per_round": 2, "compared": 5, "phases": {}, "left_out": {},
                       "bases": {"fp32": {"plain": "plain HF loop, fp32"}, "bf16": {"plain": "plain HF loop, autocast"}}},
        "summary": [row("plain HF loop, fp32", 1000), row("Steadfast, fp32", 4500, plain=4.5),
                    row("HF loop, torch.compile, fp32", 2000, plain=2.0),
                    row("plain HF loop, autocast", 3000, "bf16", 3.0), row("Steadfast, bf16", 9000, "bf16", 9.0, plain=3.0),
                    row("Steadfast, fp32 (A/A)", 4500, Steadfast=1.0)],
    }


def test_the_table_has_ratios_within_a_dtype_and_one_column_across(kept):
    lines = shown(kept).splitlines()
    assert lines[0] == ("| contender | real tokens per CPU-second | padding | MFU | memory a step adds, MiB | operations a step | "
                        "× plain | × plain, fp32 |")
    assert lines[2] == "| plain HF loop, fp32 | 1,000 (900-1,100) | 25% | 50% | 100 | 1,234 |  |  |"
    assert lines[3] == "| Steadfast, fp32 | 4,500 (4,050-4,950) | 25% | 50% | 450 | 1,234 | 4.50 (4.05-4.95) |  |"
    assert lines[4] == "| HF loop, torch.compile, fp32 | 2,000 (1,800-2,200) | 25% | 50% | 200 |  | 2.00 (1.80-2.20) |  |"
    assert lines[6] == "| Steadfast, bf16 | 9,000 (8,100-9,900) | 25% | 50% | 900 | 1,234 | 3.00 (2.70-3.30) | 9.00 |"
    text = shown(kept)
    assert "timed against itself: 1.00 (0.90-1.10)" in text and "at worst to 2e-05 (c)" in text
    assert "commit 01234567 with changes" in text and "the faster of the two: plain HF loop, autocast." in text
    assert VIEWS["training"].headline(kept) == "Training on a CPU, × the plain HF loop of the same dtype: 4.5× in fp32, 3.0× in bf16"


def test_renew_touches_only_what_is_marked(kept):
    before = "# Title\n<!-- benchmark: training-cpu -->\nold\n<!-- end of benchmark -->\nafter\n"
    after = plot.renew(before, {"training-cpu": kept})
    assert after == f"# Title\n<!-- benchmark: training-cpu -->\n{shown(kept)}<!-- end of benchmark -->\nafter\n"
    assert plot.renew(after, {"training-cpu": kept}) == after
    with pytest.raises(UserError, match="record of suite kernels"):
        plot.renew(before.replace("training-cpu", "kernels"), {"training-cpu": kept})


def test_check_finds_a_readme_that_disagrees(kept, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark: training-cpu -->\n<!-- end of benchmark -->\n")
    monkeypatch.setattr(plot, "PAGES", (readme,))
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    monkeypatch.setattr(plot, "newest", lambda: record.newest(tmp_path))
    (tmp_path / "one.json").write_text(json.dumps(kept))
    assert plot.main(["--check"]) == 1 and "differs" in capsys.readouterr().err
    assert plot.main([]) == 0 and (tmp_path / "training-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main(["--check"]) == 0
    kept["summary"][1]["tokens_per_cpu_second"]["value"] = 9999
    (tmp_path / "one.json").write_text(json.dumps(kept))
    assert plot.main(["--check"]) == 1


def test_the_committed_readmes_agree_with_the_committed_records():
    assert plot.main(["--check"]) == 0


@pytest.mark.parametrize("suite", sorted(record.newest()))
def test_every_committed_record_has_a_short_caption(suite):
    """Fewer than sixty words are always in sight; all else is folded, and says where the figures come from."""
    kept = record.newest()[suite]
    view = view_of(kept, VIEWS)
    caption = view.caption(kept)
    assert len(caption.text.split()) < 60 and caption.details
    assert len({len(cells) for cells in view.table(kept)}) == 1
    if suite != "kernels-predicted":
        assert any(record.origin_command(kept) in detail for detail in caption.details)


def test_the_picture_shows_every_contender_by_dtype(kept):
    from matplotlib import pyplot

    figure = pyplot.figure()
    VIEWS["training"].draw(kept, figure)
    rates, memory = figure.axes
    names = [label.get_text() for label in rates.get_yticklabels()]
    assert names == ["Steadfast, bf16", "plain HF loop, autocast", "Steadfast, fp32", "HF loop, torch.compile, fp32", "plain HF loop, fp32"]
    assert [bar.get_width() for bar in rates.patches] == [9000, 3000, 4500, 2000, 1000]
    assert [bar.get_width() for bar in memory.patches] == [900, 300, 450, 200, 100]
    pyplot.close(figure)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_record_gives_one_picture(kept, tmp_path, suffix):
    one, two = (drawn(kept, tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
    assert one == two and one.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


def test_the_longest_name_that_fits_has_the_view():
    views = {name: View(None, None, None) for name in ("kernels-cpu", "kernels", "gpu")}
    assert view_of({"suite": "kernels-cpu-quick"}, views) is views["kernels-cpu"]
    assert view_of({"suite": "kernels-predicted"}, views) is views["kernels"]
    with pytest.raises(KeyError):
        view_of({"suite": "gpus"}, views)


def test_details_are_folded():
    assert show.markdown_caption(Caption("Short.")) == "Short.\n"
    folded = show.markdown_caption(Caption("Short.", ("One.", "Two.")))
    assert re.fullmatch(r"Short\.\n\n<details><summary>.*</summary>\n\n- One\.\n- Two\.\n\n</details>\n", folded)


# ---------------------------------------------------------------- the command


def test_without_a_suite_they_are_listed(capsys):
    assert run.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[2:]] == list(SUITES) and all(isinstance(suite, Suite) for suite in SUITES.values())
    assert max(map(len, listed)) < 130


def test_compare_is_found_anywhere():
    assert run.as_suite(["--rounds", "6", "--compare", "HEAD"]) == ["compare", "HEAD", "--rounds", "6"]
    assert run.as_suite(["--compare=HEAD~1"]) == ["compare", "HEAD~1"]
    assert run.as_suite(["training"]) == ["training"]
