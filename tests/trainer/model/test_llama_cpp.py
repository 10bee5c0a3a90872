"""Models as GGUF by llama.cpp's programs, which scripts stand in for: what they are called with, and their errors."""

import os
import sys

import pytest

from trainer.config import Export
from trainer.errors import UserError
from trainer.model.llama_cpp import find_tools, write_gguf

SCRIPT = "import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))\n"


@pytest.fixture
def tools(tmp_path):
    """A folder with a converter that writes what it was called with, and a quantizer that does the same."""
    (tmp_path / "convert_hf_to_gguf.py").write_text(SCRIPT)
    quantizer = tmp_path / "build" / "bin" / "llama-quantize"
    quantizer.parent.mkdir(parents=True)
    quantizer.write_text(f"#!{sys.executable}\nimport sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read() + ' ' + sys.argv[3])\n")
    quantizer.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("kind, called", [("q8_0", "--outtype q8_0"), ("q4_k_m", "--outtype bf16 Q4_K_M")])
def test_a_model_becomes_one_file_beside_its_modelfile(tools, tmp_path, kind, called):
    file = write_gguf(tmp_path / "model", tmp_path / "gguf", Export(gguf=kind, llama_cpp=str(tools)), "first")
    assert file.read_text().startswith(f"{tmp_path / 'model'} --outfile ") and file.read_text().endswith(called)
    assert sorted(path.name for path in file.parent.iterdir()) == ["Modelfile", f"first-{kind}.gguf"]
    assert f"FROM ./first-{kind}.gguf" in (file.parent / "Modelfile").read_text()


def test_a_converter_that_fails_is_one_line_and_leaves_nothing(tools, tmp_path):
    (tools / "convert_hf_to_gguf.py").write_text("raise SystemExit('ERROR: Model Tiny is not supported')\n")
    with pytest.raises(UserError, match="^export.gguf: .*ended with status 1: ERROR: Model Tiny is not supported$"):
        write_gguf(tmp_path / "model", tmp_path / "gguf", Export(gguf="bf16", llama_cpp=str(tools)), "first")
    assert not (tmp_path / "gguf").exists()


def test_the_programs_are_found_by_option_variable_or_path_and_else_named(tools, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(UserError, match="llama.cpp's convert_hf_to_gguf.py, found none"):
        find_tools(Export(gguf="bf16"))
    with pytest.raises(UserError, match="llama.cpp's convert_hf_to_gguf.py"):
        find_tools(Export(gguf="bf16", llama_cpp=str(tmp_path / "nowhere")))
    monkeypatch.setenv("LLAMA_CPP", str(tools))
    assert find_tools(Export(gguf="q4_k_m")) == (tools / "convert_hf_to_gguf.py", tools / "build" / "bin" / "llama-quantize")
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", str(tools))
    (tools / "convert_hf_to_gguf.py").chmod(0o755)
    assert find_tools(Export(gguf="bf16")) == (tools / "convert_hf_to_gguf.py", None)


def test_four_bits_need_the_quantizer_which_may_be_on_path_beside_a_clone_that_was_not_built(tools, monkeypatch, tmp_path):
    programs = tmp_path / "programs"
    (tools / "build" / "bin").rename(programs)
    export = Export(gguf="q4_k_m", llama_cpp=str(tools))
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match="^export.gguf: expected llama.cpp's llama-quantize, found none in .*on PATH; get"):
        find_tools(export)
    monkeypatch.setenv("PATH", str(programs))
    file = write_gguf(tmp_path / "model", tmp_path / "gguf", export, "first")
    assert file.name == "first-q4_k_m.gguf" and file.read_text().endswith("--outtype bf16 Q4_K_M")
