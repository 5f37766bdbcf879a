"""Layers whose backward pass yields each record's gradient of the weights: linear, LoRA on linear, layer norms, RMS norms.

A forward of this module computes what the layer's own does. Its backward gives autograd the gradient of the input and
hands the per-record gradients of the weights, (b, *shape), to a `Put`; autograd itself computes none for them. Inputs are
(b, ..., features), records first. Under autocast products are in its type, as those of the layer are. Lee and Kifer
(PoPETs 2021) and Bu et al. (arXiv 2210.00038) describe the products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Put = Callable[[str, Callable[[], Tensor]], None]  # name of a weight within its layer, and what computes its gradient
Forward = Callable[..., Tensor]


def forwards(layer: Any) -> tuple[frozenset[str], Callable[[Put], Forward]] | None:
    """Names of the weights below `layer` that can be trained, and what makes its forward. None: this layer isn't known."""
    from peft.tuners.lora import layer as lora

    kind, both = type(layer), frozenset({"weight", "bias"})
    if "forward" in layer.__dict__:  # another library has replaced it
        return None
    if kind is torch.nn.Linear:
        return both, lambda put: lambda x: _linear(x, layer.weight, layer.bias, put)
    if kind is torch.nn.LayerNorm and len(layer.normalized_shape) == 1:
        return both, lambda put: lambda x: _scale(
            functional.layer_norm(x, layer.normalized_shape, None, None, layer.eps), layer.weight, layer.bias, put)
    if kind is torch.nn.RMSNorm and len(layer.normalized_shape) == 1:
        return both, lambda put: lambda x: _scale(
            functional.rms_norm(x, layer.normalized_shape, None, layer.eps), layer.weight, None, put)
    if kind.__module__.startswith("transformers.") and kind.__name__.endswith("RMSNorm"):
        return frozenset({"weight"}), lambda put: _rms_norm(layer, put)
    if kind is lora.Linear and _plain_lora(layer):
        adapter = layer.active_adapters[0]
        return frozenset(_roles(adapter).values()), lambda put: _lora_forward(layer, adapter, put)
    return None


def _plain_lora(layer: Any) -> bool:
    """One adapter, no variant (DoRA and others), on a frozen weight of the same type."""
    if len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters:
        return False
    if type(layer.base_layer) is not torch.nn.Linear:
        return False
    adapter, weight = layer.active_adapters[0], layer.base_layer.weight
    return (adapter in layer.lora_A and adapter not in layer.lora_variant and not weight.requires_grad
            and layer.lora_A[adapter].weight.dtype == weight.dtype)


def _roles(adapter: str) -> dict[str, str]:
    return {"A": f"lora_A.{adapter}.weight", "B": f"lora_B.{adapter}.weight", "B bias": f"lora_B.{adapter}.bias",
            "bias": "base_layer.bias"}


def _lora_forward(layer: Any, adapter: str, put: Put) -> Forward:
    base, dropout, scaling, roles = layer.base_layer, layer.lora_dropout[adapter], layer.scaling[adapter], _roles(adapter)
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]

    def forward(x: Tensor) -> Tensor:
        dropped = dropout(x) if dropout.training and isinstance(dropout, torch.nn.Dropout) else None
        out: Tensor = _lora(x, dropped, base.weight, base.bias, a.weight, b.weight, b.bias, scaling,
                                  lambda role, gradient: put(roles[role], gradient))
        return out

    return forward


def _rms_norm(layer: Any, put: Put) -> Forward:
    """Each record scales with its own copy of the weight, whose gradient is then the record's."""

    def forward(x: Tensor) -> Tensor:
        own = layer.weight.detach().expand(len(x), *[1] * (x.dim() - 2), -1).requires_grad_(True)
        own.register_hook(lambda grad: put("weight", lambda: grad.reshape(len(x), -1)))
        twin = copy.copy(layer)
        twin._parameters = {}
        twin.weight = own
        out: Tensor = type(layer).forward(twin, x)
        return out

    return forward


class _Linear(torch.autograd.Function):
    """y = x W^T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, put: Put) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.put = put
        return functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.put("weight", lambda: _outer(g, x))
        ctx.put("bias", lambda: _over_positions(g))
        return (g @ weight.to(g.dtype) if ctx.needs_input_grad[0] else None), None, None, None


class _Lora(torch.autograd.Function):
    """y = x W^T + bias + s (dropped A^T B^T + bias of B), W frozen. dropped: x after lora_dropout, None for x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
                b_bias: Tensor | None, s: float, put: Put) -> Tensor:
        x = x.contiguous()
        low = functional.linear(x if dropped is None else dropped, a)
        y = functional.linear(x, w, bias)
        y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.t().to(y.dtype), alpha=s)
        if b_bias is not None:
            y.add_(b_bias, alpha=s)
        ctx.save_for_backward(x if dropped is None else dropped, low, w, a, b)
        ctx.own, ctx.s, ctx.put = dropped is not None, s, put
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        dropped, low, w, a, b = ctx.saved_tensors
        g, s, put = g.contiguous(), ctx.s, ctx.put
        w, a, b = w.to(g.dtype), a.to(g.dtype), b.to(g.dtype)
        g_low = (g @ b).mul_(s)
        put("A", lambda: _outer(g_low, dropped))
        put("B", lambda: _outer(g, low).mul_(s))
        put("bias", lambda: _over_positions(g))
        put("B bias", lambda: _over_positions(g).mul(s))
        dx = g @ w if ctx.needs_input_grad[0] else None
        d_dropped = None
        if ctx.own and ctx.needs_input_grad[1]:
            d_dropped = g_low @ a
        elif dx is not None:
            dx.view(-1, dx.shape[-1]).addmm_(g_low.view(-1, g_low.shape[-1]), a)
        return dx, d_dropped, None, None, None, None, None, None, None


class _Scale(torch.autograd.Function):
    """y = x * weight + bias, feature by feature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, put: Put) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.put = put
        return x * weight if bias is None else torch.addcmul(bias, x.to(bias.dtype), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.put("weight", lambda: _over_positions(g * x))
        ctx.put("bias", lambda: _over_positions(g))
        return (g * weight if ctx.needs_input_grad[0] else None), None, None, None


_linear: Forward = _Linear.apply
_lora: Forward = _Lora.apply
_scale: Forward = _Scale.apply


def _outer(g: Tensor, x: Tensor) -> Tensor:
    """(b, ..., o), (b, ..., i) -> (b, o, i): of each record, the sum over its positions."""
    return torch.bmm(g.reshape(len(g), -1, g.shape[-1]).transpose(1, 2), x.reshape(len(x), -1, x.shape[-1]).to(g.dtype))


def _over_positions(g: Tensor) -> Tensor:
    return g.reshape(len(g), -1, g.shape[-1]).sum(1)
