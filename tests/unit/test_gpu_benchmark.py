"""benchmarks/gpu.py: kinds of kernels, figures of a run, the table; and its dry run on the CPU (slow)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.metrics.step_profile import kind_of

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ("startup_compiled",)  # minutes of C++ on two cores


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, float>", "layout conversion"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128", "convolution"),
        ("sm90_xmma_wgrad_implicit_gemm_indexed_wo_smem_bf16", "convolution"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128", "attention"),
        ("nvjet_hsh_192x192_64x4_1x2_h_bz_coopB_NTN", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matmul"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::BFloat16>", "group norm"),
        ("_forward_sums", "group norm"),
        ("_backward_apply", "group norm"),
        ("_layer_norm_forward", "layer norm and GEGLU"),
        (
            "void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
            "layer norm and GEGLU",
        ),
        ("triton_poi_fused_add_gelu_mul_3", "compiled"),
        ("void at::native::CatArrayBatchedCopy_vectorized<...>", "copies and concatenation"),
        ("Memcpy DtoD (Device -> Device)", "copies and concatenation"),
        ("at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "adds"),
        ("_add", "adds"),
        (
            "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, sum_functor>>",
            "reductions",
        ),
        ("_column_sums", "reductions"),
        ("at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "activations"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("_draw", "random"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void at::native::elementwise_kernel<128, 2, BinaryFunctor<MulFunctor>>", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_run_is_judged_by_its_steady_intervals() -> None:
    records: list[dict[str, Any]] = [
        {"step": 4, "time": 140.0, "loss": 1.0, "memory_gib": 30.0, "checkpoint/blocked_s": 0.2},
        *(
            {
                "step": 4 * i,
                "time": 140.0 + 10 * i,
                "loss": 1.0,
                "memory_gib": 40.0,
                "step_s": step_s,
                "images_per_s": 64 / step_s,
                "time/unet_s": step_s / 2,
                "data_wait": 0.01,
                "checkpoint/blocked_s": 9.0,
            }
            for i, step_s in ((2, 50.0), (3, 2.0), (4, 4.0), (5, 3.0))
        ),
    ]
    figures = import_module("gpu_sections.training").figures(records, 4, started=100.0)
    assert figures["step_s"] == 3.0
    assert figures["images_per_s"] == pytest.approx(64 / 3)
    assert figures["time/unet_s"] == 1.5
    assert figures["first_step_s"] == pytest.approx(40 - 3 * 3.0)
    assert figures["first_save_blocked_s"] == 0.2
    assert figures["memory_gib"] == 40.0
    # The checkpoint was on disk before step 12 ended: only the last two intervals are undisturbed.
    figures = import_module("gpu_sections.training").figures(records, 4, started=100.0, saved_at=165.0)
    assert figures["rates_after_the_save"] == [64 / 4.0, 64 / 3.0]
    assert figures["step_s"] == 3.5
    assert figures["saved_s"] == 65.0


def test_the_table_shows_what_is_there_and_a_dash_for_the_rest() -> None:
    report = import_module("gpu_sections.report")
    results = {
        "about": {"card": "card", "torch": "2.11", "driver": "580", "commit": "abc"},
        "sections": {"unet": {"status": "killed at its time limit", "seconds": 60.0}},
    }
    figures = {"unet": {"batch_32": {"images_per_s": 210.0}}, "text": {"both": {"ms": 9.0}}}
    table = report.table(figures, results)
    assert [name for name, value in table["rows"].items() if value is not None] == [
        "UNet fwd+bwd 512 px batch 32, img/s",
        "text and random numbers of 32, ms",
    ]
    rows = {line[:42].strip(): line[42:].split() for line in table["lines"]}
    assert rows["UNet fwd+bwd 512 px batch 32, img/s"] == ["113", ">=", "200", "210", "met"]
    assert rows["text and random numbers of 32, ms"] == ["55", "<=", "6", "9"]
    assert rows["train 512 px, img/s"] == ["57", ">=", "140", "-"]


def test_sections_keep_their_order_and_variants_change_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = import_module("gpu")
    assert gpu.chosen("sampling,unet,kernels", []) == ["prepare", "unet", "sampling", "step"]
    variants = ["tuned:distributed.cudnn_benchmark=true,distributed.compile=true", "plain:ema.decay=0"]
    found = gpu.chosen("memory,startup", variants)
    assert found == ["prepare", "train512", "train512@tuned", "train512@plain", "startup"]
    options = ["--out", "x", "--train-override", "seed=1", "--variant", variants[0], "--variant", variants[1]]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    args = gpu.parse_arguments()
    assert gpu.overrides_of("train512", args) == ["seed=1"]
    tuned = ["seed=1", "distributed.cudnn_benchmark=true", "distributed.compile=true"]
    assert gpu.overrides_of("train512@tuned", args) == tuned


def test_the_budget_reaches_every_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, report = import_module("gpu"), import_module("gpu_sections.report")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "x"])

    class Asked(dict[str, Any]):
        def __missing__(self, name: str) -> None:
            needed.add(name)
            raise KeyError(name)

    needed: set[str] = set()
    assert all(report._read(row, Asked()) is None for row in report.ROWS)
    order = list(gpu.SECTIONS)
    last = max(order.index(name) for name in needed)
    before = sum(gpu.SECTIONS[name].expected_s for name in order[: last + 1])
    assert before <= gpu.parse_arguments().budget_s <= 9 * 60


def test_operations_are_counted_as_the_recipe_has_them(tmp_path: Path) -> None:
    recipe, networks = (import_module(f"gpu_sections.{name}") for name in ("recipe", "networks"))
    setup = recipe.Setup(tmp_path, tmp_path / "unet.json", small=False, train_steps=1)
    # Counted before by hand for the SD2 UNet at 512 px: 2.409 TFLOP forward and backward.
    assert networks.flops_per_sample(setup.config()) == pytest.approx(2.4087e12, rel=1e-3)


def test_a_section_leaves_its_figures_and_kernels(tmp_path: Path) -> None:
    recipe, networks = (import_module(f"gpu_sections.{name}") for name in ("recipe", "networks"))
    setup = recipe.Setup(tmp_path, tmp_path / "vae.json", small=True, train_steps=1)
    networks.vae(setup)
    figures = json.loads(setup.result.read_text())
    assert figures["batch_16"]["images_per_s"] > 0
    assert figures["kernels"]["kinds"]["convolution"]["ms"] > 0


def test_layouts_are_measured_side_by_side(tmp_path: Path) -> None:
    recipe, layout = (import_module(f"gpu_sections.{name}") for name in ("recipe", "layout"))
    setup = recipe.Setup(tmp_path, tmp_path / "layout.json", small=True, train_steps=1)
    for section in (layout.kernels, layout.pixels, layout.save):
        section(setup)
    figures = json.loads(setup.result.read_text())
    assert figures["batch_16"]["kept"]["images_per_s"] > 0
    assert figures["batch_32"].keys() == {"flat", "kept"}
    assert figures["gradients"].keys() == {"flat", "kept"}
    assert figures["error_channels_8"] < 1e-5
    assert figures["buffer"]["gb_per_s"] > 0
    lines = import_module("gpu_sections.report")._side_by_side({"kernel_layout": figures})
    assert any(line.startswith("kernel_layout, ms: batch_16: flat ") for line in lines), lines


def test_no_network_is_measured_against_another_one(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    recipe, references = (import_module(f"gpu_sections.{name}") for name in ("recipe", "references"))
    setup = recipe.Setup(tmp_path, tmp_path / "x.json", small=True, train_steps=1)
    config = setup.config()
    ours = recipe.random_network(config, setup.device, setup.dtype)
    theirs = references.stock_unet(ours, config, setup)
    inputs = recipe.network_inputs(config, 3, setup.device, setup.dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs), theirs(**inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # sixteen processes that import torch: three minutes on a quiet machine
def test_the_dry_run_fills_every_row(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    gpu = import_module("gpu")
    sections = ",".join(name for name in gpu.SECTIONS if name not in COMPILED)
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--out", str(tmp_path), "--sections", sections]
    done = subprocess.run([*command, "--train-steps", "10"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {section["status"] for section in results["sections"].values()} == {"done"}
    assert "convolution" in (tmp_path / "kernels.txt").read_text()
    rows = results["table"]["rows"]
    missing = [name for name, value in rows.items() if value is None or not math.isfinite(value)]
    assert missing == [
        "ours by CUDA graphs, batch 16, x",
        "the same, CUDA graphs at batch 2",
        "the same, CUDA graphs, x",
        "compiled, cold caches, s",
        "compiled, warm caches, s",
    ]
