"""Whole nets, overheads and training on real data, as the run on a GPU measures them; here on tiny cases."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import accuracy, adapters, kernel_parts, nets, overheads
from benchmarks.timing import Effort
from sparsekern.backends import OpDesc, get
from sparsekern.report import load

# -- where a net's time goes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("sm80_xmma_wgrad_implicit_gemm_indexed_wo_smem_bf16bf16", "convolutions"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "convolutions"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>", "convolutions"),
        ("conv2d_gather_kernel", "convolutions"),
        ("linear_wgrad_kernel", "convolutions"),
        ("sum_chunks_kernel", "convolutions"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<__nv_bfloat16, float, int, 512, true, 1, true>", "norms"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<...>", "norms"),
        ("nhwc_batch_norm_fwd", "norms"),
        ("triton_red_fused__native_batch_norm_legit_functional_relu_3", "norms"),
        ("triton_poi_fused_add_relu_7", "activations"),
        ("triton_poi_fused__to_copy_12", "copies and casts"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::threshold_kernel_impl<c10::BFloat16>>",
            "activations",
        ),
        ("void at::native::elementwise_kernel<CUDAFunctor_add<c10::BFloat16>>", "activations"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor<float, 3>>",
            "optimizer",
        ),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "copies and casts"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "copies and casts"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert kernel_parts.kind_of(kernel) == kind


def _event(name: str, us: float, device: Any = DeviceType.CUDA, **more: Any) -> Any:
    return types.SimpleNamespace(
        name=name, device_type=device, time_range=types.SimpleNamespace(elapsed_us=lambda: us), **more
    )


def test_only_kernels_count_and_once() -> None:
    events = [
        _event("conv2d_gather_kernel", 600.0),
        _event("nhwc_batch_norm_fwd", 200.0),
        _event("Optimizer.step#SGD.step", 5000.0),
        _event("anything", 5000.0, is_user_annotation=True),
        _event("aten::conv2d", 5000.0, DeviceType.CPU),
    ]
    found = kernel_parts.summed(events, steps=2)
    assert found == {"convolutions": pytest.approx(3e-4), "norms": pytest.approx(1e-4)}
    assert list(found) == ["convolutions", "norms"]


def test_amdahl() -> None:
    parts = {"convolutions": 0.6, "norms": 0.4}
    assert kernel_parts.amdahl(parts, 0.0) == pytest.approx(2.5)
    assert kernel_parts.amdahl(parts, 0.5) == pytest.approx(1 / 0.7)
    assert kernel_parts.amdahl(parts, 1.0) == pytest.approx(1.0)
    assert kernel_parts.amdahl({}, 0.1) is None


def test_aligned_width_has_channels_of_eights_and_near_macs() -> None:
    net = nets.NETS["wrn-28-10"]
    width = nets.aligned_width(net, 0.1 * nets.macs_at(net.model, 1.0, num_classes=10, in_shape=net.in_shape))
    assert width * net.channels % 8 == pytest.approx(0) and width == pytest.approx(0.3)
    wide = nets.NETS["vgg16-wide"]
    full = nets.macs_at(wide.model, wide.width, num_classes=10, in_shape=wide.in_shape)
    assert nets.aligned_width(wide, full) == pytest.approx(wide.width)


def test_a_net_is_measured_beside_dense_and_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)
    torch.set_num_threads(1)
    out = nets.RowFile(tmp_path / "net.json", "gpu-toy")
    bench = nets.Bench("toy", "eager", "cpu", out, Effort(1, 0.0))
    assert list(nets.measured(bench, deadline=float("inf"))) == []
    rows = load([tmp_path / "net.json"]).nets
    assert [(row.contender, row.pass_) for row in rows] == [
        *(("dense", "step"), ("sparse", "step"), ("dense", "forward"), ("sparse", "forward")),
        *(("narrow", "step"), ("narrow", "forward")),
    ]
    dense, sparse, narrow = (next(r for r in rows if r.contender == who) for who in ("dense", "sparse", "narrow"))
    assert sparse.macs < dense.macs and narrow.macs == pytest.approx(sparse.macs, rel=0.05)
    assert sparse.params < 0.2 * dense.params and sparse.layers["sparse"] >= 6
    assert dense.ideal is None and sparse.ideal is not None and sparse.ideal >= 1
    assert set(sparse.optimizers) == {"fused", "foreach"} and sparse.parts["convolutions"] > 0


def test_a_contender_that_fails_or_comes_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = nets.RowFile(tmp_path / "net.json", "gpu-toy")
    bench = types.SimpleNamespace(name="toy", mode="eager", device="cpu", out=out)

    def measure(contender: nets.Contender) -> None:
        raise RuntimeError("no kernel image")

    bench.measure = measure
    assert len(list(nets.measured(bench, deadline=float("inf")))) == 2  # type: ignore[arg-type]
    assert "no kernel image" in load([tmp_path / "net.json"]).missing[0].reason
    assert list(nets.measured(bench, deadline=0.0)) == []  # type: ignore[arg-type]
    assert {row.reason for row in load([tmp_path / "net.json"]).missing[2:]} == {"no time was left"}


# -- overheads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", overheads.TINY)
def test_recorded_launches_make_the_same_result(case: overheads.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    backend = get("triton")
    problem = overheads.problem_of(case, "cpu")
    refused = backend.unsupported(OpDesc(problem.op, "cpu", torch.bfloat16, (16, 16)))
    monkeypatch.setenv("SPARSEKERN_BACKEND", "dense" if refused else "triton")
    with adapters.recorded() as launches:
        want = problem.calls("forward").sparse()
    name, again = launches[0]
    assert len(launches) == 1 and name.endswith(f"{problem.op}.forward")
    assert torch.equal(again(), want)  # type: ignore[arg-type]
    tile = adapters.kernel_of(again)
    assert tile is None if refused else tile["bm"] >= 16
    assert [n.rpartition(".")[2] for n, _ in _recorded(problem.step().sparse)] == ["forward", "dgrad", "wgrad"]
    assert not launches[1:], "recording ends with its context"


def _recorded(call: Any) -> list[Any]:
    with adapters.recorded() as launches:
        call()
    return launches


def test_a_topology_update_moves_values_along() -> None:
    problem = overheads.problem_of(overheads.TINY[1], "cpu")
    update = overheads.Update(problem)
    before = problem.layout.to_dense(problem.values)
    update()
    assert torch.equal(update.layout.block_mask(), update.masks[1])
    both = update.layout.mask() & problem.layout.mask()
    assert bool(both.any()) and torch.equal(update.layout.to_dense(update.values), before * both)
    update()
    assert torch.equal(update.layout.block_mask(), problem.layout.block_mask())
    assert torch.equal(update.layout.to_dense(update.values), before * both)


@pytest.mark.parametrize("case", overheads.TINY)
def test_the_kernels_chosen_are_told(case: overheads.Case) -> None:
    """Asked for as the backend asks: no error, one entry per pass."""
    pytest.importorskip("triton")
    told = adapters.choices(overheads.problem_of(case, "cpu"), "step", False)
    assert set(told) == {"forward", "dgrad", "wgrad"}
    assert all(entry["kernel"]["bm"] >= 16 and entry["seconds"] > 0 for entry in told.values())


# -- training on real data ---------------------------------------------------------------------------------------------


def test_epochs_fit_the_budget() -> None:
    assert accuracy.epochs_within(220.0, 0.02, 391) == int(0.85 * 220 / 7.82)
    assert accuracy.epochs_within(1e6, 0.02, 391) == accuracy.MOST_EPOCHS
    assert accuracy.epochs_within(1.0, 1.0, 391) == 0


def test_both_nets_differ_in_sparsity_alone() -> None:
    dense, sparse = (accuracy.config(who, "wrn-16-8", 12, "somewhere", "cpu") for who in accuracy.CONTENDERS)
    assert dense.differences(sparse) == ["sparsity"]
    assert (sparse.data, sparse.sparsity, sparse.block, sparse.amp, sparse.channels_last) == (
        "cifar10",
        0.9,
        "32",
        True,
        True,
    )


def test_data_carried_in_parts_is_joined(tmp_path: Path) -> None:
    for part, name in (("a", "data_batch_1.bin"), ("b", "test_batch.bin")):
        (tmp_path / part).mkdir()
        (tmp_path / part / name).write_text(part)
    folder = Path(accuracy.joined(f"{tmp_path / 'a'},{tmp_path / 'b'}", tmp_path / "both"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "data_batch_1.bin": "a",
        "test_batch.bin": "b",
    }
    assert accuracy.joined(str(tmp_path / "a"), tmp_path / "x") == str(tmp_path / "a")
    with pytest.raises(SystemExit, match="nowhere is none"):
        accuracy.joined("nowhere", tmp_path / "x")


def test_trained_nets_share_a_plan_and_are_not_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)
    first = accuracy.run("sparse", tmp_path, None, "cpu", 1.0)
    assert json.loads((tmp_path / "plan.json").read_text())["epochs"] == 1
    again = accuracy.run("sparse", tmp_path, None, "cpu", 1.0)
    assert again.seconds == first.seconds and first.layers["sparse"] > 0
    row = accuracy.row_of("sparse", first, "cpu")
    assert (row["block"], row["sparsity"]) == (16, 90) and 0 <= row["test_acc"] <= 1
