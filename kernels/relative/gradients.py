"""How the two passes of a backend become one differentiable operator: the same for PyTorch and Triton."""

from __future__ import annotations

from collections.abc import Callable


def differentiate(forward: Callable, backward: Callable) -> None:
    """Register `backward` as the gradient of `forward`; arguments as of the two in `kernels.relative.chunked`."""

    def save(ctx, inputs, output):
        *tensors, ctx.spans, ctx.window, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx, do, _):
        saved = ctx.saved_tensors
        *found, dtable, dbeta = backward(do, *saved, ctx.spans, ctx.window, ctx.scale)
        learned = (None, None) if saved[5] is None else (dtable, dbeta)  # a table of positions is not learned
        return *found, *learned, None, None, None

    forward.register_autograd(gradients, setup_context=save)
