"""Show by trial that a model computes each sample of a pack as it does that sample alone.

A model whose code we have not read may mix samples in many ways: convolutions and states that go on across a boundary, attention that
transformers' interface does not describe, positions that do not start again. Nothing is trusted that was not shown here. The probe runs
a few short samples, alone and in packs, and compares every token by itself:

    with the sample alone, in stock attention       detects whatever the pack computes differently
    with the same pack, whose other samples differ   detects a leak, more finely: the arithmetic is the same, only the neighbours change

It runs in fp32 whatever the dtype of the run, one layer at a time, so that a leak does not hide in rounding. How much rounding may
differ is measured too, and no constant: by the sample's embeddings moved by one unit in the last place, and by the sample in a batch.
Fresh weights are small, and what training may make of them is not: so the same is shown with the matrices of one layer of each kind
larger, eight times or as far as rounding errors do not grow with them until nothing can be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.model.mixers import run_by_sample
from trainer.model.pack_context import pack_of, run_pack
from trainer.model.packed_attention import PACKED, decoder, last_hidden_states, set_attention

LENGTHS = (11, 1, 19, 6)  # of the samples; their sum is a prime, so that it is no model's width
AMPLIFIED = 8.0
LADDER = (AMPLIFIED, 4.0, 2.0)
FROM_ALONE = 64.0  # allowed error of a sample in a pack, in units of the measured rounding
FROM_NEIGHBOURS = 4.0  # the same where nothing but the neighbours changes
BLIND = 1e-2  # a tolerance above this shows nothing
TRIES = 3  # with other tokens: a token may lie where rounding decides which expert it goes to


def probe_packing(model: PreTrainedModel) -> str | None:
    """Prepare `model` for packs and return why it cannot run them in one call; None: it can.

    Modules that mix tokens and are not attention through transformers' interface run sample by sample from then on. Attention is as it
    was before; the caller switches it on. Weights, dtype and mode do not change.
    """
    if attends_by_itself(model):
        return "its code does not use the attention interface of transformers"
    was_training, dtype = model.training, torch.promote_types(model.dtype, torch.float32)
    model.eval()
    try:
        with torch.no_grad():
            for mixer in find_mixers(model, dtype):
                run_by_sample(mixer)
            return _fault(model, dtype)
    except ValueError as error:  # refused by our attention
        return str(error).splitlines()[0]
    except (TypeError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        return f"its code fails in a pack, {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    finally:
        model.train(was_training)


def attends_by_itself(model: PreTrainedModel) -> bool:
    """Return whether the model has attention that ignores its attention implementation."""
    return not decoder(model)._can_set_attn_implementation()


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of the decoder, in order."""
    return [module for module in decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def one_layer_of_each_kind(model: PreTrainedModel) -> list[nn.Module]:
    """Return the last layer of each kind.

    Layers whose modules have the same names and classes are of one kind.
    """
    kinds = {tuple((name, type(module)) for name, module in layer.named_modules()): layer for layer in layers(model)}
    return list(kinds.values())


# ---------------------------------------------------------------- the comparison


class Blind(Exception):
    """Rounding errors are too large to see whether samples mix."""


def _fault(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Return what differs between packs and single samples; None: nothing."""
    try:
        if fault := _repeated(model, dtype, None, 1.0):
            return fault
    except Blind as error:
        return str(error)
    for layer in one_layer_of_each_kind(model):
        for factor in LADDER:
            try:
                if fault := _repeated(model, dtype, layer, factor):
                    return fault
                break
            except Blind:
                continue
    return None


def _repeated(model: PreTrainedModel, dtype: torch.dtype, layer: nn.Module | None, factor: float) -> str | None:
    """Return what differs in every try, None if not in one. Raises Blind if none shows anything."""
    outcomes: list[str | Blind] = []
    for seed in range(TRIES):
        try:
            outcome = _one_try(model, dtype, layer, factor, torch.Generator().manual_seed(seed))
        except Blind as error:
            outcome = error
        if outcome is None:
            return None
        outcomes.append(outcome)
    faults = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if not faults:
        raise outcomes[-1]
    return faults[-1]


def _one_try(model: PreTrainedModel, dtype: torch.dtype, layer: nn.Module | None, factor: float, generator: torch.Generator) -> str | None:
    """Return what differs with one draw of tokens and one layer amplified; None: nothing. Raises Blind."""
    samples, others = random_samples(model, generator), random_samples(model, generator)
    with higher_precision(model, dtype, layer, factor):
        alone = torch.cat([_alone(model, sample[None])[0] for sample in samples])
        rounding = max(_rounding(model, sample, dtype) for sample in samples)
        if not rounding * FROM_ALONE <= BLIND:
            raise Blind(f"its rounding errors grow to {rounding:.0e} of a token, too large to see whether samples mix")
        with packed_attention_on(model):
            together = _together(model, samples)
            replaced = [other if i % 2 == 0 else sample for i, (sample, other) in enumerate(zip(samples, others, strict=True))]
            with_others = _together(model, replaced)
    kept = torch.cat([torch.full((length,), i % 2 == 1) for i, length in enumerate(LENGTHS)]).to(together.device)
    leak, error = token_error(with_others[kept], together[kept]), token_error(together, alone)
    if not leak <= FROM_NEIGHBOURS * rounding:
        return f"samples in one pack change each other, by {leak:.1e} of a token"
    if not error <= FROM_ALONE * rounding:
        return f"a sample in a pack differs from the sample alone, by {error:.1e} of a token"
    return None


def token_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error of a token [T,W], relative to its own norm."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _rounding(model: PreTrainedModel, sample: Tensor, dtype: torch.dtype) -> float:
    """Return how far rounding alone moves a token of this sample."""
    alone = _alone(model, sample[None])
    batch = _alone(model, sample.expand(3, -1))

    def move_by_one_ulp(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        signs = torch.ones_like(output).flatten()
        signs[::2] = -1
        return output * (1 + torch.finfo(dtype).eps * signs.view_as(output))

    handle = model.get_input_embeddings().register_forward_hook(move_by_one_ulp)
    try:
        moved = _alone(model, sample[None])
    finally:
        handle.remove()
    return max(token_error(batch[2], alone[0]), token_error(moved[0], alone[0]))


def random_samples(model: PreTrainedModel, generator: torch.Generator) -> list[Tensor]:
    """Return samples of random tokens int64[L], of LENGTHS."""
    vocabulary = decoder(model).config.get_text_config().vocab_size
    return [torch.randint(vocabulary, (length,), generator=generator).to(model.device) for length in LENGTHS]


def _alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the last hidden states [B,T,W] of rows that are one sample each."""
    return last_hidden_states(model, ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))


def _together(model: PreTrainedModel, samples: list[Tensor]) -> Tensor:
    """Return the last hidden states [T,W] of samples in one pack."""
    positions = torch.cat([torch.arange(len(sample), device=model.device) for sample in samples])
    with run_pack(pack_of(_bounds(samples), max(LENGTHS))):
        return last_hidden_states(model, torch.cat(samples)[None], positions[None])[0]


def _bounds(samples: list[Tensor]) -> Tensor:
    """Return where samples begin in a pack of them: int32[n + 1]."""
    return torch.tensor([0, *map(len, samples)], device=samples[0].device).cumsum(0, dtype=torch.int32)


@contextmanager
def packed_attention_on(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with packed attention inside this context."""
    stock = decoder(model).config._attn_implementation
    set_attention(model, PACKED)
    try:
        yield
    finally:
        set_attention(model, stock)


# ---------------------------------------------------------------- modules that mix samples


def find_mixers(model: PreTrainedModel, dtype: torch.dtype) -> list[nn.Module]:
    """Return the modules in which one sample of a pack changes the next.

    They are looked for among the parts of each layer, the largest first. One layer of each kind is tried; the others are alike.
    """
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[module] = args, kwargs

    tried = one_layer_of_each_kind(model)
    with ExitStack() as stack:
        for layer in tried:
            for part in layer.modules():
                stack.callback(part.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.enter_context(higher_precision(model, dtype))
        stack.enter_context(packed_attention_on(model))
        samples = random_samples(model, torch.Generator().manual_seed(0))
        _together(model, samples)
    with packed_attention_on(model), run_pack(pack_of(_bounds(samples), max(LENGTHS))):
        found = {place for layer in tried for place in _mixers_in(layer, layer, "", calls, dtype)}
    return [part for layer in layers(model) for name, part in layer.named_modules() if (type(layer), name, type(part)) in found]


def _mixers_in(layer: nn.Module, parent: nn.Module, prefix: str, calls: dict, dtype: torch.dtype) -> Iterator[tuple[type, str, type]]:
    """Yield the layer's class, and name and class of each of its mixers."""
    for name, part in parent.named_children():
        if part not in calls:
            yield from _mixers_in(layer, part, f"{prefix}{name}.", calls, dtype)
        elif _leaks(layer, part, *calls[part], dtype):
            yield type(layer), prefix + name, type(part)


def _leaks(layer: nn.Module, part: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype) -> bool:
    """Return whether another first sample in the input [1,T,W] of `part` changes other samples' outputs."""
    tokens, first = sum(LENGTHS), LENGTHS[0]
    inputs = [value for value in (*args, *kwargs.values())
              if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == (1, tokens)]
    if not inputs:
        return False
    hidden = inputs[0]
    changed = torch.cat([hidden[:, :first].flip(-1).neg(), hidden[:, first:]], dim=1)
    rounded = hidden * (1 + torch.finfo(dtype).eps)

    def output(replacement: Tensor) -> Tensor | None:
        def swap(value: object) -> object:
            return replacement if value is hidden else value

        out = part(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
        return out[0] if isinstance(out, tuple) else out

    with swapped(layer, dtype, AMPLIFIED):
        outputs = [output(x) for x in (hidden, changed, rounded)]
    if not isinstance(outputs[0], Tensor) or outputs[0].shape[:2] != (1, tokens):
        return False
    before, after, noise = (out[0, first:].flatten(1) for out in outputs)
    return not token_error(after, before) <= FROM_NEIGHBOURS * token_error(noise, before)


# ---------------------------------------------------------------- precision


@contextmanager
def higher_precision(model: PreTrainedModel, dtype: torch.dtype, amplified: nn.Module | None = None, factor: float = 1.0
                     ) -> Iterator[None]:
    """Compute the decoder in `dtype` inside this context, one layer with matrices times `factor`.

    A layer's weights are in `dtype` only while it runs, so memory grows by one layer.
    """
    inside = {part for layer in layers(model) for part in layer.modules()}
    embeddings = model.get_input_embeddings()
    outside = [part for part in decoder(model).modules() if part not in inside and part._parameters]
    with ExitStack() as stack:
        for part in outside:
            if isinstance(part, nn.Embedding):
                stack.callback(part.register_forward_hook(lambda module, args, output: output.to(dtype)).remove)
            else:
                stack.enter_context(swapped(part, dtype, 1.0))
        if embeddings not in outside:
            stack.callback(embeddings.register_forward_hook(lambda module, args, output: output.to(dtype)).remove)
        for layer in layers(model):
            _swap_while_running(stack, layer, dtype, factor if layer is amplified else 1.0)
        yield


def _swap_while_running(stack: ExitStack, layer: nn.Module, dtype: torch.dtype, factor: float) -> None:
    """Let a layer's weights be in `dtype` during its forward, until the stack closes."""
    running = ExitStack()

    def enter(module: nn.Module, args: tuple) -> None:
        running.enter_context(swapped(module, dtype, factor))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        running.close()

    stack.callback(layer.register_forward_pre_hook(enter).remove)
    stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
    stack.callback(running.close)


@contextmanager
def swapped(module: nn.Module, dtype: torch.dtype, factor: float) -> Iterator[None]:
    """Give the weights of `module` another dtype, and its matrices a factor, inside this context."""
    old = [(parameter, parameter.data) for parameter in module.parameters() if parameter.is_floating_point()]
    four_bit = [(part, part.compute_dtype) for part in module.modules() if hasattr(part, "compute_dtype")]
    try:
        for parameter, data in old:
            new = data.to(dtype)
            parameter.data = new * factor if parameter.ndim > 1 and factor != 1.0 else new
        for part, _ in four_bit:
            part.compute_dtype = dtype
        yield
    finally:
        for parameter, data in old:
            parameter.data = data
        for part, compute in four_bit:
            part.compute_dtype = compute
