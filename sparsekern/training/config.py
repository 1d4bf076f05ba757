"""What to train and how: one validated, immutable record. The command line is generated from its fields."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsekern.training.errors import ConfigError
from sparsekern.training.method_options import METHOD_FIELDS, METHODS, check_method


@dataclass(frozen=True)
class Option:
    """What the command line needs to know about a field.

    Attributes:
        group: heading under which ``--help`` lists it.
        help: one line.
        choices: the values allowed, empty for any.
        low: smallest value allowed (of each element, for a list).
        high: largest value allowed.
        below: exclusive upper bound.
        operational: does not change what is computed, so a resumed run may use another value.
        metavar: placeholder in ``--help`` and in messages.
    """

    group: str
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    below: float | None = None
    operational: bool = False
    metavar: str | None = None


def _field(default: Any, group: str, help: str, **rules: Any) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(group, help, **rules)})


_MODEL, _OPTIM, _SPARSE, _RUN = "Model and data", "Optimization", "Sparsity", "Run"
_DYNAMIC = "Dynamic sparsity"
_CHANNELS = "Channel pruning (see sparsekern slim)"


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every value is checked on construction; :class:`ConfigError` names the field and the fix.

    Units: ``warmup`` in epochs, ``milestones``, ``start_fraction`` and ``stop_fraction`` as fractions of the run,
    ``checkpoint_minutes`` in minutes, all other counts in steps or epochs as named. ``sparsity=0`` trains the model as
    built, dense. With ``init`` the sparse layers are those of the file and the sparsity options plan nothing, except
    that ``method="gradual"`` prunes the dense net of the file.
    """

    model: str = _field("mlp", _MODEL, "Model name (sparsekern.models.names()).")
    width: float = _field(1.0, _MODEL, "Width multiplier of the model.", low=0.0)
    channels: str | None = _field(
        None, _MODEL, "channels.json of a slimmed net: the channels that the model keeps.", metavar="FILE"
    )
    init: str | None = _field(
        None, _MODEL, "Start from the weights and layout of this run folder, model.pt or snapshot.", metavar="PATH"
    )
    data: str = _field("digits", _MODEL, "Data set name (digits needs no files).")
    data_dir: str | None = _field(
        None, _MODEL, "Folder of the data files, $SPARSEKERN_DATA if not given.", operational=True, metavar="DIR"
    )
    batch_size: int = _field(128, _MODEL, "Samples per step.", low=1)
    augment: tuple[str, ...] = _field(
        (), _MODEL, "Augmentations of training images.", choices=("crop", "flip"), metavar="crop,flip"
    )
    label_noise: float = _field(0.0, _MODEL, "Fraction of training labels replaced.", low=0.0, high=1.0)
    noise_kind: str = _field("symmetric", _MODEL, "Which wrong label a replaced one gets.", metavar="KIND")
    val_split: float = _field(0.0, _MODEL, "Fraction of the training set held out for validation.", low=0.0, below=1.0)
    subset: int = _field(0, _MODEL, "Train on this many samples only; 0 is all.", low=0)
    test_subset: int = _field(0, _MODEL, "Test on this many samples only; 0 is all.", low=0)

    epochs: int = _field(10, _OPTIM, "Passes over the training set.", low=0)
    steps: int = _field(0, _OPTIM, "Optimizer steps; overrides epochs when above 0.", low=0)
    optimizer: str = _field("sgd", _OPTIM, "Optimizer.", choices=("sgd", "adamw"))
    lr: float = _field(0.0, _OPTIM, "Learning rate after warm-up; 0 is 0.1 for sgd and 0.001 for adamw.", low=0.0)
    momentum: float = _field(0.9, _OPTIM, "Momentum of sgd; first beta of adamw.", low=0.0, below=1.0)
    nesterov: bool = _field(False, _OPTIM, "Nesterov momentum (sgd).")
    weight_decay: float = _field(5e-4, _OPTIM, "Weight decay (decoupled in adamw).", low=0.0)
    decay_norm_bias: bool = _field(False, _OPTIM, "Apply weight decay to normalization weights and biases too.")
    schedule: str = _field("step", _OPTIM, "Learning-rate schedule.", choices=("step", "cosine", "constant", "linear"))
    milestones: tuple[float, ...] = _field(
        (0.5, 0.75), _OPTIM, "Where schedule=step lowers the rate, as fractions of the run.",
        low=0.0, high=1.0, metavar="0.5,0.75",
    )  # fmt: skip
    gamma: float = _field(0.1, _OPTIM, "Factor at each milestone.", low=0.0, high=1.0)
    warmup: float = _field(0.0, _OPTIM, "Epochs of linear warm-up.", low=0.0)
    sparse_lr: bool = _field(
        False, _OPTIM, "Multiply the rate by exp(1.969 s^2 + 0.2905 s) at sparsity s of the sparse layers."
    )
    label_smoothing: float = _field(0.0, _OPTIM, "Label smoothing of the training loss.", low=0.0, below=1.0)
    clip_norm: float = _field(0.0, _OPTIM, "Clip the gradient norm to this; 0 is off.", low=0.0)

    slimming: float = _field(
        0.0, _CHANNELS, "L1 penalty on batch-norm scales: network slimming (1e-4 VGG, 1e-5 ResNet).", low=0.0
    )
    block_penalty: float = _field(
        0.0, _CHANNELS, "L1 penalty on a scale of every residual block: sparse structure selection.", low=0.0
    )
    soft_filters: float = _field(
        0.0, _CHANNELS, "Fraction of filters zeroed after every epoch: soft filter pruning.", low=0.0, below=1.0
    )

    sparsity: float = _field(0.9, _SPARSE, "Fraction of weights (or MACs) removed; 0 trains dense.", low=0.0, below=1.0)
    block: int | tuple[int, int] | str = _field(
        "auto", _SPARSE, "Block size: auto, B or BOxBI; 1 is unstructured.", metavar="auto|B|BOxBI"
    )
    allocation: str = _field("erk", _SPARSE, "How sparsity is spread over layers (erk, uniform, ...).")
    budget: str = _field("params", _SPARSE, "What sparsity counts.", choices=("params", "macs"))
    pattern: str = _field(
        "random", _SPARSE, "Where the stored blocks lie.", choices=("random", "balanced", "butterfly", "fan_in")
    )
    exclude: tuple[str, ...] = _field((), _SPARSE, "Globs of layers left dense; repeat or separate by commas.",
                                      metavar="GLOB")  # fmt: skip
    override: dict[str, float] = dataclasses.field(
        default_factory=dict,
        metadata={"option": Option(_SPARSE, "Sparsity of the layers a glob matches; repeatable.", low=0.0, below=1.0,
                                   metavar="GLOB=SPARSITY")},
    )  # fmt: skip
    below_break_even: str = _field(
        "dense", _SPARSE, "State of a layer that would not run faster sparse.", choices=("dense", "masked", "sparse")
    )
    rescale: bool = _field(False, _SPARSE, "Scale initial weights by 1/sqrt(density).")
    tune: bool = _field(False, _SPARSE, "Measure the break-even of this model on this machine first.")

    method: str = _field("static", _DYNAMIC, "How stored blocks move during training.", choices=METHODS)
    drop_fraction: float = _field(0.3, _DYNAMIC, "Fraction of blocks dropped at the first update.", low=0.0, high=1.0)
    update_every: int = _field(100, _DYNAMIC, "Steps between updates.", low=1)
    start_fraction: float = _field(
        0.0, _DYNAMIC, "Where gradual pruning begins, as a fraction of the run.", low=0.0, below=1.0
    )
    stop_fraction: float = _field(0.75, _DYNAMIC, "Where updates end, as a fraction of the run.", low=0.0, high=1.0)
    drop_schedule: str = _field(
        "cosine", _DYNAMIC, "How drop_fraction falls.", choices=("cosine", "linear", "constant")
    )
    drop_by: str = _field(
        "l1", _DYNAMIC, "What decides which blocks go: a norm, or signed as SET does it (block 1).",
        choices=("l1", "l2", "linf", "gradient", "random", "signed"),
    )  # fmt: skip
    growth: str = _field("random", _DYNAMIC, "Which blocks set grows.", choices=("random", "unexplored"))
    threshold: float = _field(1e-3, _DYNAMIC, "Magnitude below which dsr first drops; it adapts.", low=0.0)
    new_values: str = _field(
        "zero", _DYNAMIC, "What grown blocks start from; random ones are as large as the others.",
        choices=("zero", "random"),
    )  # fmt: skip
    scope: str = _field("layer", _DYNAMIC, "Where blocks compete.", choices=("layer", "global"))
    min_per_row: int = _field(0, _DYNAMIC, "Blocks that every block row keeps.", low=0)
    min_per_col: int = _field(0, _DYNAMIC, "Blocks that every block column keeps.", low=0)
    exact: bool = _field(False, _DYNAMIC, "Scores of the exact dense gradient at updates (rigl, srigl).")
    ablation: float = _field(
        0.3, _DYNAMIC, "Rows with fewer salient blocks than this share of the fan-in are left empty (srigl).",
        low=0.0, high=1.0,
    )  # fmt: skip
    capacity: float = _field(
        1.0, _DYNAMIC, "Block slots over stored blocks: room for blocks that change layers.", low=1.0
    )
    initial_sparsity: float = _field(0.0, _DYNAMIC, "Sparsity that gradual pruning starts from.", low=0.0, below=1.0)
    compact_at: tuple[float, ...] = _field(
        (), _DYNAMIC, "Shares of the gradual pruning done, after which the memory of what went is freed.",
        low=0.0, high=1.0, metavar="0.5,0.9",
    )  # fmt: skip
    sparse_below: float = _field(
        0.0, _DYNAMIC, "Compute densely until memory is freed with a layer's density at most this (gradual); 0: never.",
        low=0.0, high=1.0,
    )  # fmt: skip

    seed: int = _field(0, _RUN, "Seed of weights, masks, data order and label noise.", low=0)
    device: str = _field("auto", _RUN, "auto, cpu or cuda[:N].")
    threads: int = _field(0, _RUN, "CPU threads; 0 keeps the default of torch.", low=0)
    amp: bool = _field(False, _RUN, "bf16 autocast.")
    channels_last: bool = _field(False, _RUN, "channels_last memory of images and convolutions.")
    compile: bool = _field(False, _RUN, "torch.compile the model.")
    log_every: int = _field(50, _RUN, "Steps between lines of metrics.jsonl.", low=1)
    eval_every: int = _field(1, _RUN, "Epochs between tests; the last epoch is always tested.", low=1)
    snapshots: tuple[int, ...] = _field(
        (), _RUN, "Keep the weights after these steps in snapshots/; 0 is before the first.", low=0, metavar="STEP"
    )
    checkpoint_every: int = _field(0, _RUN, "Steps between checkpoints; 0 is off.", low=0, operational=True)
    checkpoint_minutes: float = _field(10.0, _RUN, "Minutes between checkpoints; 0 is off.", low=0.0, operational=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _coerce(field, getattr(self, field.name)))
        if self.width <= 0:
            raise ConfigError(f"width: expected a factor above 0, got {self.width:g}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ConfigError("nesterov: needs optimizer sgd with momentum above 0")
        if self.epochs == 0 and self.steps == 0:
            raise ConfigError("epochs: expected 1 or more epochs (or --steps), got 0")
        object.__setattr__(self, "snapshots", tuple(sorted(set(self.snapshots))))
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        check_method(self.method, values, _DEFAULTS)
        if self.sparse_lr and self.sparsity == 0 and not self.override and self.init is None:
            raise ConfigError("sparse_lr: needs a sparsity above 0, got 0; drop sparse_lr")
        if self.steps and any(step > self.steps for step in self.snapshots):
            raise ConfigError(f"snapshots: expected steps up to {self.steps} (the run's), got {max(self.snapshots)}")
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            raise ConfigError(f"device: expected auto, cpu or cuda[:N], got {self.device!r}")

    @property
    def base_lr(self) -> float:
        return self.lr or {"sgd": 0.1, "adamw": 1e-3}[self.optimizer]

    def dense(self, **changes: Any) -> TrainConfig:
        """The same run without sparsity: its dense twin."""
        reset = {name: _DEFAULTS[name] for name in METHOD_FIELDS}
        off = {"sparsity": 0.0, "override": {}, "tune": False, "method": "static", "sparse_lr": False}
        return dataclasses.replace(self, **{**reset, **off, **changes})

    @property
    def block_value(self) -> int | tuple[int, int] | str:
        """``"auto"``, an int or ``(bo, bi)``, as :class:`sparsekern.SparsityConfig` takes it."""
        if self.block == "auto":
            return "auto"
        sides = [int(side) for side in str(self.block).split("x")]
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only (lists for tuples); ``from_dict`` is the inverse."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            plain[field.name] = list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> TrainConfig:
        """Build from ``values``; :class:`ConfigError` names an unknown key, its nearest name and ``source``."""
        known = option_names()
        for key in values:
            if key not in known:
                raise ConfigError(f"{source}: unknown key {key!r}{_did_you_mean(str(key), known)}")
        return cls(**values)

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the fields that change what is computed and differ."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if not field.metadata["option"].operational and getattr(self, field.name) != getattr(other, field.name)
        ]

    def digest(self) -> str:
        """Hash of the fields that change what is computed."""
        fields = [f for f in dataclasses.fields(self) if not f.metadata["option"].operational]
        values = {f.name: getattr(self, f.name) for f in fields}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def option_names() -> list[str]:
    return [field.name for field in dataclasses.fields(TrainConfig)]


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping of :class:`TrainConfig` fields; :class:`ConfigError` where that fails."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"config file {path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: expected a mapping of option names to values")
    known = option_names()
    # A YAML author writes the option as on the command line; both spellings are taken.
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in named:
        if key not in known:
            raise ConfigError(f"config file {path}: unknown key {key!r}{_did_you_mean(key, known)}")
    return named


def save_yaml(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def suggest(what: str, value: str, allowed: Iterable[str]) -> str:
    """``what: expected one of ..., got 'value'; did you mean ...?`` as one line."""
    allowed = sorted(allowed)
    return f"{what}: expected one of {', '.join(allowed)}, got {value!r}{_did_you_mean(value, allowed)}"


def _did_you_mean(value: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(allowed), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _coerce(field: dataclasses.Field[Any], value: Any) -> Any:
    option: Option = field.metadata["option"]
    hint = _HINTS.get(field.name) or _HINTS.setdefault(field.name, typing.get_type_hints(TrainConfig)[field.name])
    name = field.name
    if name == "block":
        return _block(value)
    if hint == dict[str, float]:
        return _overrides(name, value, option)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_scalar(name, item, entry, option) for entry in _entries(value))
    if hint == str | None:
        return None if value is None else os.fspath(value)
    return _scalar(name, hint, value, option)


_HINTS: dict[str, Any] = {}


def _entries(value: Any) -> list[Any]:
    """Items of a list that may come as one comma-separated string, or as several."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [entry for part in value for entry in (_entries(part) if isinstance(part, str) else [part])]
    if isinstance(value, str):
        return [entry.strip() for entry in value.split(",") if entry.strip()]
    return [value]


def _scalar(name: str, kind: type, value: Any, option: Option) -> Any:
    given = value
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool) or value is None:
            raise ValueError
        if kind is str:
            value = str(value)
        elif kind is int:
            if float(value) != int(float(value)):
                raise ValueError
            value = int(float(value))
        else:
            value = float(value)
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError
    except (ValueError, TypeError, OverflowError):
        noun = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}[kind]
        raise ConfigError(f"{name}: expected {noun}, got {given!r}") from None
    if option.choices and value not in option.choices:
        raise ConfigError(suggest(name, value, option.choices))
    if kind in (int, float):
        _check_range(name, value, option)
    return value


def _check_range(name: str, value: float, option: Option) -> None:
    too_low = option.low is not None and value < option.low
    too_high = (option.high is not None and value > option.high) or (option.below is not None and value >= option.below)
    if not (too_low or too_high):
        return
    bounds = [f"at least {option.low:g}"] if option.low is not None else []
    bounds += [f"at most {option.high:g}"] if option.high is not None else []
    bounds += [f"below {option.below:g}"] if option.below is not None else []
    raise ConfigError(f"{name}: expected a value {' and '.join(bounds)}, got {value:g}")


def _block(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = "x".join(str(side) for side in value)
    text = str(value).strip().lower()
    match = re.fullmatch(r"auto|(\d+)(?:x(\d+))?", text)
    if match is None or isinstance(value, bool):
        raise ConfigError(f"block: expected auto, a size such as 16, or BOxBI such as 16x32, got {value!r}")
    sides = [int(side) for side in match.groups() if side is not None]
    if any(not 1 <= side <= 128 for side in sides):
        raise ConfigError(f"block: expected sizes within 1..128, got {text}")
    return text


def _overrides(name: str, value: Any, option: Option) -> dict[str, float]:
    pairs: list[tuple[str, Any]]
    if value is None:
        pairs = []
    elif isinstance(value, Mapping):
        pairs = [(str(glob), entry) for glob, entry in value.items()]
    else:
        pairs = []
        for entry in _entries(value):
            glob, equals, number = str(entry).rpartition("=")
            if not equals or not glob:
                raise ConfigError(f"{name}: expected {option.metavar}, got {entry!r}")
            pairs.append((glob, number))
    return {glob: _scalar(f"{name} {glob}", float, entry, option) for glob, entry in pairs}
