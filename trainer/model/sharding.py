"""Shard a model over ranks with torch's FSDP2, and gather it again for the export.

Each rank keeps a part of every weight, its rows. A decoder layer is gathered in one collective before its forward, freed after it, and
gathered again for its backward, whose gradients are summed and scattered at once. Embedding, last norm and head, which may share a
weight, are one group that stays gathered from the forward to the end of the backward, so the loss gathers the head no more than once a
pack, however many chunks of logits it computes. Weights that train are kept as fp32 masters, and with full fine-tuning gathered in the
compute dtype; the codes of a 4-bit base are sharded like any weight, their scales stay whole on every rank.

Shards are made layer by layer from a model that a rank has loaded as a whole: on the host, whose pages of a checkpoint in the compute
dtype are those of the file, which ranks share; a 4-bit base on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from trainer.config import Fsdp
from trainer.errors import UserError, require
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import decoder_layers
from trainer.model.packed_attention import SHARDED_FORWARD, decoder_states, is_packed
from trainer.model.quantization import quantized_layers, without_quant_states
from trainer.model.vocabulary import wrappers
from trainer.runtime.distributed import Distributed


def shard(model: nn.Module, options: Fsdp, dtype: torch.dtype, device: torch.device, dist: Distributed) -> None:
    """Shard `model`, which computes in `dtype`, in place and move it to `device`.

    Sums of gradients over the ranks are not divided. Raises UserError for a model that cannot be sharded.
    """
    base = unwrap_peft(model)
    _check(base, dtype)
    trains_base = any(p.requires_grad for p in base.get_input_embeddings().parameters())
    policy = MixedPrecisionPolicy(param_dtype=dtype if trains_base else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if options.cpu_offload else OffloadPolicy()
    mesh = _mesh(options, device, dist)
    for layer in reversed(decoder_layers(base)):
        _to_masters(layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=options.reshard_after_forward)
    _to_masters(base)
    fully_shard(base, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for part in parts(base):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    base.set_reduce_scatter_unused_params(True)  # a rank whose tokens reach no expert still takes part
    setattr(base, SHARDED_FORWARD, MethodType(decoder_states, base))
    register_fsdp_forward_method(base, SHARDED_FORWARD)


def describe(options: Fsdp, ranks: int) -> str:
    """Return the console line on how the weights are divided."""
    size = options.shard_size or ranks
    copies = f", in {ranks // size} copies" if size < ranks else ""
    offloaded = ", shards and optimizer states on the host" if options.cpu_offload else ""
    return f"fsdp: weights, gradients and optimizer states are sharded over {size} ranks{copies}{offloaded}"


def parts(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules that are gathered by themselves."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def keep_head_gathered(model: nn.Module, keep: bool) -> None:
    """Keep embedding, last norm and head gathered after the next backward, or free them.

    Their weights change in an update alone.
    """
    unwrap_peft(model).set_reshard_after_backward(not keep, recurse=False)


def _check(base: nn.Module, dtype: torch.dtype) -> None:
    """Refuse models whose layers cannot be gathered one by one, in step on all ranks."""
    name, layers = base.config.model_type, decoder_layers(base)
    require(bool(layers), "fsdp.enabled", "a model with decoder layers that transformers marks as such", name)
    require(is_packed(base), "fsdp.enabled", "a model that runs a pack in one call", f"{name}, whose samples run one at a time")
    require(not wrappers(base), "fsdp.enabled", "no model.new_tokens or lora.modules_to_save beside it, nor an adapter that has them",
            "trained rows of the vocabulary")
    owned = [p for layer in layers for p in layer.parameters()]
    require(len(owned) == len({*owned}), "fsdp.enabled", "layers with weights of their own", f"{name}, whose layers share some")
    mixed = {p.dtype for p in base.parameters() if p.requires_grad} - {dtype, torch.float32}
    whole = base.get_input_embeddings().weight.requires_grad
    if mixed or (whole and any(p.dtype != dtype for p in base.parameters() if p.is_floating_point())):
        raise UserError(f"fsdp.enabled: expected trained weights of one dtype, found several in {name}; use --precision fp32")


def _mesh(options: Fsdp, device: torch.device, dist: Distributed) -> DeviceMesh:
    """Return the ranks in rows that each hold one model."""
    size = options.shard_size or dist.size
    if dist.size % size:
        raise UserError(f"fsdp.shard_size: expected a divisor of the {dist.size} ranks, got {size}")
    if size == dist.size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (dist.size // size, size), mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def _to_masters(module: nn.Module) -> None:
    """Give the weights that train, and are not sharded yet, the precision of masters."""
    for p in module.parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            p.data = p.data.float()


# ---------------------------------------------------------------- the whole model, for the export


def weightless_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that is not sharded yet, with its weights on the meta device."""
    without_quant_states(quantized_layers(model))
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def gather(model: nn.Module, into: nn.Module, dist: Distributed) -> None:
    """Put the weights of a sharded model into its weightless copy, on the host of rank 0.

    They get the dtypes of the copy. Every rank takes part: one weight at a time is whole on all of them.
    """
    for part in parts(model):
        part.reshard()
    for shards, empty in zip(model.parameters(), list(into.parameters()), strict=True):
        full = _whole(shards, empty.dtype)
        if dist.is_main:
            torch.utils.swap_tensors(empty, nn.Parameter(full.cpu(), requires_grad=empty.requires_grad))


def _whole(shards: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the whole weight of which every rank has a part, gathered on the device of the mesh."""
    own = shards.detach().to_local().to(shards.device_mesh.device_type, dtype)
    return DTensor.from_local(own, shards.device_mesh, shards.placements, run_check=False, shape=shards.shape,
                              stride=shards.stride()).full_tensor()
