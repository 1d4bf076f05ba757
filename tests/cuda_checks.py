"""The passes of the CUDA kernels against float64, plan by plan: on a GPU, and in the emulation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sparsekern import element_mask
from sparsekern.backends import ConvGeometry, cuda
from sparsekern.backends.cuda import plans
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.problem import layer_problem

from .gpu_support import BOUNDS, DTYPES, draw
from .support import assert_within, conv2d_reference, linear_reference

ONE = ConvGeometry((1, 1), (1, 1, 1, 1), (1, 1))
TWO = replace(ONE, stride=(2, 2))
GEOMETRIES = {
    "3x3": ((136, 168, 3, 3), (5, 168, 14, 13), ONE, 1),
    "3x3, stride 2": ((136, 168, 3, 3), (5, 168, 14, 13), TWO, 1),
    "small images": ((64, 96, 3, 3), (37, 96, 4, 4), ONE, 1),
    "1x1": ((72, 96, 1, 1), (3, 96, 9, 7), ConvGeometry((1, 1), (0, 0, 0, 0), (1, 1)), 1),
    "1x1, stride 2": ((72, 96, 1, 1), (3, 96, 9, 7), ConvGeometry((2, 2), (0, 0, 0, 0), (1, 1)), 1),
    "5x3, uneven": ((40, 48, 5, 3), (2, 48, 17, 12), ConvGeometry((2, 1), (0, 2, 1, 0), (1, 1)), 1),
    "dilated": ((48, 64, 3, 3), (2, 64, 20, 21), ConvGeometry((1, 2), (2, 2, 4, 4), (2, 4)), 1),
    "groups": ((128, 32, 3, 3), (3, 128, 10, 11), ONE, 4),
    "groups, ragged": ((66, 21, 3, 3), (3, 63, 9, 8), TWO, 3),
    "odd channels": ((45, 37, 3, 3), (3, 37, 8, 9), ONE, 1),
    "stride 3 over 2x2": ((48, 32, 2, 2), (2, 32, 10, 11), ConvGeometry((3, 3), (1, 0, 0, 1), (1, 1)), 1),
    "one pixel": ((32, 32, 3, 3), (130, 32, 1, 1), ONE, 1),
}


def chip():
    return chips.current("cuda")


def listed(step, dtype, layout, geometry, x_shape):
    """Candidate plans, with three splits each where the family splits."""
    problem = layer_problem(step, dtype, layout.grid, geometry, x_shape, layout.capacity)
    found = plans.candidates(problem, chip())
    assert found, problem
    more = [replace(plan, splits=3) for plan in found if plan.family != "streamed"]
    return dict.fromkeys([*found, *more])


def check(layout, x, dy, bias, geometry, expected, magnitude, bound, bits=None):
    """All three passes by all plans."""
    w = layout.from_dense(expected["w"]).to(x.dtype)
    index, grid = layout.index, layout.grid
    for plan in listed("forward", x.dtype, layout, geometry, x.shape):
        y = cuda.forward(x, w, index, bias, grid, geometry, plan)
        assert_within(y, expected["y"], magnitude["y"], f"y {plan}", bound)
    for plan in listed("dgrad", x.dtype, layout, geometry, x.shape):
        dx = cuda.dgrad(dy, w, index, tuple(x.shape), grid, geometry, plan)
        assert_within(dx, expected["dx"], magnitude["dx"], f"dx {plan}", bound)
    want, most = layout.from_dense(expected["dw"]), layout.from_dense(magnitude["dw"])
    if bits is not None:
        kept = element_mask.unpack(bits, grid.block)
        want, most = want * kept, most * kept
    for plan in listed("wgrad", x.dtype, layout, geometry, x.shape):
        dvalues, dbias = cuda.wgrad(dy, x, index, bits, bias is not None, grid, geometry, plan)
        assert_within(dvalues, want, most, f"dvalues {plan}", bound)
        assert not dvalues[layout.nnz :].any()
        if bias is None:
            assert dbias.shape == (0,)
        else:
            assert_within(dbias, expected["dbias"], magnitude["dbias"], f"dbias {plan}", bound)


def random_bits(layout):
    return element_mask.pack(torch.rand(layout.capacity, *layout.grid.block, device=layout.index.device) < 0.5)


def check_linear(layout, m, dtype, *, bias=True, bits=None, x=None):
    out, inp = layout.grid.weight_shape
    number, bound = DTYPES[dtype], BOUNDS[dtype]
    x, dy = draw(m, inp, dtype=number) if x is None else x, draw(m, out, dtype=number)
    b = draw(out, dtype=number) if bias else None
    w = draw(out, inp, dtype=number) * layout.mask()
    wide = [x.double(), w.double(), torch.zeros_like(dy[:1]).double()[0] if b is None else b.double(), dy.double()]
    if m == 0:
        wide[2] = torch.zeros(out, device=x.device, dtype=torch.float64) if b is None else b.double()
    expected = {**linear_reference(*wide), "w": w}
    check(layout, x, dy, b, None, expected, linear_reference(*[t.abs() for t in wide]), bound, bits)


def check_conv(layout, x_shape, geometry, dtype, *, bias=True, bits=None):
    weight, groups = layout.grid.weight_shape, layout.grid.groups
    number, bound = DTYPES[dtype], BOUNDS[dtype]

    def image(*shape):
        return draw(*shape, dtype=number).contiguous(memory_format=torch.channels_last)

    out_size = geometry.output_size(*x_shape[2:], weight[2:])
    x, dy = image(*x_shape), image(x_shape[0], weight[0], *out_size)
    b = draw(weight[0], dtype=number) if bias else None
    w = draw(*weight, dtype=number) * layout.mask()
    top, bottom, left, right = geometry.padding
    padded = nn.functional.pad(x.double(), (left, right, top, bottom)).contiguous()
    zero = torch.zeros(weight[0], device=x.device, dtype=torch.float64)
    wide = [padded, w.double().contiguous(), zero if b is None else b.double(), dy.double().contiguous()]
    facts = {"stride": geometry.stride, "dilation": geometry.dilation, "groups": groups}
    expected, magnitude = conv2d_reference(*wide, **facts), conv2d_reference(*[t.abs() for t in wide], **facts)
    for found in (expected, magnitude):
        found["dx"] = found["dx"][:, :, top : top + x_shape[2], left : left + x_shape[3]]
    check(layout, x, dy, b, geometry, {**expected, "w": w}, magnitude, bound, bits)
