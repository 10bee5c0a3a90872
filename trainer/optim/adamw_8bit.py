"""Update one flat fp32 vector with bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer import config
from trainer.model.quantization import import_bitsandbytes


class AdamW8bit:
    """The update of bitsandbytes' AdamW8bit (Dettmers et al., arXiv 2110.02861) on one flat fp32 vector: moments in a byte each, with an
    fp32 scale for each 256 of them.

    It is called segment by segment, because its kernel writes in place: a step that must change nothing puts a segment's copy back, on the
    device. Such a step counts in the bias correction all the same, for the count is the host's, which does not ask.
    """

    STATE = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    MIN_ELEMENTS = 4096  # elements of a matrix; smaller ones keep moments in fp32, as bitsandbytes has it
    BLOCK, SEGMENT = 256, 1 << 24
    BYTES_PER_ELEMENT = 2 * (1 + 4 / BLOCK)  # of both moments, an element

    def __init__(self, master: nn.Parameter, weight_decay: float, settings: config.Optim):
        self.functional = import_bitsandbytes("optim.name adamw_8bit").functional
        self.master, self.weight_decay, self.settings, self.steps = master, weight_decay, settings, 0
        self.codes = [self.functional.create_dynamic_map(signed=signed).to(master.device) for signed in (True, False)]
        blocks = -(-master.numel() // self.BLOCK)
        self.moments = [torch.zeros(master.numel(), dtype=torch.uint8, device=master.device) for _ in range(2)]
        self.scales = [torch.zeros(blocks, dtype=torch.float32, device=master.device) for _ in range(2)]

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor, divisor: Tensor | None) -> None:
        """Divide the gradient by `divisor`, which clips it, and update; change nothing but the count unless `finite`, a scalar."""
        self.steps += 1
        if divisor is not None:
            self.master.grad.div_(divisor)
        for start in range(0, self.master.numel(), self.SEGMENT):
            self._update(slice(start, start + self.SEGMENT), slice(start // self.BLOCK, (start + self.SEGMENT) // self.BLOCK), lr, finite)

    def _update(self, here: slice, blocks: slice, lr: float, finite: Tensor) -> None:
        weights, gradient = self.master.data[here], self.master.grad[here]
        (m, v), (m_scale, v_scale) = (t[here] for t in self.moments), (t[blocks] for t in self.scales)
        written = (weights, m, v, m_scale, v_scale)
        before = [t.clone() for t in written]
        s = self.settings
        self.functional.optimizer_update_8bit_blockwise(
            "adam", gradient, weights, m, v, s.beta1, s.beta2, 0.0, 0.0, s.eps, self.steps, lr, *self.codes, m_scale, v_scale,
            self.weight_decay)
        for now, was in zip(written, before):
            torch.where(finite, now, was, out=now)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.STATE, (torch.tensor(self.steps), *self.moments, *self.scales)))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.steps = int(tensors["step"])
        for name, own in zip(self.STATE[1:], (*self.moments, *self.scales)):
            own.copy_(tensors[name])
