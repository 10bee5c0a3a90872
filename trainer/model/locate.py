"""Find a model's folder or hub name and its tokenizer; report what is unfit in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from trainer.config import Model
from trainer.errors import UserError, require
from trainer.hub_names import is_hub_name
from trainer.json_files import read_object
from trainer.model.gguf import converted, is_gguf
from trainer.model.vocabulary import add_tokens

MOST_LAYERS = 10_000
TOKENIZER_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # not tokenizer_config.json, which has no tokens


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model.tokenizer`, or the model's own, with `model.new_tokens`.

    Raises UserError if there is none.
    """
    option = "model.tokenizer"
    source = _locate(option, model.tokenizer) if model.tokenizer else model_source(model)
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise UserError(f"{option}: no tokenizer in {folder}; set {option} to a folder or hub name that has one")
    with one_line_errors(option, source):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    longest = tokenizer.model_max_length
    require(isinstance(longest, (int, float)), option, f"a number as model_max_length in the tokenizer_config.json of {source}",
            f"{type(longest).__name__}; save the tokenizer again")
    add_tokens(tokenizer, model)
    return tokenizer


def model_source(model: Model) -> str:
    """Return where the model is described: a folder with weights, a config.json, or a hub name.

    Raises UserError where there is none.
    """
    if (model.path is None) == (model.config is None):
        raise UserError("model.path, model.config: expected exactly one of them, got " + ("neither" if model.path is None else "both"))
    if model.path is not None:
        if is_gguf(file := Path(model.path).expanduser()):
            return str(converted(file.resolve(), "model.path"))
        source = _locate("model.path", model.path)
        if Path(source).exists():
            _check_folder(Path(source))
        return source
    path = Path(model.config).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"model.config: expected a config.json or its folder, found no file {file}")
    return str(file.resolve())


def _locate(option: str, name: str) -> str:
    """Return the absolute path of an existing file or folder; else `name`, if it may be a hub name."""
    path = Path(name).expanduser()
    if path.exists():
        return str(path.resolve())
    if not is_hub_name(name):
        raise UserError(f"{option}: there is no folder {name}")
    return name


def _check_folder(folder: Path) -> None:
    """Check that a local folder holds a config and safetensors weights. Raises UserError."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_object("model.path", folder / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(f"model.path: {folder} holds an adapter; set lora.path to it and model.path to its base model ({base})")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: expected a model folder with config.json, found none in {folder}")
    require_own_weights("model.path", folder)
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    if pickled := next(folder.glob("pytorch_model*.bin"), None):
        raise UserError(
            f"model.path: {folder} has pickled weights only ({pickled.name}), which can run code; only safetensors are loaded. "
            "If you trust it, convert it: AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)")
    raise UserError(f"model.path: expected model.safetensors (or its index), found none in {folder}")


def require_own_weights(option: str, folder: Path) -> None:
    """Check that a folder's index of weights names only safetensors files in that folder.

    transformers would open a pickle that an index names, and files of any other folder. Raises UserError where one does.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        content = read_object(option, index)
        names = content.get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{option}: expected the files of weights in {index}, under weight_map, found none; save the model again")
        for name in names.values():
            if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
                raise UserError(f"{option}: {index} names {str(name)[:100]!r}: only *.safetensors files of its own folder are loaded; "
                                "save the model again with save_pretrained")


def require_own_weights_of_hub(option: str, name: str) -> None:
    """Check the index of weights of a model on the hub, as `require_own_weights` does that of a folder.

    A name that is a path, or that the hub does not serve, is left to who loads it.
    """
    if not Path(name).exists() and (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_gated_repo=False,
                                                         _raise_exceptions_for_missing_entries=False,
                                                         _raise_exceptions_for_connection_errors=False)):
        require_own_weights(option, Path(index).parent)


def require_buildable(option: str, source: str | Path, config: PreTrainedConfig) -> None:
    """Raise UserError for a config of more layers than any memory holds: they are made one by one."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    require(not isinstance(layers, int) or layers <= MOST_LAYERS, option, f"at most {MOST_LAYERS:,} layers in the config of {source}",
            f"num_hidden_layers {layers}")


@contextmanager
def one_line_errors(option: str, source: str | Path) -> Iterator[None]:
    """Turn the libraries' errors while loading a model into one-line UserErrors.

    Their warnings are silenced.
    """
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: the files may hold anything
        why = " ".join(str(error).split()).partition(" Model type should be one of ")[0]
        if "trust_remote_code" in why:
            why = "it needs Python code of its own; add --model.trust_remote_code true if you trust it"
        elif not Path(source).exists():
            why = f"no such folder here, and the hub did not serve this name ({type(error).__name__})"
        if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):  # their text alone says little: 'NoneType' object ...
            why = f"a file of it holds what is not expected there ({type(error).__name__}: {why})"
        raise UserError(f"{option}: cannot load {source}: {why[:300]}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
