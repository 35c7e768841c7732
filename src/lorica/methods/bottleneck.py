"""Bottleneck adapters: a small network behind (or beside) the parts of each layer.

    sequential   y + s U f(D y)        y: what the part of the layer gives
    parallel     y + s U f(D x)        x: what it is given

Houlsby et al. 2019 (arXiv 1902.00751) put one behind attention and one behind the feed-forward;
Pfeiffer et al. 2020 (arXiv 2005.00052) the second alone; He et al. 2021 (arXiv 2110.04366) one
beside the feed-forward. They sit on the output projection of the part, before the residual sum, so
where a model normalises after the sum (BERT), Pfeiffer's sits before the norm. Compacter (Mahabadi
et al. 2021, arXiv 2106.04647) makes D and U out of sums of Kronecker products.

Legend: H width of the model, M width of the bottleneck, N size of Compacter's small matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.placed import Placed, scale_problems, whole
from lorica.methods.update import uniform

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_LAYOUTS = ("houlsby", "pfeiffer", "parallel")


@dataclass(frozen=True)
class Bottleneck(Placed):
    """Settings and arithmetic of bottleneck adapters."""

    reduction_factor: float = setting(16, "the bottleneck is so many times as narrow as the model")
    layout: Literal["houlsby", "pfeiffer", "parallel"] = setting(
        "houlsby",
        "behind attention and feed-forward (houlsby), behind feed-forward (pfeiffer), or beside it",
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = setting("relu", "f in the bottleneck")
    adapter_scaling: float = setting(1.0, "multiplies what the bottleneck adds; parallel: often 4")

    kind: ClassVar[str] = "bottleneck"
    title: ClassVar[str] = "a small network behind each part of a layer (arXiv 1902.00751)"

    @property
    def auto(self) -> str:  # type: ignore[override]
        """Which layers target_modules="auto" stands for."""
        return "block-outputs" if self.layout == "houlsby" else "feedforward-outputs"

    def host(self, path: str) -> str:
        """The parallel one sits on the whole feed-forward, whose input it needs."""
        parent = path.rpartition(".")[0]
        is_layer = parent.rpartition(".")[2].isdigit()  # no module of its own: OPT
        return parent if self.layout == "parallel" and not is_layer else path

    def problems(self, layer: Layer) -> list[str]:
        from_model_to_model = layer.kind == "block" and layer.in_features == layer.out_features
        if self.layout == "parallel" and not from_model_to_model:
            return ["parallel needs a feed-forward module of its own around the named layer"]
        if self.layout != "parallel" and layer.kind != "linear":
            return [f"{self.kind} sits behind linear layers"]
        return []

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        width, into = layer.out_features, self._width_in(layer)
        narrow = self.narrow(layer)
        return {
            "down": uniform((narrow, into), into, generator),
            "down_bias": torch.zeros(narrow),
            "up": torch.zeros(width, narrow),
            "up_bias": torch.zeros(width),
        }

    def narrow(self, layer: Layer) -> int:
        """Width of the bottleneck."""
        return max(1, round(layer.out_features / self.reduction_factor))

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        own = {name: tensor.to(y.dtype) for name, tensor in self.matrices(tensors).items()}
        source = x.to(y.dtype) if self.layout == "parallel" else y
        inner = NON_LINEARITIES[self.non_linearity](F.linear(source, own["down"], own["down_bias"]))
        return y + self.adapter_scaling * F.linear(inner, own["up"], own["up_bias"])

    def matrices(self, tensors: Tensors) -> Tensors:
        """`down` (M, H), `up` (H, M) and their biases."""
        return tensors

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        return None  # f is not linear

    def _width_in(self, layer: Layer) -> int:
        return layer.in_features if self.layout == "parallel" else layer.out_features

    def _canonical(self) -> dict[str, Any]:
        sizes = ("reduction_factor", "adapter_scaling")
        return super()._canonical() | {name: whole(getattr(self, name)) for name in sizes}

    def _problems(self) -> list[str]:
        found = scale_problems("adapter_scaling", self.adapter_scaling)
        factor: Any = self.reduction_factor
        if (
            isinstance(factor, bool)
            or not isinstance(factor, int | float)
            or not 0 < factor <= 4096
        ):
            found.append(f"reduction_factor is {factor!r}; it must be more than 0, at most 4096")
        if self.layout not in _LAYOUTS:
            found.append(f"layout is {self.layout!r}; there are {', '.join(_LAYOUTS)}")
        if self.non_linearity not in NON_LINEARITIES:
            known = ", ".join(NON_LINEARITIES)
            found.append(f"non_linearity is {self.non_linearity!r}; there are {known}")
        return found


@dataclass(frozen=True)
class Compacter(Bottleneck):
    """Bottleneck adapters with matrices W = sum over n of R_n (x) (S_n T_n), S and T thin."""

    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = setting("gelu", "f in the bottleneck")
    phm_dim: int = setting(4, "how many Kronecker products are added; divides the widths")
    phm_rank: int = setting(1, "rank of the large factor of each")

    kind: ClassVar[str] = "compacter"
    title: ClassVar[str] = "bottlenecks of sums of Kronecker products (arXiv 2106.04647)"

    def narrow(self, layer: Layer) -> int:
        """Width of the bottleneck, a multiple of phm_dim."""
        return max(self.phm_dim, round(super().narrow(layer) / self.phm_dim) * self.phm_dim)

    def problems(self, layer: Layer) -> list[str]:
        found = super().problems(layer)
        widths = (layer.out_features, self._width_in(layer))
        if not found and any(width % self.phm_dim for width in widths):
            found.append(f"phm_dim={self.phm_dim} does not divide the width {layer.out_features}")
        return found

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        n, r = self.phm_dim, self.phm_rank
        narrow, width, into = self.narrow(layer), layer.out_features, self._width_in(layer)
        found = {"down_bias": torch.zeros(narrow), "up_bias": torch.zeros(width)}
        for name, (rows, columns) in {"down": (narrow, into), "up": (width, narrow)}.items():
            found[f"{name}_R"] = torch.randn(n, n, n, generator=generator) / n
            found[f"{name}_S"] = uniform((n, rows // n, r), r, generator)
            found[f"{name}_T"] = uniform((n, r, columns // n), columns // n, generator)
        found["up_S"] = torch.zeros_like(found["up_S"])
        return found

    def matrices(self, tensors: Tensors) -> Tensors:
        found = {name: tensors[name] for name in ("down_bias", "up_bias")}
        for name in ("down", "up"):
            large = tensors[f"{name}_S"] @ tensors[f"{name}_T"]  # (N, rows / N, columns / N)
            product = torch.einsum("nab,ncd->acbd", tensors[f"{name}_R"], large)
            a, c, b, d = product.shape
            found[name] = product.reshape(a * c, b * d)
        return found

    def _problems(self) -> list[str]:
        found = super()._problems()
        for name in ("phm_dim", "phm_rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
                found.append(f"{name} is {value!r}; it must be a whole number from 1 to 64")
        return found
