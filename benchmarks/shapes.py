"""Which cases each suite holds: shapes, blocks, sparsities, passes, threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PASSES = ("forward", "dgrad", "wgrad", "step")
BLOCKS = (1, 4, 8, 16, 32, 64)
SPARSITIES = (50, 70, 80, 90, 95, 98)  # percent of the blocks removed
FORMATS = ("nchw", "nhwc")
CPU_SUITES = ("toy", "quick", "gate", "full", "cross")
GPU_SUITES = ("gpu-toy", "gpu-gate", "gpu-full")
SUITES = CPU_SUITES + GPU_SUITES


@dataclass(frozen=True)
class LinearShape:
    """``x [M, I]``, ``w [O, I]``, ``y [M, O]``."""

    m: int
    i: int
    o: int
    bias: bool = True

    @property
    def name(self) -> str:
        return f"{self.m}x{self.i}->{self.o}"

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense forward; dgrad and wgrad have as many."""
        return self.m * self.i * self.o


@dataclass(frozen=True)
class ConvShape:
    """``x [N, C, H, H]``, ``w [O, C, R, R]``."""

    n: int
    c: int
    o: int
    h: int
    r: int = 3
    stride: int = 1
    bias: bool = False

    @property
    def padding(self) -> int:
        return self.r // 2

    @property
    def p(self) -> int:
        """Height and width of the output."""
        return (self.h + 2 * self.padding - self.r) // self.stride + 1

    @property
    def name(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.h}->{self.o} {self.r}x{self.r}" + (
            f" s{self.stride}" if self.stride > 1 else ""
        )

    @property
    def macs(self) -> int:
        """Nominal multiply-adds of the dense forward, padded taps included."""
        return self.n * self.p * self.p * self.o * self.c * self.r * self.r


@dataclass(frozen=True)
class Case:
    """One timed row. ``sparsity`` in percent; ``memory_format`` is ``"row-major"`` for a linear layer."""

    shape: LinearShape | ConvShape
    memory_format: str
    block: int
    sparsity: int
    threads: int
    pass_: str

    @property
    def id(self) -> str:
        return (
            f"{self.shape.name.replace(' ', '-')}-{self.memory_format}-b{self.block}-s{self.sparsity}"
            f"-t{self.threads}-{self.pass_}"
        )


@dataclass(frozen=True)
class TrainCase:
    """One end-to-end training step. ``model`` is a name of :func:`sparsekern.models.names`, ``block`` 0 is "auto"."""

    model: str
    in_shape: tuple[int, int, int]
    batch: int
    block: int
    sparsity: int
    threads: int

    @property
    def id(self) -> str:
        return f"{self.model}-n{self.batch}-b{self.block or 'auto'}-s{self.sparsity}-t{self.threads}"


@dataclass(frozen=True)
class TopologyCase:
    """One topology method on one net. ``method`` is a name of :data:`TOPOLOGY_METHODS`."""

    model: str
    in_shape: tuple[int, int, int]
    batch: int
    method: str
    block: int
    sparsity: int
    threads: int

    @property
    def id(self) -> str:
        name = self.method.replace(" ", "-")
        return f"{self.model}-n{self.batch}-{name}-b{self.block}-s{self.sparsity}-t{self.threads}"


@dataclass(frozen=True)
class Grid:
    """Shapes that share blocks, sparsities and passes; ``step_blocks`` limits the costly whole step."""

    shapes: Sequence[LinearShape | ConvShape]
    blocks: tuple[int, ...] = BLOCKS
    sparsities: tuple[int, ...] = SPARSITIES
    passes: tuple[str, ...] = PASSES
    step_blocks: tuple[int, ...] = BLOCKS


@dataclass(frozen=True)
class Selection:
    """What the command line asked for; ``None`` leaves the suite's own choice."""

    suite: str
    threads: tuple[int, ...]
    blocks: tuple[int, ...] | None = None
    sparsities: tuple[int, ...] | None = None
    passes: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None  # names, see LinearShape.name


LINEAR = LinearShape(2048, 1024, 1024)
LINEAR_PEERS = LinearShape(2048, 1024, 1024, bias=False)  # no peer adds a bias
LINEAR_MORE = (
    LinearShape(4096, 1024, 1024),
    LinearShape(2048, 784, 1024),
    LinearShape(4096, 768, 3072),
    LinearShape(32, 1024, 1024),
)
CONV = ConvShape(128, 128, 128, 16)
CONV_MORE = (ConvShape(128, 64, 64, 32), ConvShape(128, 256, 256, 8))
CONV_EXTRA = (
    ConvShape(128, 64, 128, 32, stride=2),
    ConvShape(128, 128, 128, 16, r=1),
    ConvShape(128, 128, 256, 16, r=1, stride=2),
)

LINEAR_GPU = LinearShape(8192, 4096, 4096)  # the shape of the targets, see targets.json
LINEAR_GPU_PEERS = LinearShape(8192, 4096, 4096, bias=False)
LINEAR_GPU_MORE = (
    LinearShape(8192, 1024, 1024),
    LinearShape(8192, 2048, 2048),
    LinearShape(8192, 768, 3072),
    LinearShape(8192, 8192, 8192),
)
BLOCKS_GPU = (64, 32, 128, 16)
CONV_GPU = (  # the 3x3 layers of WRN-28-10 on CIFAR
    ConvShape(128, 160, 160, 32),
    ConvShape(128, 320, 320, 16),
    ConvShape(128, 640, 640, 8),
)
CONV_GPU_CHANGES = (  # where its stages change: the strided 3x3 layers, and the shortcuts beside them
    ConvShape(128, 160, 320, 32, stride=2),
    ConvShape(128, 320, 640, 16, stride=2),
    ConvShape(128, 160, 320, 32, r=1, stride=2),
    ConvShape(128, 320, 640, 16, r=1, stride=2),
)
CONV_GPU_RESNET = (  # the 3x3 layers of ResNet-50 at 224 pixels
    ConvShape(256, 64, 64, 56),
    ConvShape(256, 128, 128, 28),
    ConvShape(256, 256, 256, 14),
    ConvShape(256, 512, 512, 7),
)
CONV_GPU_VGG = (  # of VGG-16 on CIFAR, and the widest of its twice as wide twin
    ConvShape(128, 128, 128, 16),
    ConvShape(128, 256, 256, 8),
    ConvShape(128, 512, 512, 4),
    ConvShape(128, 1024, 1024, 4),
)
CONV_GPU_SETS = {
    "wrn": CONV_GPU,
    "changes": CONV_GPU_CHANGES,
    "resnet": CONV_GPU_RESNET,
    "vgg": CONV_GPU_VGG,
}

LINEAR_SUITES: dict[str, tuple[Grid, ...]] = {
    "toy": (
        Grid((LinearShape(96, 64, 128),), (1, 4, 16, 32), (50, 90)),
        Grid((LinearShape(33, 50, 70),), (4, 16), (80,)),
    ),
    "quick": (Grid((LINEAR,), (16,), (90,)),),
    "gate": (Grid((LINEAR,), (16, 32), (90,)),),
    "full": (Grid((LINEAR,)), Grid(LINEAR_MORE, (16, 32), (80, 90, 95))),
    "cross": (Grid((LINEAR, *LINEAR_MORE)),),
    "gpu-toy": (Grid((LinearShape(64, 128, 64),), (16, 32), (50,)), Grid((LinearShape(33, 50, 70),), (16,), (80,))),
    "gpu-gate": (Grid((LINEAR_GPU,), BLOCKS_GPU, (90,)),),
    "gpu-full": (
        Grid((LINEAR_GPU,), BLOCKS_GPU, (50, 80, 90, 95)),
        Grid(LINEAR_GPU_MORE, (64, 32, 128), (80, 90, 95), ("forward", "step")),
    ),
}
CONV_SUITES: dict[str, tuple[Grid, ...]] = {
    "toy": (
        Grid((ConvShape(2, 32, 32, 8),), (1, 4, 16), (50, 90)),
        Grid((ConvShape(2, 16, 24, 9, stride=2), ConvShape(2, 32, 16, 8, r=1, bias=True)), (8,), (80,)),
    ),
    "quick": (Grid((CONV,), (16,), (90,)),),
    "gate": (Grid((CONV,), (16, 32), (90,)),),
    "full": (
        Grid((CONV,), step_blocks=(16, 32)),
        Grid(CONV_MORE, (8, 16, 32), (80, 90, 95), step_blocks=(16, 32)),
        Grid(CONV_EXTRA, (16, 32), (90,), step_blocks=(32,)),
    ),
    "cross": (Grid((CONV, *CONV_MORE, *CONV_EXTRA)),),
    "gpu-toy": (
        Grid((ConvShape(2, 32, 32, 6),), (16,), (50,)),
        Grid((ConvShape(2, 16, 40, 7, stride=2), ConvShape(2, 32, 16, 6, r=1, stride=2)), (16,), (50,), ("step",)),
    ),
    "gpu-gate": (Grid(CONV_GPU, (64, 32), (90, 80)),),
    "gpu-full": (
        Grid(CONV_GPU, BLOCKS_GPU, (80, 90, 95)),
        Grid(CONV_GPU_CHANGES, BLOCKS_GPU, (80, 90)),
        Grid((*CONV_GPU_RESNET, *CONV_GPU_VGG), BLOCKS_GPU, (80, 90, 95), ("forward", "step")),
    ),
}
_MNIST, _CIFAR = (1, 28, 28), (3, 32, 32)
TRAIN_SUITES: dict[str, tuple[tuple[str, tuple[int, int, int], int, tuple[int, ...], tuple[int, ...]], ...]] = {
    # model, in_shape, batch, blocks, sparsities
    "toy": (("mlp-64-64", (1, 8, 8), 16, (16,), (90,)), ("resnet20-w8", (3, 8, 8), 4, (4,), (80,))),
    "quick": (("mlp", _MNIST, 512, (0,), (90,)),),
    "gate": (),
    "full": (
        ("mlp", _MNIST, 512, (0, 16), (80, 90, 95)),
        ("vgg16", _CIFAR, 32, (0,), (80, 90, 95)),
        ("wrn-16-4", _CIFAR, 32, (0,), (80, 90, 95)),
    ),
    "cross": (
        ("mlp", _MNIST, 512, (0, *BLOCKS), SPARSITIES),
        ("vgg16", _CIFAR, 32, (0, 8, 16, 32), SPARSITIES),
        ("wrn-16-4", _CIFAR, 32, (0, 8, 16, 32), SPARSITIES),
        ("resnet20-w64", _CIFAR, 32, (0, 8, 16, 32), SPARSITIES),
    ),
}
# "exact" RigL takes norms of the dense gradient; "snfs" is timed against its own steps between two updates, and "snfs
# momentum" is what the dense gradient of every such step takes.
TOPOLOGY_METHODS = ("set", "rigl", "rigl exact", "srigl", "snfs", "snfs momentum", "dsr", "gradual")
TOPOLOGY_SUITES: dict[str, tuple[tuple[str, tuple[int, int, int], int, tuple[int, ...], tuple[str, ...]], ...]] = {
    # model, in_shape, batch, blocks, methods
    "toy": (
        ("mlp-48-48", (1, 8, 8), 16, (4,), TOPOLOGY_METHODS),
        ("wrn-10-1", (3, 8, 8), 4, (1,), ("set", "rigl", "snfs")),
    ),
    "quick": (("mlp", _MNIST, 512, (16,), ("set", "rigl")),),
    # Nets and batches of the training steps above; a small batch shows what an update costs where steps are short.
    "full": (
        ("mlp", _MNIST, 512, (1, 8, 16), TOPOLOGY_METHODS),
        ("mlp", _MNIST, 128, (1, 8, 16), ("set", "rigl")),
        ("wrn-16-4", _CIFAR, 32, (1, 8, 16), TOPOLOGY_METHODS),
    ),
}
PEER_SUITES: dict[str, tuple[Grid, ...]] = {
    "toy": (Grid((LinearShape(64, 64, 64, bias=False),), (1, 16), (90,), PASSES[:3]),),
    "quick": (),
    "gate": (),
    "full": (Grid((LINEAR_PEERS,), (1, 16), (80, 90, 95), PASSES[:3]),),
    "cross": (Grid((LINEAR_PEERS,), (1, 16, 32), SPARSITIES, PASSES[:3]),),
    "gpu-toy": (Grid((LinearShape(64, 64, 64, bias=False),), (16,), (50,)),),
    "gpu-gate": (),
    "gpu-full": (Grid((LINEAR_GPU_PEERS,), BLOCKS_GPU, (80, 90)),),
}
ROUNDS = {"toy": 3, "quick": 10, "gate": 15, "full": 5, "cross": 5, "gpu-toy": 3, "gpu-gate": 50, "gpu-full": 30}
BUDGET_S = {
    **{"toy": 0.1, "quick": 3.0, "gate": 6.0, "full": 0.5, "cross": 0.5},
    **{"gpu-toy": 0.1, "gpu-gate": 1.0, "gpu-full": 0.6},
}


def linear_cases(want: Selection) -> list[Case]:
    return list(_expand(LINEAR_SUITES[want.suite], ("row-major",), want))


def conv2d_cases(want: Selection) -> list[Case]:
    return list(_expand(CONV_SUITES[want.suite], FORMATS[1:] if want.suite in GPU_SUITES else FORMATS, want))


def peer_cases(want: Selection) -> list[Case]:
    cases = _expand(PEER_SUITES[want.suite], ("row-major",), want)
    return [case for case in cases if case.pass_ != "step" or want.suite in GPU_SUITES]


def train_cases(want: Selection) -> list[TrainCase]:
    return [
        TrainCase(model, in_shape, batch, block, sparsity, threads)
        for model, in_shape, batch, blocks, sparsities in TRAIN_SUITES.get(want.suite, ())
        for block in want.blocks or blocks
        for sparsity in want.sparsities or sparsities
        for threads in want.threads
    ]


def topology_cases(want: Selection) -> list[TopologyCase]:
    return [
        TopologyCase(model, in_shape, batch, method, block, sparsity, threads)
        for model, in_shape, batch, blocks, methods in TOPOLOGY_SUITES.get(want.suite, ())
        for block in want.blocks or blocks
        for sparsity in want.sparsities or (90,)
        for method in methods
        for threads in want.threads
    ]


def _expand(grids: Sequence[Grid], formats: Sequence[str], want: Selection) -> Iterator[Case]:
    """Passes and threads vary fastest: cases in a row share operands, layout and reference results."""
    for grid in grids:
        for shape in grid.shapes:
            if want.shapes and shape.name not in want.shapes:
                continue
            for memory_format in formats:
                for block in want.blocks or grid.blocks:
                    for sparsity in want.sparsities or grid.sparsities:
                        for threads in want.threads:
                            for pass_ in want.passes or grid.passes:
                                if pass_ != "step" or want.passes or block in grid.step_blocks:
                                    yield Case(shape, memory_format, block, sparsity, threads, pass_)
