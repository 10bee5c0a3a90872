"""Update weights one by one with torch's Muon and Adafactor, which look at a matrix as a whole.

torch's optimizers write in place, so a step that must change nothing restores each weight and its state from copies, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config import Optim


class PerMatrix:
    """An optimizer of torch for each of some fp32 weights, which share a flat vector."""

    def __init__(self, views: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Tensor]]):
        self.views, self.optimizers, self.states = views, optimizers, states
        for view, optimizer, state in zip(views, optimizers, states):
            optimizer.state[view].update(state)
        self.STATE = tuple(self.state())

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor, divisor: Tensor | None) -> None:
        """Update with gradient / divisor; where the device scalar `finite` is false, only count steps."""
        for view, optimizer, state in zip(self.views, self.optimizers, self.states):
            if divisor is not None:
                view.grad.div_(divisor)
            written = [view.data, *(tensor for name, tensor in state.items() if name != "step")]
            before = [tensor.clone() for tensor in written]
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            for new, old in zip(written, before):
                torch.where(finite, new, old, out=new)

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{i}": tensor for i, state in enumerate(self.states) for name, tensor in state.items()}

    def layout(self) -> dict[str, Tensor]:
        """Return tensors of the shapes and dtypes of `state`."""
        return self.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, own in self.state().items():
            own.copy_(tensors[name])


class Muon(PerMatrix):
    """torch's Muon (Jordan et al., kellerjordan.github.io/posts/muon) for matrices.

    Steps are scaled to be as large as AdamW's (arXiv 2502.16982), so that both take one learning rate.
    """

    BYTES_PER_ELEMENT = 4  # of the momentum

    def __init__(self, views: Sequence[nn.Parameter], weight_decay: float, optim: Optim):
        made = [torch.optim.Muon([view], lr=optim.lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw") for view in views]
        super().__init__(views, made, [{"momentum_buffer": torch.zeros_like(view.data)} for view in views])


class Adafactor(PerMatrix):
    """torch's Adafactor (Shazeer and Stern, arXiv 1804.04235): second moments of rows and columns alone."""

    def __init__(self, views: Sequence[nn.Parameter], weight_decay: float, optim: Optim):
        made = [torch.optim.Adafactor([view], lr=optim.lr, weight_decay=weight_decay) for view in views]
        super().__init__(views, made, [self.first_state(view) for view in views])

    @staticmethod
    def first_state(p: Tensor) -> dict[str, Tensor]:
        """Return the state of a weight before its first step; the count of steps is on the host."""
        rows, columns = [*p.shape[:-1], 1], [*p.shape[:-2], 1, *p.shape[-1:]]
        moments = {"row_var": p.new_zeros(rows), "col_var": p.new_zeros(columns)} if p.ndim > 1 else {"variance": torch.zeros_like(p.data)}
        return {"step": torch.tensor(0.0), **{name: moment.detach().float() for name, moment in moments.items()}}
