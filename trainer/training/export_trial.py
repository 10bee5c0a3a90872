"""Try what the end of a run needs, before anything is trained.

These are settings that can be written, a path, space on the disk, a login at the hub, and llama.cpp's programs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.config import Config
from trainer.errors import UserError
from trainer.files import temporary_folder
from trainer.model.export import save_settings
from trainer.model.forward import unwrap_peft
from trainer.model.gguf import is_gguf
from trainer.model.llama_cpp import find_tools
from trainer.model.own_files import require_own_settings
from trainer.model.quantization import weight_count
from trainer.runtime.device import choose_device, compute_dtype
from trainer.training.publish import check_login
from trainer.training.run_folder import exports_adapter, exports_model


def try_export(config: Config, model: nn.Module, tokenizer: PreTrainedTokenizerBase, secured: bool = False) -> str:
    """Write all but the weights to a temporary folder, and return a line on the space that they take.

    `secured` says that the checkpoint before the export is there. Raises UserError for what would fail after the last step.
    """
    if config.export.push_to_hub is not None:
        check_login("export.push_to_hub")
    if config.export.gguf != "none":
        find_tools(config.export)
    place = _existing(Path(config.output))
    for option, name in (("model.path", config.model.path), ("model.config", config.model.config), ("lora.path", config.lora.path),
                         ("model.tokenizer", config.model.tokenizer)):
        found = Path(name or "").expanduser()
        if name and found.exists() and not is_gguf(found):
            require_own_settings(option, found if found.is_dir() else found.parent)
    try:
        with temporary_folder(place, "export-trial") as folder:
            save_settings(model, tokenizer, folder, exports_model(config))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"output: cannot write in {place}: {error.strerror or error}; free space, or choose another --output") from None
    except Exception as error:  # libraries check what they write in many ways
        raise UserError(f"export: the settings or tokenizer of {config.model.path or config.model.config} cannot be saved: "
                        f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; mend its files") from error
    return _space(config, model, place, secured)


def _space(config: Config, model: nn.Module, place: Path, secured: bool) -> str:
    """Return a line on the space that export and checkpoints take.

    Raises UserError if the disk lacks what the export takes.
    """
    width = compute_dtype(config.precision, choose_device(config.device)).itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = 0 if config.method == "full" else 4 * trained  # fp32
    whole = width * sum(map(weight_count, unwrap_peft(model).parameters())) if exports_model(config) else 0
    end = adapter or width * trained
    exported = exports_adapter(config) * adapter + whole
    need, free = exported + (0 if secured else end), shutil.disk_usage(place).free
    if need > free:
        raise UserError(f"output: expected {need / 1e9:.2f} GB of space for the export ({exported / 1e9:.2f}) and the checkpoint before "
                        f"it, found {free / 1e9:.2f} GB in {place}; free space, or choose another --output")
    periodic = f", each checkpoint {12 * trained / 1e9:.2f} GB at most" if config.checkpoint.every else ""
    return (f"about {exported / 1e9:.2f} GB, and {end / 1e9:.2f} GB for the checkpoint that is kept until it is whole{periodic}; "
            f"{free / 1e9:,.0f} GB are free")


def _existing(folder: Path) -> Path:
    """Return the nearest folder above or at a path that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
