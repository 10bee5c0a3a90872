"""Tables and pictures say what the records say."""

import json

import pytest

from benchmarks import plot
from benchmarks.harness import record
from trainer.errors import UserError


def interval(value):
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def row(line, rate, **ratio):
    return {"line": line, "tokens_per_cpu_second": interval(rate), "supervised_per_cpu_second": interval(rate / 2), "padding": 0.25,
            "mib": rate / 10, "operations": None if "compile" in line else 1234.0, "mfu": interval(0.5),
            "ratio": {name.replace("_", " "): interval(value) for name, value in ratio.items()}}


@pytest.fixture
def kept():
    return {
        "suite": "training-cpu", "time": "2026-11-21T10:00:00+00:00", "commit": "0123456789", "dirty": True,
        "command": "python -m x", "cpu": "Some CPU", "threads": 1, "versions": {"torch": "2.13.0", "transformers": "5.19.0"},
        "agreement": {"a / b": 1e-6, "c / d": 2e-5},
        "conditions": {"model": "Llama", "adapter": "LoRA", "chats": 500, "data": "synthetic", "mean_tokens": 122.4, "supervised": 0.45,
                       "tokens_per_step": 1024, "rounds": 16},
        "summary": [row("plain HF loop", 1000), row("Steadfast fp32", 4500, plain_HF_loop=4.5),
                    row("plain, torch.compile", 2000, plain_HF_loop=2.0),
                    row("Steadfast fp32 (A/A)", 4500, Steadfast_fp32=1.0)],
    }


def test_table_and_conditions(kept):
    table = plot.markdown(kept)
    lines = table.splitlines()
    head = ["line", "real tokens per CPU-second", "supervised ones", "padding", "MFU", "memory a step adds, MiB", "operations a step",
            "× plain HF loop"]
    assert lines[0] == f"| {' | '.join(head)} |"
    assert lines[2] == "| plain HF loop | 1,000 (900-1,100) | 500 | 25% | 50% | 100 | 1,234 |  |"
    assert lines[3] == "| Steadfast fp32 | 4,500 (4,050-4,950) | 2,250 | 25% | 50% | 450 | 1,234 | 4.50 (4.05-4.95) |"
    assert lines[4] == "| plain, torch.compile | 2,000 (1,800-2,200) | 1,000 | 25% | 50% | 200 |  | 2.00 (1.80-2.20) |"
    assert len(lines) == 7  # the A/A line is told in the conditions
    assert "timed against itself: 1.00 (0.90-1.10)" in lines[6] and "at worst to 2e-05 (c / d)" in lines[6]
    assert "commit 01234567 with changes" in lines[6]


def test_renew_touches_only_what_is_marked(kept):
    before = "# Title\n<!-- benchmark: training-cpu -->\nold\n<!-- end of benchmark -->\nafter\n"
    after = plot.renew(before, {"training-cpu": kept})
    assert after == f"# Title\n<!-- benchmark: training-cpu -->\n{plot.markdown(kept)}<!-- end of benchmark -->\nafter\n"
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


def test_the_committed_readme_agrees_with_the_committed_records():
    if plot.PAGES[0].exists():
        assert plot.main(["--check"]) == 0


def test_the_picture_shows_every_line_in_order(kept, tmp_path):
    from matplotlib import pyplot

    kept_figures = []
    close, pyplot.close = pyplot.close, kept_figures.append
    try:
        plot.draw(kept, tmp_path / "a.png")
    finally:
        pyplot.close = close
    _, rates, memory = kept_figures[0].axes
    assert [label.get_text() for label in rates.get_yticklabels()] == ["Steadfast fp32", "plain, torch.compile", "plain HF loop"]
    assert [bar.get_width() for bar in rates.patches] == [4500, 2000, 1000]
    assert [bar.get_width() for bar in memory.patches] == [450, 200, 100]
    close(kept_figures[0])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_record_gives_one_picture(kept, tmp_path, suffix):
    one, two = (plot.draw(kept, tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
    assert one == two and one.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])
