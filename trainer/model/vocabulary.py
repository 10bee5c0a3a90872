"""Add tokens to a model, and train rows of its embedding and head, or both whole, beside an adapter.

PEFT keeps the rows of new tokens as "trainable tokens": the adapter holds these rows of the embedding, and of a head that is not tied to
it, in full, in place of what the resized base has there. `lora.modules_to_save` trains and saves the embedding or the head whole.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import Lora, Model
from trainer.errors import UserError
from trainer.json_files import read_object
from trainer.model.text_part import head_layer


def new_tokens(model: Model) -> list[str]:
    """Return the tokens that `model.new_tokens` lists, or its file has on lines. Raises UserError."""
    if isinstance(model.new_tokens, list):
        tokens = model.new_tokens
    else:
        try:
            tokens = [line for line in Path(model.new_tokens).expanduser().read_text(encoding="utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("model.new_tokens: expected a list of tokens, or a file with one on each line, cannot read "
                            f"{model.new_tokens}: {error}; check the path") from None
    if len(set(tokens)) < len(tokens) or "" in tokens:
        raise UserError("model.new_tokens: expected different tokens that are not empty, found one twice or empty; remove it")
    return tokens


def add_tokens(tokenizer: PreTrainedTokenizerBase, model: Model) -> None:
    """Add the tokens of `model.new_tokens` to a tokenizer. Raises UserError for those that it has."""
    tokens = new_tokens(model)
    if known := sorted(set(tokens) & tokenizer.get_vocab().keys()):
        raise UserError(f"model.new_tokens: expected tokens that the tokenizer lacks, it has {known[0]!r}; remove it from the list")
    tokenizer.add_tokens(tokens)


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Model, adapter: str | None) -> None:
    """Make room for new tokens, those of `model.new_tokens` and of a saved adapter that has some.

    Their rows start as the mean of all others. Raises UserError for a model that cannot have them, or a tokenizer with other tokens than
    the embedding has rows.
    """
    try:
        embedding = model.get_input_embeddings()
        rows = embedding.weight.shape[0]
    except NotImplementedError:
        raise UserError(f"model: expected a model that reads text tokens, {type(model).__name__} names no embedding of them; "
                        "train another model") from None
    tokens = new_tokens(options)
    if tokens:
        _check_can_grow(model, embedding, rows)
    if len(tokenizer) > rows:
        if not tokens and not trains_vocabulary(adapter):
            raise UserError(f"model.tokenizer: expected at most {rows} tokens, the rows of the model's embedding, found {len(tokenizer)}; "
                            "use the model's own tokenizer, or a config with a larger vocab_size")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokens and model.device.type != "meta":
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens), device=model.device)
        for weight in {model.get_input_embeddings().weight, head_layer(model).weight}:
            old = torch.ones(len(weight), dtype=torch.bool, device=model.device)
            old[ids] = False
            old[rows:] = False
            weight[ids] = weight[old].float().mean(dim=0).to(weight.dtype)


def _check_can_grow(model: PreTrainedModel, embedding: nn.Module, rows: int) -> None:
    """Refuse models that hold more than an embedding and a head for each token."""
    others = [name for name, module in model.named_modules()
              if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings == rows]
    if others:
        raise UserError(f"model.new_tokens: {type(model).__name__} also holds rows for each token in {others[0]}, which are not added; "
                        "use tokens that the tokenizer has")
    if head_layer(model).bias is not None:
        raise UserError(f"model.new_tokens: the head of {type(model).__name__} has a bias, which PEFT leaves out of rows that it trains; "
                        "use tokens that the tokenizer has")


def trains_vocabulary(adapter: str | None, option: str = "lora.path") -> bool:
    """Return whether a saved adapter has rows of an embedding.

    Raises UserError, which names the option, where its configuration cannot be read.
    """
    file = Path(adapter or "").expanduser() / "adapter_config.json"
    if adapter is None or not file.is_file():
        return False
    saved = read_object(option, file)
    return bool(saved.get("trainable_token_indices") or saved.get("modules_to_save"))


def trained_vocabulary(model: PreTrainedModel, lora: Lora, ids: list[int]) -> dict:
    """Return the options of LoraConfig that train rows `ids` and `lora.modules_to_save`.

    Raises UserError for modules that are neither the embedding nor the head.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = names[model.get_input_embeddings()], names[head_layer(model)]
    wanted = [name for end in lora.modules_to_save for name in (embedding, head) if f".{name}".endswith(f".{end}")]
    if len(wanted) < len(lora.modules_to_save):
        raise UserError(f"lora.modules_to_save: expected {embedding.rpartition('.')[2]} or {head.rpartition('.')[2]}, the embedding and "
                        f"the head, got {lora.modules_to_save}; name other layers in lora.target_modules, or use --method full")
    tied = model.get_input_embeddings().weight is head_layer(model).weight
    whole = [embedding] if tied and wanted else list(dict.fromkeys(wanted))
    by_row = {name: ids for name in ([embedding] if tied else [embedding, head]) if ids and name not in whole}
    return {"modules_to_save": whole or None, "trainable_token_indices": by_row or None, "ensure_weight_tying": tied and bool(whole)}


# ---------------------------------------------------------------- reading


def wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    """Return PEFT's wrappers of embedding and head, by the names of what they wrap."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


def check_wrappers(model: PreTrainedModel) -> None:
    """Check that a loaded adapter trains nothing else beside it than what we can run and merge.

    Raises ValueError.
    """
    embedding, head, found = model.get_input_embeddings(), head_layer(model), wrappers(model)
    if others := [name for name, wrapper in found.items() if wrapper is not embedding and wrapper is not head]:
        raise ValueError(f"it trains {others[0]} whole; expected at most the embedding and the head in modules_to_save")
    tied = without_wrapper(embedding).weight is without_wrapper(head).weight
    weights = [list(wrapper.parameters())[-1] for wrapper in found.values()]
    if tied and found and (len(weights) == 1 or weights[0] is not weights[1]):
        raise ValueError("it trains the embedding or the head apart, which the base ties; expected ensure_weight_tying")


def without_wrapper(layer: nn.Module) -> nn.Module:
    """Return the layer that one of PEFT's wrappers is around, or `layer`."""
    return layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer


def with_trained_rows(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which what wrappers train stands under the names of what they wrap."""
    for name, wrapper in wrappers(model).items():
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{part}": getattr(wrapper, part).detach() for part in wrapper.original_module.state_dict()}
    embedding, head = model.get_input_embeddings(), head_layer(model)
    if wrappers(model) and without_wrapper(embedding).weight is without_wrapper(head).weight:
        names = {module: name for name, module in model.named_modules()}
        state[f"{names[head]}.weight"] = state[f"{names[embedding]}.weight"]
    return state


def describe(model: PeftModel) -> dict[str, str]:
    """Return the startup report on trained rows as {name: text}; empty without any."""
    parts = [f"{name} whole" if isinstance(wrapper, ModulesToSaveWrapper) else f"{len(indices)} rows of {name}"
             for name, wrapper in wrappers(model.get_base_model()).items()
             for indices in [[] if isinstance(wrapper, ModulesToSaveWrapper) else
                             next(iter(wrapper.token_adapter.token_indices.values()))]]
    return {"trained beside the adapter": ", ".join(parts)} if parts else {}
