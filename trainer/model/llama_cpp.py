"""Write a model folder as GGUF by llama.cpp's own converter, with a Modelfile for Ollama.

The converter is a script of llama.cpp's repository. It writes the chat template into the file. Four bits need its program llama-quantize
too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from trainer.config import Export
from trainer.errors import UserError, last_error_line
from trainer.files import atomic_folder

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
FOLDER = "LLAMA_CPP"  # the environment variable that names llama.cpp's folder
QUANTIZED = {"q4_k_m": "bf16"}  # types that the quantizer makes, and those that it makes them of


def find_tools(export: Export) -> tuple[Path, Path | None]:
    """Return llama.cpp's converter, and its quantizer where the type needs it.

    They are looked for in the folder of the option or of the environment variable, without one on PATH; the quantizer on PATH too if it is
    not in the folder. Raises UserError if one is not there.
    """
    names = [CONVERTER, *([QUANTIZER] if export.gguf in QUANTIZED else [])]
    found = [_find(name, export.llama_cpp or os.environ.get(FOLDER)) for name in names]
    if missing := [name for name, path in zip(names, found) if path is None]:
        raise UserError(f"export.gguf: expected llama.cpp's {missing[0]}, found none in export.llama_cpp, in the folder that the variable "
                        f"{FOLDER} names, or on PATH; get llama.cpp from https://github.com/ggml-org/llama.cpp and name its folder")
    return found[0], found[1] if len(found) > 1 else None


def _find(name: str, folder: str | None) -> Path | None:
    if folder is None:
        return Path(found) if (found := shutil.which(name)) else None
    home = Path(folder).expanduser()
    built = next((path for path in (home / name, home / "build" / "bin" / name, home / "bin" / name) if path.is_file()), None)
    return built or (_find(name, None) if name == QUANTIZER else None)  # a clone that was not built, beside an installed llama-quantize


def write_gguf(model: Path, folder: Path, export: Export, name: str) -> Path:
    """Write a folder with NAME-TYPE.gguf and a Modelfile, and return the GGUF file.

    Raises UserError, which has the last line of the program's errors, if llama.cpp cannot convert the model.
    """
    converter, quantizer = find_tools(export)
    file = f"{name}-{export.gguf}.gguf"
    with atomic_folder(folder) as made:
        first = made / (file if quantizer is None else f"{name}.gguf")
        _run([sys.executable, converter, model, "--outfile", first, "--outtype", QUANTIZED.get(export.gguf, export.gguf)], made)
        if quantizer is not None:
            _run([quantizer, first, made / file, export.gguf.upper()], made)
            first.unlink()
        (made / "Modelfile").write_text(f"# ollama create {name} -f Modelfile\nFROM ./{file}\n")
    return folder / file


def _run(command: list[str | Path], folder: Path) -> None:
    log = folder / "log"
    with log.open("wb") as file:
        status = subprocess.run([*map(str, command)], stdout=file, stderr=file, stdin=subprocess.DEVNULL, check=False).returncode
    if status:
        raise UserError(f"export.gguf: {Path(command[0]).name} {Path(command[1]).name} ended with status {status}: {last_error_line(log)}")
    log.unlink()
