"""The network that the memory is, on keys: its inner gradient, and the way back through that gradient.

For keys K, values V [n, C, D] and weights W^l [n, d_in, d_out] that stay as they are for all C tokens:
    X^0 = K        Z^l = X^{l-1} W^l        X^l = activation(Z^l)
    D^L = Z^L - V, or with the norm, x_hat = (Z^L - mean) r, r = (var + eps)^-1/2:  D^L = r P(g e),
          e = K + g x_hat + b - V,  P(h) = h - mean(h) - x_hat mean(h x_hat)
    D^l = (D^{l+1} W^{l+1}') o activation'(Z^l)
X^{l-1}' D^l is the gradient of |M(K) - V|^2 / 2 in W^l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from farspan.kernels.titans.state import EPS

Norm = tuple[torch.Tensor, torch.Tensor] | None


def activate(z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of z and its derivative; both differentiable by autograd."""
    if activation == "silu":
        s = torch.sigmoid(z)
        x = z * s
        return x, torch.addcmul(s, x, 1 - s)
    cdf, density = _normal(z)
    return z * cdf, torch.addcmul(cdf, z, density)


def curvature(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The second derivative of the activation."""
    if activation == "silu":
        s = torch.sigmoid(z)
        rest = 1 - s
        return (2 + z * (rest - s)) * s * rest
    return _normal(z)[1] * (2 - z * z)


def _normal(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distribution function and density of the normal distribution."""
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)), torch.exp(-0.5 * z * z) * 0.3989422804014327  # 1 / sqrt(2 pi)


def normalise(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_hat, and r [n, C, 1]."""
    variance, mean = torch.var_mean(z, dim=-1, keepdim=True, correction=0)
    r = (variance + EPS).rsqrt()
    return (z - mean) * r, r


def project(h: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """P(h); r P is the backward of `normalise`."""
    return torch.addcmul(h - h.mean(-1, keepdim=True), x_hat, (h * x_hat).mean(-1, keepdim=True), value=-1)


class Written(NamedTuple):
    """Of the keys and values of n blocks: the layers' inputs X, activation' at their outputs, and the gradients D.

    outputs: Z of all layers but the last; passed: D^{l+1} W^{l+1}', before it meets the slope; normed: x_hat, r and e
    where there is a norm.
    """

    inputs: list[torch.Tensor]
    deltas: list[torch.Tensor]
    outputs: list[torch.Tensor]
    slopes: list[torch.Tensor]
    passed: list[torch.Tensor]
    normed: tuple[torch.Tensor, ...] | None


def inner_gradient(
    keys: torch.Tensor, values: torch.Tensor, weights: Sequence[torch.Tensor], norm: Norm, activation: str
) -> Written:
    """keys, values: [n, C, D]; weights: L of [n, d_in, d_out]; norm: gain and bias, [n, 1, D]."""
    inputs, outputs, slopes, x = [keys], [], [], keys
    for w in weights[:-1]:
        outputs.append(torch.bmm(x, w))
        x, slope = activate(outputs[-1], activation)
        inputs.append(x)
        slopes.append(slope)
    z = torch.bmm(x, weights[-1])
    if norm is None:
        normed, delta = None, z - values
    else:
        gain, bias = norm
        x_hat, r = normalise(z)
        e = (keys - values + bias).addcmul(x_hat, gain)
        normed, delta = (x_hat, r, e), r * project(gain * e, x_hat)
    deltas, passed = [delta], []
    for w, slope in zip(weights[:0:-1], reversed(slopes), strict=True):
        passed.insert(0, torch.bmm(deltas[0], w.mT))
        deltas.insert(0, passed[0] * slope)
    return Written(inputs, deltas, outputs, slopes, passed, normed)


def inner_gradient_backward(
    written: Written,
    dinputs: list[torch.Tensor],
    ddeltas: list[torch.Tensor],
    weights: Sequence[torch.Tensor],
    dweights: Sequence[torch.Tensor],
    norm: Norm,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    """From the gradients of `inputs` and `deltas` to those of keys, values and, with a norm, gain and bias, [n, C, D].

    The gradients of the weights are added to dweights, L of [n, d_in, d_out]; dinputs and ddeltas are overwritten.
    """
    inputs, deltas, last = written.inputs, written.deltas, len(weights) - 1
    doutputs = []
    for l in range(last):  # the deltas are gradients themselves: this is the second order
        dpassed = ddeltas[l] * written.slopes[l]
        doutputs.append(ddeltas[l].mul_(written.passed[l]).mul_(curvature(written.outputs[l], activation)))
        ddeltas[l + 1].baddbmm_(dpassed, weights[l + 1])
        dweights[l + 1].baddbmm_(dpassed.mT, deltas[l + 1])
    ddelta = ddeltas[last]
    if norm is None:
        dz, results = ddelta, (-ddelta,)
    else:
        gain, (x_hat, r, e) = norm[0], written.normed
        h = gain * e
        dh = r * project(ddelta, x_hat)
        de = gain * dh
        from_h, from_delta = ((x * x_hat).mean(-1, keepdim=True) for x in (h, ddelta))
        dx_hat = (gain * de).addcmul_(ddelta * from_h + h * from_delta, r, value=-1)
        dr = (ddelta * project(h, x_hat)).sum(-1, keepdim=True)
        dz = normalise_backward(dx_hat, x_hat, r, dr)
        dinputs[0] += de
        results = (-de, (dh * e).addcmul_(de, x_hat), de)
    for l in range(last, -1, -1):
        dinputs[l].baddbmm_(dz, weights[l].mT)
        dweights[l].baddbmm_(inputs[l].mT, dz)
        if l:
            dz = doutputs[l - 1].addcmul_(dinputs[l], written.slopes[l - 1])
    return dinputs[0], *results


def normalise_backward(
    dx_hat: torch.Tensor, x_hat: torch.Tensor, r: torch.Tensor, dr: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of z from those of x_hat and r of `normalise`."""
    dz = r * project(dx_hat, x_hat)
    return dz if dr is None else dz.addcmul_(x_hat, dr * r * r, value=-1 / x_hat.shape[-1])
