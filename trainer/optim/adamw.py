"""AdamW over flat fp32 masters, with clipping and the non-finite guard inside its one fused pass, and the schedules.

All trainable weights live end to end in one fp32 vector per weight-decay group, their gradients in another: zeroing, norm,
clipping, all-reduce and update are one operation each, however many layers there are. (With 8-bit moments, matrices large enough
for them are a vector of their own.) A parameter that is fp32 is a view of the master. One of lower precision (bf16 compute) keeps
its own storage: after each pack its gradient is added to the fp32 vector and dropped, after each step the master is rounded into it.

A step whose gradient norm is not finite changes nothing, on the device and without asking the host (`found_inf`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.config import Optim
from trainer.errors import UserError
from trainer.optim.adamw_8bit import AdamW8bit

ALIGNMENT = 32  # elements: every weight starts on a 128-byte boundary, as it would in a tensor of its own


class FlatGroup:
    """Trainable parameters end to end in one fp32 master vector, with a gradient vector of the same layout."""

    def __init__(self, parameters: list[nn.Parameter], alignment: int = ALIGNMENT):
        self.parameters = parameters
        offsets, total = [], 0
        for p in parameters:
            offsets.append(total)
            total += -(-p.numel() // alignment) * alignment
        device = parameters[0].device
        self.master = nn.Parameter(torch.zeros(total, dtype=torch.float32, device=device))
        self.master.grad = torch.zeros_like(self.master)
        self.low: list[nn.Parameter] = []
        self.low_masters: list[Tensor] = []
        for p, offset in zip(parameters, offsets):
            self._adopt(p, slice(offset, offset + p.numel()))

    @torch.no_grad()
    def _adopt(self, p: nn.Parameter, place: slice) -> None:
        master, grad = self.master.data[place].view_as(p), self.master.grad[place].view_as(p)
        master.copy_(p)
        if p.dtype == torch.float32:
            p.data, p.grad = master, grad
            return
        self.low.append(p)
        self.low_masters.append(master)

        def gather(parameter: nn.Parameter) -> None:
            grad.add_(parameter.grad)
            parameter.grad = None

        p.register_post_accumulate_grad_hook(gather)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters of lower precision."""
        if self.low:
            torch._foreach_copy_(self.low, self.low_masters)


class FusedAdamW:
    """torch's AdamW on one flat fp32 vector; clipping and the guard happen inside its one pass."""

    STATE = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, master: nn.Parameter, weight_decay: float, settings: Optim):
        self.master = master
        self.adamw = torch.optim.AdamW([master], lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
                                       weight_decay=weight_decay, fused=True)

    def step(self, lr: float, finite: Tensor, divisor: Tensor | None) -> None:
        """Update with the gradient / divisor, or change nothing where `finite`, a scalar on the device, is not."""
        self.adamw.found_inf, self.adamw.grad_scale = (~finite).float(), divisor
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()

    def state(self) -> dict[str, Tensor]:
        return dict(self.adamw.state[self.master])

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.adamw.state[self.master].update({name: tensors[name].to(self.master.device, copy=True) for name in self.STATE})


def has_8bit_moments(p: Tensor, settings: Optim) -> bool:
    """Whether the moments of a parameter take a byte each."""
    return settings.name == "adamw_8bit" and p.ndim >= 2 and p.numel() >= AdamW8bit.MIN_ELEMENTS


class FlatAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the trainable parameters of a model; decay on matrices only."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: Optim):
        trainable = [p for p in parameters if p.requires_grad]
        if not trainable:
            raise UserError("nothing to train: expected at least one trainable weight, found none; check lora.target_modules")
        large = [p for p in trainable if has_8bit_moments(p, settings)]
        matrices = [p for p in trainable if p.ndim >= 2 and not has_8bit_moments(p, settings)]
        vectors = [p for p in trainable if p.ndim < 2]
        in_bytes = [FlatGroup(large, AdamW8bit.BLOCK)] if large else []  # aligned, so that no two weights share a scale
        self.groups = in_bytes + [FlatGroup(parameters) for parameters in (matrices, vectors) if parameters]
        self.max_norm, self.l2, self.starts = settings.max_grad_norm, 0.0, []
        self.updates = [(AdamW8bit if group in in_bytes else FusedAdamW)(
            group.master, settings.weight_decay if group.parameters[0].ndim >= 2 else 0.0, settings) for group in self.groups]

    @property
    def gradients(self) -> list[Tensor]:
        """The flat fp32 gradient vectors, one per group."""
        return [g.master.grad for g in self.groups]

    def zero_grad(self) -> None:
        for gradient in self.gradients:
            gradient.zero_()

    def enable_l2_sp(self, l2: float) -> None:
        """From now on every step first decays all weights towards what they are now, by lr * l2: decoupled L2 (Loshchilov and Hutter) with
        a centre other than 0, the L2-SP of Li et al., arXiv 1802.01483. Costs 4 bytes a trained weight.

        Of an adapter these are A and B, each towards its start, B's being 0. The distance itself, the norm of the product s B A, would have
        to be made for every layer at every step; where B is near 0 so is the product, and A near its start keeps the two in proportion.
        """
        self.l2, self.starts = l2, [group.master.data.clone() for group in self.groups] if l2 else []

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip, update, publish. Returns the gradient norm before clipping, a scalar left on the device."""
        norm = torch.stack([torch.linalg.vector_norm(g) for g in self.gradients]).square().sum().sqrt()
        finite = norm.isfinite()
        divisor = (norm / self.max_norm).clamp(min=1.0) if self.max_norm > 0 else None
        for group, start in zip(self.groups, self.starts):
            group.master.data.lerp_(start, lr * self.l2 * finite.float())
        for update in self.updates:
            update.step(lr, finite, divisor)
        self.publish()
        return norm

    @torch.no_grad()
    def release(self) -> None:
        """Give every trained parameter storage of its own again, for saving. The last call."""
        for group in self.groups:
            for p in group.parameters:
                if p.dtype == torch.float32:
                    p.data, p.grad = p.data.clone(), None

    def publish(self) -> None:
        """Round every master into its parameter of lower precision; fp32 parameters are their masters."""
        for group in self.groups:
            group.publish()

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name."""
        tensors = {}
        for i, (group, update) in enumerate(zip(self.groups, self.updates)):
            tensors |= {f"{i}.master": group.master.data} | {f"{i}.{name}": value for name, value in update.state().items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave. Raises KeyError or ValueError where the layout differs."""
        for i, (group, update) in enumerate(zip(self.groups, self.updates)):
            saved = tensors[f"{i}.master"]
            if saved.shape != group.master.shape:
                raise ValueError(f"optimizer state: expected {tuple(group.master.shape)} weights in group {i}, got {tuple(saved.shape)}")
            group.master.data.copy_(saved)
            update.load_state({name: tensors[f"{i}.{name}"] for name in update.STATE})
        self.publish()


