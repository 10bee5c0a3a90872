"""Update the shards of trainable weights that a rank has with AdamW, all of them in one pass.

The shards are fp32 masters, which FSDP2 gathers in the compute dtype, and it sums the gradients of a backward over the ranks into them. So
nothing is copied, and a step is one fused update of torch over all shards; the gradient norm is the one of all ranks, the only sum over
ranks of its own that a step needs. As with one process, a step whose norm is not finite changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import Optim
from trainer.optim.adamw import FusedAdamW, grouped, offsets, require_trainable
from trainer.runtime.distributed import Distributed

MOMENTS = FusedAdamW.STATE[1:]


class ShardedAdamW:
    """AdamW on the fp32 shards of a model's trainable parameters, with weight decay on matrices only."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], optim: Optim):
        self.parameters: dict[str, nn.Parameter] = require_trainable({name: p for name, p in named_parameters if p.requires_grad})
        self.optim, self.max_norm, self.l2_sp, self.whole = optim, optim.max_grad_norm, 0.0, True
        self.shards = {name: nn.Parameter(p.detach().to_local()) for name, p in self.parameters.items()}
        matrices, vectors = ([self.shards[name] for name, p in self.parameters.items() if (p.ndim >= 2) == wanted]
                             for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2),
                                       eps=optim.eps, fused=True)
        for shard in self.shards.values():
            self.adamw.state[shard] = {"step": torch.zeros((), device=shard.device),
                                       **{name: torch.zeros_like(shard) for name in MOMENTS}}
        self.start: list[Tensor] = []
        self.mesh = next(iter(self.parameters.values())).device_mesh

    def collect(self) -> None:
        """Do nothing: FSDP2 has added the gradients of the backward to those of the shards."""

    def sum_gradients(self, dist: Distributed) -> None:
        """Do nothing: FSDP2 has summed the gradients over the ranks."""

    def zero_grad(self) -> None:
        """Free all gradients."""
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def enable_l2_sp(self, weight: float) -> None:
        """Decay all weights towards their present values, as `FlatAdamW.enable_l2_sp` does."""
        self.l2_sp = weight
        self.start = [shard.detach().clone() for shard in self.shards.values()] if weight else []

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip and update; return the gradient norm over all ranks before clipping, a scalar."""
        self.whole = False
        for shard, p in zip(self.shards.values(), self.parameters.values()):
            shard.grad = torch.zeros_like(shard) if p.grad is None else p.grad.to_local()
        norm = self._norm([shard.grad for shard in self.shards.values()])
        finite = norm.isfinite()
        for shard, start in zip(self.shards.values(), self.start):
            shard.lerp_(start, lr * self.l2_sp * finite.float())
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.found_inf = (~finite).float()
        self.adamw.grad_scale = (norm / self.max_norm).clamp(min=1.0) if self.max_norm > 0 else None
        self.adamw.step()
        for shard in self.shards.values():
            shard.grad = None
        self.whole = True
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient, on the device of the shards.

        Sums over ranks run on that of the mesh.
        """
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        total = squares.to(self.mesh.device_type)
        torch.distributed.all_reduce(total, group=self.mesh.get_group("shard"))
        return total.sqrt().to(squares.device)

    def averaged(self) -> AbstractContextManager:
        """Do nothing: there is no moving average."""
        return nullcontext()

    def keep_average(self) -> None:
        """Do nothing: there is no moving average."""

    def publish(self) -> None:
        """Do nothing: the shards are what FSDP2 gathers."""

    def release(self) -> None:
        """Free gradients and moments, before the weights are gathered; no step may follow."""
        self.zero_grad()
        self.adamw.state.clear()

    @torch.no_grad()
    def free(self) -> None:
        """Free the memory of weights, gradients and moments; nothing may follow."""
        self.release()
        for shard in self.shards.values():
            shard.data = shard.new_empty(0)

    # ------------------------------------------------------------ saving and loading

    def by_name(self, weights_only: bool) -> dict[str, Tensor]:
        """Return every tensor that the next step depends on, or the weights alone, by name.

        They can be saved, or loaded into. Each has parts on all ranks.
        """
        found = {f"{name}.master": p.detach() for name, p in self.parameters.items()}
        for (name, p), shard in () if weights_only else zip(self.parameters.items(), self.shards.values()):
            state = self.adamw.state[shard]
            found |= {f"{name}.{moment}": _sharded_as(p, state[moment]) for moment in MOMENTS}
            found[f"{name}.step"] = state["step"]
        return found

    @torch.no_grad()
    def load_flat(self, file: Path, weights_only: bool) -> None:
        """Load this rank's shards from the tensors that a `FlatAdamW` saved, its `state` or its `weights`.

        One whole weight is in memory at a time. Raises ValueError for a file of another layout.
        """
        names = {p: name for name, p in self.parameters.items()}
        with safe_open(file, "pt") as opened:
            stored = {*opened.keys()}
            for i, group in enumerate(grouped(self.parameters.values(), self.optim, ())):
                for j, (p, offset) in enumerate(zip(group, offsets(group))):
                    targets, span = self._targets(names[p]), slice(offset, offset + p.numel())
                    keys = {"master": f"{i}.{j}"} if weights_only else {field: f"{i}.{field}" for field in targets}
                    if missing := {*keys.values()} - stored:
                        raise ValueError(f"expected the tensor {min(missing)}, found none")
                    for field, key in keys.items():
                        whole = opened.get_tensor(key) if weights_only or field == "step" else opened.get_slice(key)[span]
                        self._load(targets[field], whole, p)

    def _targets(self, name: str) -> Mapping[str, Tensor]:
        """Return this rank's tensors of a parameter, by the names they have in a flat group."""
        return {"master": self.shards[name].data, **self.adamw.state[self.shards[name]]}

    @staticmethod
    def _load(target: Tensor, whole: Tensor, p: nn.Parameter) -> None:
        """Copy this rank's part of a tensor as large as `p`, or a scalar, into `target`."""
        if target.ndim == 0:
            target.copy_(whole)
            return
        if whole.numel() != p.numel():
            raise ValueError(f"expected {p.numel()} elements of a weight, found {whole.numel()}")
        target.copy_(distribute_tensor(whole.view(p.shape).to(p.device_mesh.device_type), p.device_mesh, p.placements,
                                       src_data_rank=None).to_local())


def _sharded_as(p: nn.Parameter, shard: Tensor) -> DTensor:
    """Return the tensor whose part on this rank is `shard`, divided as `p` is."""
    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
