"""Update one flat fp32 vector with bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import Optim
from trainer.model.quantization import import_bitsandbytes


class AdamW8bit:
    """bitsandbytes' AdamW8bit (Dettmers et al., arXiv 2110.02861) on one flat fp32 vector.

    Moments take a byte each, with an fp32 scale for each block of 256. The library's kernel writes in place, so it is called segment by
    segment: a step that must change nothing restores each segment from a copy, on the device. Such a step still counts in the bias
    correction, because the count lives on the host, which does not wait to learn of it.
    """

    STATE = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    MIN_ELEMENTS = 4096  # of a matrix; smaller ones keep moments in fp32, as in bitsandbytes
    BLOCK, SEGMENT = 256, 1 << 24
    BYTES_PER_ELEMENT = 2 * (1 + 4 / BLOCK)  # of both moments

    def __init__(self, master: nn.Parameter, weight_decay: float, optim: Optim):
        self.functional = import_bitsandbytes("optim.name adamw_8bit").functional
        self.master = master
        self.weight_decay = weight_decay
        self.optim = optim
        self.steps = 0
        self.codes = [self.functional.create_dynamic_map(signed=signed).to(master.device) for signed in (True, False)]
        blocks = -(-master.numel() // self.BLOCK)
        self.moments = [torch.zeros(master.numel(), dtype=torch.uint8, device=master.device) for _ in range(2)]
        self.scales = [torch.zeros(blocks, dtype=torch.float32, device=master.device) for _ in range(2)]

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor, divisor: Tensor | None) -> None:
        """Update with gradient / divisor; where the device scalar `finite` is false, only count."""
        self.steps += 1
        if divisor is not None:
            self.master.grad.div_(divisor)
        for start in range(0, self.master.numel(), self.SEGMENT):
            self._update(slice(start, start + self.SEGMENT), slice(start // self.BLOCK, (start + self.SEGMENT) // self.BLOCK), lr, finite)

    def _update(self, span: slice, blocks: slice, lr: float, finite: Tensor) -> None:
        weights, gradient = self.master.data[span], self.master.grad[span]
        (m, v), (m_scale, v_scale) = (t[span] for t in self.moments), (t[blocks] for t in self.scales)
        written = (weights, m, v, m_scale, v_scale)
        before = [t.clone() for t in written]
        optim = self.optim
        self.functional.optimizer_update_8bit_blockwise(
            "adam", gradient, weights, m, v, optim.beta1, optim.beta2, 0.0, 0.0, optim.eps, self.steps, lr, *self.codes, m_scale, v_scale,
            self.weight_decay)
        for new, old in zip(written, before):
            torch.where(finite, new, old, out=new)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.STATE, (torch.tensor(self.steps), *self.moments, *self.scales)))

    def layout(self) -> dict[str, Tensor]:
        """Return tensors of the shapes and dtypes of `state`."""
        return self.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.steps = int(tensors["step"])
        for name, own in zip(self.STATE[1:], (*self.moments, *self.scales)):
            own.copy_(tensors[name])
