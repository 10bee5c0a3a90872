"""Load a model and its tokenizer, and check that they fit each other and our packed attention."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from trainer.config import Config, Model
from trainer.errors import UserError
from trainer.model import quantization
from trainer.model.families import family_of
from trainer.model.forward import lm_head
from trainer.model.locate import load_tokenizer, model_source, one_line_errors, require_buildable, require_own_weights_of_hub
from trainer.model.packed_attention import PACKED, decoder, last_hidden_states, refuse_mask, set_attention
from trainer.model.packing_probe import probe_packing
from trainer.model.text_part import auto_class, is_wrapped, keep_text_part
from trainer.model.vocabulary import fit_vocabulary
from trainer.patterns import require_bounded
from trainer.runtime.device import compute_dtype

logger = logging.getLogger(__name__)


def load_model(config: Config, device: torch.device | str, on_host: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of `config.model` and its tokenizer, in the compute dtype on `device`.

    With `on_host` it is in that dtype on the CPU, to be moved later.

    Of a checkpoint that also reads images or sound only the text model is kept (`keep_text_part`).

    A model that is only described gets random weights, drawn with `config.seed`. With bf16, fp32 masters made from the weights start at
    the rounded values, which matters only for full fine-tuning of a checkpoint that is itself fp32; precision fp32 keeps every bit. A
    QLoRA base has its linear layers in 4 bits. Raises UserError if something is missing or does not fit.
    """
    device = torch.device(device)
    dtype, source = compute_dtype(config.precision, device), model_source(config.model)
    device = torch.device("cpu") if on_host else device
    tokenizer = load_tokenizer(config.model)
    if config.model.path is not None:
        model = _load_weights(config, source, dtype, device)
    else:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            model = _without_weights(config.model, source, dtype, device)
    fit_vocabulary(model, tokenizer, config.model, config.lora.path)
    use_packed_attention(model)
    return model, tokenizer


def meta_model(config: Config) -> PreTrainedModel:
    """Return the model of `config.model` on the meta device, after the checks that need no weights."""
    source = model_source(config.model)
    if config.model.path is not None:
        _quantization_config(config, source, torch.float32)
    model = _without_weights(config.model, source, torch.float32, torch.device("meta"))
    fit_vocabulary(model, load_tokenizer(config.model), config.model, config.lora.path)
    return model


def weights_fingerprint(model: Model) -> str | None:
    """Return what identifies base weights without reading them.

    Of a folder these are file names, sizes and times, of a hub model its commit. None for random weights, which the seed determines.
    """
    if model.path is None:
        return None
    folder = Path(model_source(model))
    if not folder.is_dir():
        return extract_commit_hash(cached_file(model.path, CONFIG_NAME), None)
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()[:16]


def _quantization_config(config: Config, source: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how from_pretrained quantises the model, or None.

    Only a dense checkpoint is quantised, and only for the method qlora. Raises UserError for a checkpoint that the method cannot use.
    """
    found = _found_config(config.model, source)
    quantized = quantization.is_nf4_checkpoint(source, found, config.method)
    if not quantized and config.method != "qlora":
        return None
    on_meta = _without_weights(config.model, source, dtype, torch.device("meta"))
    if quantized:
        require_bounded(f"model.path: {source}: quantization_config", quantization.saved_patterns(found),
                        [name for name, _ in on_meta.named_modules()])
        return None
    return quantization.nf4_config(config.quantization, on_meta, dtype)


def _load_weights(config: Config, source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the checkpoint's text model.

    Raises UserError for weights that are missing or of other shapes than its config's.
    """
    quantization_config = _quantization_config(config, source, dtype)
    own_class = auto_class(_found_config(config.model, source))
    with one_line_errors("model.path", source):
        require_own_weights_of_hub("model.path", source)
        loaded, info = own_class.from_pretrained(
            source, dtype=dtype, device_map=device if device.type == "cuda" else None, use_safetensors=True,
            trust_remote_code=config.model.trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True,
            **({} if quantization_config is None else {"quantization_config": quantization_config}))
    keep_text_part(loaded)
    names = loaded.state_dict().keys()
    if mismatched := sorted(key for key in info["mismatched_keys"] if key[0] in names):
        name, found, expected = mismatched[0]
        raise UserError(f"model.path: {len(mismatched)} weights in {source} do not fit its config.json: "
                        f"expected {tuple(expected)} for {name}, found {tuple(found)}")
    if missing := sorted(names & info["missing_keys"]):
        raise UserError(f"model.path: {source} lacks {len(missing)} weights of {type(loaded).__name__}, such as {missing[0]}")
    quantization.prepare_quantized(loaded, dtype)
    return loaded


def _without_weights(model: Model, source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the text model that a config describes, with random weights.

    On the meta device it takes no memory. Without a checkpoint, whose other parts an export adds again, a wrapped model's text model is one
    by itself.
    """
    found = _found_config(model, source)
    if model.path is None:
        found = found.get_text_config()
    with one_line_errors("model.path" if model.path else "model.config", source), torch.device(device):
        made = auto_class(found).from_config(found, dtype=dtype, trust_remote_code=model.trust_remote_code)
    keep_text_part(made)
    return made


def _found_config(model: Model, source: str) -> PreTrainedConfig:
    """Read the config of a model. Raises UserError for one that cannot be built."""
    option = "model.path" if model.path else "model.config"
    with one_line_errors(option, source):
        found = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    require_buildable(option, source, found)
    return found


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the model run a pack in one call.

    A family whose row in FAMILIES does not vouch for it must first pass a probe that samples do not affect each other.
    """
    family = family_of(model)
    if family is None or family.probed or is_wrapped(model):
        _check_head(model)
    if family is None or family.probed:
        if fault := probe_packing(model):
            logger.warning("%s cannot run packed, its samples go through the model one at a time: %s", model.config.model_type, fault)
            return
    set_attention(model, PACKED)
    decoder(model).register_forward_pre_hook(refuse_mask, with_kwargs=True)


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Check that the decoder and `lm_head` give the logits of the model's own forward.

    Raises UserError if they do not.
    """
    settings = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    special = {value for name, value in settings.items() if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    ids = torch.tensor([[i for i in range(len(special) + 8) if i not in special][:8]], device=model.device)
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise UserError(f"model: {type(model).__name__} does not run on text alone ({' '.join(str(error).split())[:200]}); "
                        "train another model") from error
    try:
        hidden = last_hidden_states(model, ids, torch.arange(8, device=model.device)[None])
        error = float((lm_head(model).logits(hidden) - expected).norm() / expected.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError):  # its decoder, head or their shapes are others than we know
        error = float("inf")
    if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise UserError(f"model: expected a head that is a linear layer, with a scale or soft cap that we know, found another in "
                        f"{model.config.model_type}; train another model")
