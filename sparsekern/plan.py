"""The plan: per layer, what becomes of it and why. Printable, and what ``sparsify_`` carries out."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

STATES = ("sparse", "dense", "masked")


@dataclass
class LayerPlan:
    """One layer of a plan.

    Attributes:
        state: "sparse" (runs on kernels), "dense" (left as it was) or "masked" (sparse weights, dense compute).
        reason: why it is not sparse, or which backend runs it.
        target_density: what the allocation asked for.
        density: kept weights over all weights of the layer.
        params, macs: after sparsifying, bias excluded; ``macs`` are per example and None without an example input.
        nnz, blocks: stored blocks and blocks of the full grid.
        fill: kept elements over elements of stored blocks (1.0 for block masks).
        speedup: forward and backward against dense as predicted or measured, None where unknown.
        source: where ``speedup`` comes from.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    state: str = "dense"
    reason: str = ""
    block: tuple[int, int] | None = None
    target_density: float = 1.0
    density: float = 1.0
    params_dense: int = 0
    params: int = 0
    macs_dense: int | None = None
    macs: int | None = None
    nnz: int = 0
    blocks: int = 0
    fill: float = 1.0
    backend: str = ""
    speedup: float | None = None
    source: str = ""


@dataclass
class Plan:
    """What :func:`sparsekern.plan` and :func:`sparsekern.sparsify_` return.

    Attributes:
        layers: every Linear and Conv2d of the model, in model order.
        other_params: parameters outside those layers' weights (biases, norms, embeddings, ...).
        notes: assumptions worth knowing.
    """

    layers: list[LayerPlan]
    other_params: int = 0
    notes: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        """Parameters, MACs per example and density over the whole model, and layers per state."""
        dense = sum(layer.params_dense for layer in self.layers)
        kept = sum(layer.params for layer in self.layers)
        touched = [layer for layer in self.layers if layer.state != "dense"]
        known = bool(self.layers) and all(layer.macs_dense is not None for layer in self.layers)
        macs_dense = sum(layer.macs_dense or 0 for layer in self.layers) if known else None
        macs = sum(layer.macs or 0 for layer in self.layers) if known else None
        touched_dense = sum(layer.params_dense for layer in touched)
        return {
            "params_dense": dense + self.other_params,
            "params": kept + self.other_params,
            "density": kept / dense if dense else 1.0,
            "density_sparsified": sum(layer.params for layer in touched) / touched_dense if touched_dense else 1.0,
            "macs_dense": macs_dense,
            "macs": macs,
            "macs_ratio": macs / macs_dense if macs is not None and macs_dense else None,
            **{state: sum(layer.state == state for layer in self.layers) for state in STATES},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"layers": [...], "totals": {...}, "notes": [...]}."""
        return {"layers": [asdict(layer) for layer in self.layers], "totals": self.totals(), "notes": list(self.notes)}

    def to_pandas(self) -> Any:
        """One row per layer; needs pandas."""
        import pandas

        return pandas.DataFrame([asdict(layer) for layer in self.layers])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="sparsekern plan", title_justify="left", header_style="bold")
        for column in ("layer", "weight", "state", "block"):
            table.add_column(column, overflow="fold")
        for column in ("target", "density", "params", "MACs", "speedup"):
            table.add_column(column, justify="right")
        table.add_column("why", overflow="fold")
        style = {"sparse": "green", "dense": "", "masked": "yellow"}
        for layer in self.layers:
            sparse = layer.state != "dense"
            table.add_row(
                layer.name,
                "x".join(map(str, layer.weight_shape)),
                Text(layer.state, style=style[layer.state]),
                "x".join(map(str, layer.block)) if layer.block and sparse else "",
                f"{layer.target_density:.4f}" if layer.target_density < 1 else "",
                f"{layer.density:.4f}" + (f" (fill {layer.fill:.2f})" if layer.fill < 1 else ""),
                _change(layer.params_dense, layer.params),
                _change(layer.macs_dense, layer.macs),
                f"{layer.speedup:.2f}x" if layer.speedup is not None else "",
                layer.reason,
            )
        t = self.totals()
        total = (
            f"{t['sparse']} sparse, {t['masked']} masked, {t['dense']} dense layers; "
            f"parameters {_change(t['params_dense'], t['params'])} ({t['density']:.4f} of the layers' weights)"
        )
        if t["macs"] is not None:
            total += f"; MACs per example {_change(t['macs_dense'], t['macs'])} ({t['macs_ratio']:.4f})"
        return Group(table, Text(total), *[Text(f"note: {note}", style="dim") for note in self.notes])

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=160, color_system=None).print(self.__rich__())
        return out.getvalue().rstrip()


def human(count: float | None) -> str:
    """1234567 -> 1.23M."""
    if count is None:
        return ""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def _change(before: int | None, after: int | None) -> str:
    return human(before) if before == after else f"{human(before)} -> {human(after)}"
