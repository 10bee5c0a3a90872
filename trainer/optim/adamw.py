"""Update all trainable weights with AdamW on flat fp32 master vectors.

Trainable weights lie end to end in one fp32 vector per weight-decay group, their gradients in another. Zeroing, norm, clipping,
all-reduce and update are then one operation each, however many layers there are. With 8-bit moments, the matrices large enough for
them form a vector of their own. An fp32 parameter is a view of its master. A parameter of lower precision (bf16 compute) keeps its own
storage: after each pack its gradient is added to the fp32 vector and freed, and after each step the master is rounded into it. Gradients of
small fp32 parameters, such as an adapter's, are added together after a pack (`collect`), since a GPU takes longer to begin a small addition
than to do it; large ones, whose memory counts, as they come.

Clipping and the check for a finite gradient norm happen in the optimizer's one fused pass (`grad_scale`, `found_inf`): a step whose
norm is not finite changes nothing, and the host never waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.config import Optim
from trainer.errors import UserError
from trainer.optim.adamw_8bit import AdamW8bit
from trainer.optim.per_matrix import Adafactor, Muon
from trainer.runtime.distributed import Distributed

ALIGNMENT = 32  # elements: every weight starts on a 128-byte boundary, as in a tensor of its own
SMALL = 1 << 18  # elements of the largest parameter whose gradient waits for the others


def offsets(parameters: Iterable[Tensor], alignment: int = ALIGNMENT) -> list[int]:
    """Return where each parameter begins in a flat vector, and at last the length of the vector."""
    return [0, *itertools.accumulate(-(-p.numel() // alignment) * alignment for p in parameters)]


class FlatGroup:
    """Trainable parameters end to end in one fp32 master vector, and a gradient vector of equal layout."""

    def __init__(self, parameters: list[nn.Parameter], alignment: int = ALIGNMENT):
        self.parameters = parameters
        *starts, total = offsets(parameters, alignment)
        self.spans = [slice(start, start + p.numel()) for p, start in zip(parameters, starts)]
        device = parameters[0].device
        self.master = nn.Parameter(torch.zeros(total, dtype=torch.float32, device=device))
        self.master.grad = torch.zeros_like(self.master)
        self.small: list[tuple[nn.Parameter, Tensor]] = []  # parameters whose gradients are collected, and where to
        self.low_precision: list[nn.Parameter] = []  # parameters that are not fp32
        self.low_precision_masters: list[Tensor] = []
        for p, span in zip(parameters, self.spans):
            self._attach(p, span)

    def views(self) -> list[nn.Parameter]:
        """Return the masters of the parameters, in their shapes, each with its gradient."""
        found = []
        for p, span in zip(self.parameters, self.spans):
            view = nn.Parameter(self.master.data[span].view_as(p))
            view.grad = self.master.grad[span].view_as(p)
            found.append(view)
        return found

    @torch.no_grad()
    def _attach(self, p: nn.Parameter, span: slice) -> None:
        """Make a parameter a view of its span of the master.

        One of lower precision keeps its storage, and adds its gradients to its span of the flat gradient.
        """
        master = self.master.data[span].view_as(p)
        grad = self.master.grad[span].view_as(p)
        master.copy_(p)
        if p.dtype == torch.float32:
            p.data = master
            if p.numel() > SMALL:
                p.grad = grad
            else:
                p.grad = None
                self.small.append((p, grad))
            return
        self.low_precision.append(p)
        self.low_precision_masters.append(master)

        def move_gradient(parameter: nn.Parameter) -> None:
            grad.add_(parameter.grad)
            parameter.grad = None

        p.register_post_accumulate_grad_hook(move_gradient)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of small parameters to the flat gradient, in few launches."""
        found = [(p, flat) for p, flat in self.small if p.grad is not None]
        if found:
            torch._foreach_add_([flat for _, flat in found], [p.grad for p, _ in found])
        for p, _ in found:
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters of lower precision."""
        if self.low_precision:
            torch._foreach_copy_(self.low_precision, self.low_precision_masters)


class FusedAdamW:
    """torch's fused AdamW on one flat fp32 vector."""

    STATE = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, master: nn.Parameter, weight_decay: float, optim: Optim):
        self.master = master
        self.adamw = torch.optim.AdamW([master], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
                                       weight_decay=weight_decay, fused=True)

    def step(self, lr: float, finite: Tensor, divisor: Tensor | None) -> None:
        """Update with gradient / divisor; change nothing where the device scalar `finite` is false."""
        self.adamw.found_inf, self.adamw.grad_scale = (~finite).float(), divisor
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()

    def state(self) -> dict[str, Tensor]:
        return dict(self.adamw.state[self.master])

    def begun(self) -> dict[str, Tensor]:
        """Return the tensors of `state`, made now if no step has been."""
        if not self.adamw.state[self.master]:
            self.load_state({name: torch.zeros_like(like, device=self.master.device) for name, like in self.layout().items()})
        return self.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.adamw.state[self.master].update({name: tensors[name].to(self.master.device, copy=True) for name in self.STATE})

    def layout(self) -> dict[str, Tensor]:
        """Return tensors of the shapes and dtypes of `state`, also before the first step, on the meta device."""
        moment = torch.empty_like(self.master, device="meta")
        return dict(zip(self.STATE, (torch.empty((), dtype=torch.float32, device="meta"), moment, moment)))


def has_8bit_moments(p: Tensor, optim: Optim) -> bool:
    """Return whether each moment of a parameter is kept in a byte."""
    return optim.name == "adamw_8bit" and p.ndim >= 2 and p.numel() >= AdamW8bit.MIN_ELEMENTS


def check_layout(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names, dtypes and shapes of others.

    Raises ValueError for the first that has not.
    """
    for name in sorted(tensors.keys() | expected.keys()):
        found, wanted = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" if (t := own.get(name)) is not None else "none"
                         for own in (tensors, expected))
        if found != wanted:
            raise ValueError(f"expected {wanted} for the tensor {name}, got {found}")


def require_trainable(trainable: Collection) -> Collection:
    """Return the parameters that train. Raises UserError if there are none."""
    if not trainable:
        raise UserError("nothing to train: expected at least one trainable weight, found none; check lora.target_modules")
    return trainable


def grouped(trainable: Iterable[nn.Parameter], optim: Optim, apart: Collection[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters into those with 8-bit moments, other matrices, and vectors.

    Of each kind those `apart` are by themselves. None of the lists are empty.
    """
    kinds: dict[tuple[int, bool], list[nn.Parameter]] = {(kind, is_apart): [] for kind in range(3) for is_apart in (False, True)}
    ids = {id(p) for p in apart}
    for p in trainable:
        kinds[0 if has_8bit_moments(p, optim) else 1 if p.ndim >= 2 else 2, id(p) in ids].append(p)
    return [kind for kind in kinds.values() if kind]


def new_update(group: FlatGroup, optim: Optim, is_apart: bool) -> FusedAdamW | AdamW8bit | Muon | Adafactor:
    """Return what updates a group's master."""
    weight_decay = optim.weight_decay if group.parameters[0].ndim >= 2 else 0.0
    if optim.name == "adafactor" or optim.name == "muon" and is_apart:
        return (Adafactor if optim.name == "adafactor" else Muon)(group.views(), weight_decay, optim)
    return (AdamW8bit if has_8bit_moments(group.parameters[0], optim) else FusedAdamW)(group.master, weight_decay, optim)


class FlatAdamW:
    """AdamW (arXiv 1711.05101) on a model's trainable parameters, with weight decay on matrices only.

    Parameters `apart` are those that LoRA+ or Muon treats otherwise (`trainer.optim.apart`).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optim: Optim, apart: Collection[nn.Parameter] = (),
                 names: Mapping[nn.Parameter, str] | None = None):
        """`names` of the parameters are needed for the checkpoints of sharded ranks alone."""
        trainable, self.names = require_trainable([p for p in parameters if p.requires_grad]), names or {}
        self.groups = [FlatGroup(kind, AdamW8bit.BLOCK if has_8bit_moments(kind[0], optim) else ALIGNMENT)  # no two weights share a scale
                       for kind in grouped(trainable, optim, apart)]
        are_apart = [any(group.parameters[0] is p for p in apart) for group in self.groups]
        self.updates = [new_update(group, optim, is_apart) for group, is_apart in zip(self.groups, are_apart)]
        self.rates = [optim.loraplus_lr_ratio if is_apart else 1.0 for is_apart in are_apart]
        self.ema_decay = optim.ema_decay
        self.averages = [group.master.detach().clone() for group in self.groups] if optim.ema_decay else []
        self.max_norm = optim.max_grad_norm
        self.l2_sp = 0.0
        self.whole = True  # no update is under way
        self.start_masters: list[Tensor] = []

    def collect(self) -> None:
        """Add the gradients of the backward passes so far to the flat vectors; call it after each."""
        for group in self.groups:
            group.collect()

    @property
    def gradients(self) -> list[Tensor]:
        """Return the flat fp32 gradient vectors, one per group, with all gradients so far."""
        self.collect()
        return [g.master.grad for g in self.groups]

    def sum_gradients(self, dist: Distributed) -> None:
        """Sum all gradients so far over the ranks."""
        dist.sum(self.gradients)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for gradient in self.gradients:
            gradient.zero_()

    def enable_l2_sp(self, weight: float) -> None:
        """Decay all weights towards their present values by lr * weight in every later step; 0 disables it.

        This is L2-SP (Li et al., arXiv 1802.01483) as a decoupled decay (Loshchilov and Hutter). It costs 4 bytes a trained weight.

        Of an adapter, A and B each decay towards their start, which for B is 0. The exact distance, the norm of s B A, would need a matmul
        for every layer in every step; where B is near 0 so is s B A, and A near its start keeps the two in proportion.
        """
        self.l2_sp = weight
        self.start_masters = [group.master.data.clone() for group in self.groups] if weight else []

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip, update and publish; return the gradient norm before clipping, a scalar on the device."""
        self.whole = False
        norm = torch.stack([torch.linalg.vector_norm(g) for g in self.gradients]).square().sum().sqrt()
        finite = norm.isfinite()
        divisor = (norm / self.max_norm).clamp(min=1.0) if self.max_norm > 0 else None
        for group, start in zip(self.groups, self.start_masters):
            group.master.data.lerp_(start, lr * self.l2_sp * finite.float())
        for update, rate in zip(self.updates, self.rates):
            update.step(lr * rate, finite, divisor)
        for average, group in zip(self.averages, self.groups):
            average.lerp_(group.master.data, (1 - self.ema_decay) * finite.float())
        self.publish()
        self.whole = True
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average into the weights inside this context, if there is one (`optim.ema_decay`)."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    @torch.no_grad()
    def _swap_averages(self) -> None:
        for average, group in zip(self.averages, self.groups):
            last = group.master.data.clone()
            group.master.data.copy_(average)
            average.copy_(last)
        if self.averages:
            self.publish()

    def keep_average(self) -> None:
        """Put the moving average into the weights for good; no step may follow."""
        self._swap_averages()
        self.averages = []

    @torch.no_grad()
    def release(self) -> None:
        """Give every trained parameter its own storage again, for saving; no step may follow."""
        for group in self.groups:
            for p in group.parameters:
                if p.dtype == torch.float32:
                    p.data, p.grad = p.data.clone(), None

    @torch.no_grad()
    def free(self) -> None:
        """Free the memory of masters, gradients and moments; nothing may follow."""
        for group in self.groups:
            group.master.grad, group.master.data, group.low_precision_masters = None, group.master.new_empty(0), []
        self.start_masters, self.updates = [], []

    def publish(self) -> None:
        """Round every master into its parameter of lower precision; fp32 parameters are views already."""
        for group in self.groups:
            group.publish()

    def state(self) -> dict[str, Tensor]:
        """Return every tensor the next step depends on, by name."""
        tensors = {}
        for i, (group, update) in enumerate(zip(self.groups, self.updates)):
            tensors |= {f"{i}.master": group.master.data} | {f"{i}.{name}": value for name, value in update.state().items()}
        return tensors | {f"{i}.average": average for i, average in enumerate(self.averages)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of `state`. Raises ValueError, and changes nothing, if their layout differs."""
        check_layout(tensors, {f"{i}.{name}": like for i, (group, update) in enumerate(zip(self.groups, self.updates))
                               for name, like in {"master": group.master, **update.layout()}.items()}
                     | {f"{i}.average": average for i, average in enumerate(self.averages)})
        for i, average in enumerate(self.averages):
            average.copy_(tensors[f"{i}.average"])
        for i, (group, update) in enumerate(zip(self.groups, self.updates)):
            group.master.data.copy_(tensors[f"{i}.master"])
            update.load_state({name: tensors[f"{i}.{name}"] for name in update.STATE})
        self.publish()

    def by_name(self, weights_only: bool) -> dict[str, Tensor]:
        """Return views of the fp32 state by parameter, to load what sharded ranks saved into.

        Call `publish` afterwards. Not for 8-bit moments.
        """
        found = {}
        for group, update in zip(self.groups, self.updates):
            state = {} if weights_only else update.begun()
            for p, span in zip(group.parameters, group.spans):
                own = {"master": group.master.data, **state}
                found |= {f"{self.names[p]}.{key}": value[span].view(p.shape) if value.ndim else value for key, value in own.items()}
        return found

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights, in the precision of the model."""
        return {f"{i}.{j}": p.data for i, group in enumerate(self.groups) for j, p in enumerate(group.parameters)}

    @torch.no_grad()
    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of `weights`. Raises ValueError, and changes nothing, if their layout differs."""
        check_layout(tensors, self.weights())
        for name, weight in self.weights().items():
            weight.copy_(tensors[name])
        for group in self.groups:
            for master, p in zip(group.low_precision_masters, group.low_precision):
                master.copy_(p)
