"""Correct bf16 in Triton's interpreter, so that bf16 kernels can be checked without a GPU.

Two of its operations are wrong for bf16 (Triton 3.6 to 3.9): storing fp32 as bf16 truncates instead of rounding, and `tl.dot` multiplies
the bit patterns as integers. Here torch rounds, and matmuls use the fp32 values. Arithmetic on bf16 tensors (`a + b`, `tl.sum`) stays
wrong: kernels convert what they load to fp32 first, as they should anyway.
"""

import numpy as np
import torch

TESTED = ("3.6.", "3.7.", "3.8.", "3.9.")


def mend_bf16() -> None:
    """Patch Triton's interpreter once; raise RuntimeError for a version not in TESTED."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if not triton.__version__.startswith(TESTED):
        raise RuntimeError(f"tests/helpers/interpreter.py: expected Triton {' or '.join(TESTED)}x, got {triton.__version__}; "
                           "check that version and add it to TESTED")
    if hasattr(interpreter, "_steadfast_mended"):
        return
    interpreter._steadfast_mended = True
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.array(data, copy=True).view(np.float32))
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = torch.from_numpy(np.array(operand.data, copy=True).view(np.int16))
        return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
