"""Structured pruning in one call."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.pruning.structured import calibration, regression, sss, thinet
from sparsekern.pruning.structured.blocks import drop_block_
from sparsekern.pruning.structured.channels import Channels
from sparsekern.pruning.structured.counts import Ratios, check_ratio, kept_count, kept_count_soft, layer_ratios
from sparsekern.pruning.structured.filters import group_scores, largest
from sparsekern.pruning.structured.graph import ChannelGraph, Group, check_dense
from sparsekern.pruning.structured.report import Report, make_report, size
from sparsekern.pruning.structured.slimming import global_threshold, scales
from sparsekern.pruning.structured.targets import TARGETS, Target

METHODS: dict[str, str] = {
    "l1-filters": "filters of smallest L1 norm (Li et al. 2017)",
    "thinet": "channels that the next layer misses least on data, greedily (Luo et al. 2017)",
    "regression": "channels by LASSO on data, next layer refitted (He et al. 2017)",
    "slimming": "channels of smallest batch-norm scale, one threshold for all layers (Liu et al. 2017)",
    "sss": "whole residual blocks of smallest scale (Huang and Wang 2018)",
    "soft-filters": "filters of smallest L2 norm, those that soft pruning zeroed (He et al. 2018)",
    "uniform": "the same fraction of every layer, residual streams included, by L1 norm",
}
DATA = ("thinet", "regression")


@dataclass(frozen=True)
class Options:
    """Settings of the methods that look at data."""

    batches: Sequence[Any] | None
    per_image: int
    samples: int
    rescale: bool
    seed: int


def prune_(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    method: str = "l1-filters",
    *,
    ratios: Ratios | None = None,
    target: str | Target | None = None,
    batches: Iterable[Any] | None = None,
    exclude: Sequence[str] = (),
    coupled: bool | None = None,
    per_image: int = 10,
    samples: int = 5000,
    rescale: bool = True,
    min_channels: int = 1,
    seed: int = 0,
) -> Report:
    """Remove channels or blocks of ``model`` in place; what is left is an ordinary, smaller dense network.

    Make the optimizer afterwards: parameters are new. Train on or start anew, and ``sparsify_`` if wanted.

    Args:
        model: a dense network.
        example_input: [B, ...] or a tuple of arguments, on the model's device.
        method: one of :data:`METHODS`.
        ratios: fraction removed: one for every prunable layer or ``{glob of layer names: fraction}``. ``slimming``
            takes one fraction of all channels; ``sss`` one fraction of the blocks, and without any drops the blocks
            whose scale is zero.
        target: a published architecture, a name of :data:`TARGETS`, instead of ``ratios``.
        batches: images, or tuples that start with them, for ``thinet`` and ``regression``.
        exclude: globs of layers whose channels all stay.
        coupled: also prune channels that residual additions tie across layers, by the sum of their scores; by default
            ``uniform`` alone does.
        per_image: positions sampled from each image.
        samples: positions sampled in total.
        rescale: ``thinet``: scale the kept channels by least squares.
        min_channels: ``slimming``: channels that every layer keeps.
        seed: of the sampled positions.

    Returns:
        A printable :class:`Report`; its ``channels`` rebuild the architecture.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: an unknown method or target, one that does not fit the model, ratios out of range, missing
            batches, sparse layers, or nothing to prune.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}{_near(method, METHODS)}")
    wanted = _target(target, method, ratios)
    images = list(batches) if batches is not None else None
    if method in DATA and not images:
        raise ValueError(f"batches: {method} looks at data; pass a few batches of training images")
    options = Options(images, per_image, samples, rescale, seed)
    check_dense(model)
    before = size(model, example_input)
    if method == "sss":
        channels = _prune_blocks_(model, wanted, ratios)
    else:
        graph = ChannelGraph(model, example_input)
        ties = coupled if coupled is not None else method == "uniform"
        groups = {name: g for name, g in graph.groups().items() if _eligible(g, ties, method, exclude)}
        if not groups:
            raise ValueError(
                f"structured pruning: {type(model).__name__} has no layer whose channels {method} can prune"
            )
        if method == "slimming":
            _slim_(graph, groups, wanted, ratios, min_channels)
        else:
            left = wanted.ratios(model, groups) if wanted is not None else layer_ratios(_given(ratios), groups)
            round_ = kept_count_soft if method == "soft-filters" else kept_count
            counts = {name: round_(groups[name].channels, ratio) for name, ratio in left.items()}
            _CHOOSE[method](graph, groups, counts, options)
        channels = graph.channels
    name = target if isinstance(target, str) else None
    channels.about = {"method": method, "target": name}
    return make_report(method, name, before, size(model, example_input), channels)


def _near(value: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _target(target: str | Target | None, method: str, ratios: Ratios | None) -> Target | None:
    if target is None:
        return None
    if ratios is not None:
        raise ValueError("ratios, target: expected one of them, got both")
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}{_near(target, TARGETS)}")
    found = TARGETS[target]
    if (method == "sss") != bool(found.blocks) or (method == "slimming") != (found.ratio is not None):
        raise ValueError(f"target: {target} is for method {found.method}, got method {method}")
    return found


def _given(ratios: Ratios | None) -> Ratios:
    if ratios is None:
        raise ValueError("ratios: expected the fraction to remove (or a target), got neither")
    return ratios


def _one(ratios: Ratios, method: str) -> float:
    if isinstance(ratios, Mapping):
        raise ValueError(f"ratios: {method} takes one fraction of everything, got one per layer; use exclude")
    return check_ratio(ratios)


def _eligible(group: Group, coupled: bool, method: str, exclude: Sequence[str]) -> bool:
    if group.coupled and not coupled:
        return False
    if method in DATA and len(group.consumers) != 1:
        return False
    return not any(fnmatchcase(name, glob) for name in group.producers for glob in exclude)


def _prune_blocks_(model: nn.Module, target: Target | None, ratios: Ratios | None) -> Channels:
    scores = sss.block_scores(model)
    if not scores:
        raise ValueError(f"sss: expected a network with residual blocks, got {type(model).__name__} without any")
    if target is not None:
        blocks = sss.blocks_for(target.blocks, scores)
    elif ratios is not None:
        blocks = sss.smallest_blocks(scores, _one(ratios, "sss"))
    else:
        blocks = sss.zero_blocks(scores)
    for name in blocks:
        drop_block_(model, name)
    return Channels(blocks=blocks)


def _slim_(
    graph: ChannelGraph,
    groups: Mapping[str, Group],
    target: Target | None,
    ratios: Ratios | None,
    min_channels: int,
) -> None:
    if min_channels < 1:
        raise ValueError(f"min_channels: expected 1 or more, got {min_channels}")
    ratio = target.ratio if target is not None and target.ratio is not None else _one(_given(ratios), "slimming")
    found = {name: scales(graph.model, group) for name, group in groups.items()}
    for name, kept in global_threshold(found, ratio, min_channels).items():
        _keep_(graph, groups[name], kept)


def _keep_(graph: ChannelGraph, group: Group, kept: Sequence[int]) -> None:
    graph.remove_(group, set(range(group.channels)).difference(kept))


def _by_norm(order: int) -> Callable[[ChannelGraph, Mapping[str, Group], Mapping[str, int], Options], None]:
    def choose(graph: ChannelGraph, groups: Mapping[str, Group], counts: Mapping[str, int], options: Options) -> None:
        # Scores before any surgery: filters are ranked with all their inputs (Li et al., "independent pruning").
        kept = {name: largest(group_scores(graph.model, groups[name], order), n) for name, n in counts.items()}
        for name, own in kept.items():
            _keep_(graph, groups[name], own)

    return choose


@torch.no_grad()
def _thinet_(graph: ChannelGraph, groups: Mapping[str, Group], counts: Mapping[str, int], options: Options) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    for name, count in _losing(groups, counts):
        group = groups[name]
        layer = calibration.consumer_of(graph.model, group)
        found = _sample(graph.model, group, options)
        weight = calibration.split_weight(layer, group.channels)
        x = thinet.contributions(found, weight, generator)
        kept = thinet.greedy(x, count)
        _keep_(graph, group, kept)
        if options.rescale:
            factors = thinet.rescale(x, kept).to(weight)
            calibration.split_weight(layer, len(kept)).mul_(factors[:, None])


@torch.no_grad()
def _regression_(graph: ChannelGraph, groups: Mapping[str, Group], counts: Mapping[str, int], options: Options) -> None:
    # The original outputs are the target throughout, so errors of earlier layers are corrected, not passed on.
    original = copy.deepcopy(graph.model)
    for name, count in _losing(groups, counts):
        group = groups[name]
        layer = calibration.consumer_of(graph.model, group)
        reference = calibration.consumer_of(original, group)
        was = calibration.split_weight(reference, group.channels).double()
        target = torch.einsum("nck,ock->no", _sample(original, group, options), was)
        found = _sample(graph.model, group, options)
        weight = calibration.split_weight(layer, group.channels)
        kept = regression.lasso_channels(*regression.normal_equations(found, weight, target), count)
        _keep_(graph, group, kept)
        left = calibration.split_weight(layer, len(kept))
        left.copy_(regression.reconstruct(found[:, kept], left, target))


def _losing(groups: Mapping[str, Group], counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(name, counts[name]) for name in groups if counts.get(name, groups[name].channels) < groups[name].channels]


def _sample(model: nn.Module, group: Group, options: Options) -> Tensor:
    assert options.batches is not None
    return calibration.sample(
        model, group, options.batches, per_image=options.per_image, samples=options.samples, seed=options.seed
    )


_CHOOSE: dict[str, Callable[[ChannelGraph, Mapping[str, Group], Mapping[str, int], Options], None]] = {
    "l1-filters": _by_norm(1),
    "soft-filters": _by_norm(2),
    "uniform": _by_norm(1),
    "thinet": _thinet_,
    "regression": _regression_,
}
