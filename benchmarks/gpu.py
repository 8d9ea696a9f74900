"""Every figure of one GPU's step, each beside its goal, in at most nine minutes on a bare machine.

    python benchmarks/gpu.py --out figures                        # everything, most important first
    python benchmarks/gpu.py --out figures --sections unet,vae,text
    python benchmarks/gpu.py --out figures --sections train512 --train-override distributed.compile=true
    python benchmarks/gpu.py --out figures --variant tuned:distributed.cudnn_benchmark=true
    python benchmarks/gpu.py --out figures --sections train512,kernel_layout,pixel_layout,save_copy \
        --variant flat:distributed.channels_last_kernels=false  # the layout of kernels, before and after
    python benchmarks/gpu.py --out figures --small                # tiny networks on a CPU: the dry run

Needs torch 2.11 or newer and no network, Ray, W&B or weights: it draws its own JPEG shards and random weights
of the real structure (SD2's UNet, KL f8, ViT-H text tower). Each section is a process of its own with a time
limit; one that fails or hangs does not stop the rest, and one that would outlast `--budget-s` is left out and
named. `figures/gpu.json` and `table.txt` are rewritten after every section, `kernels.txt` holds
device time by kind of kernel, `logs.txt` what the sections printed.

On a machine that has torch and torchvision but not the rest, carry wheels of what constraints.txt names:
aiobotocore aioitertools annotated-types botocore braceexpand deepspeed (DS_BUILD_OPS=0 pip wheel --no-deps)
diffusers einops fsspec ftfy hjson importlib_metadata jmespath lazy-importer lpips open_clip_torch pydantic
pydantic_core s3fs simplejpeg typing_extensions typing-inspection wcwidth webdataset

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site wheels/*.whl
    PYTHONPATH=/tmp/site:. python3 benchmarks/gpu.py --out figures
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_sections.processes import ROOT, environment, kill_family
from gpu_sections.report import kernel_tables, table

HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Section:
    """One process: `module:function` of gpu_sections, and its time on an H100."""

    code: str
    limit_s: float
    expected_s: float
    """Left out when the budget has less than this left."""


SECTIONS = {
    "prepare": Section("prepare:prepare", 90, 15),
    "train512": Section("training:train_512", 130, 40),
    "unet": Section("networks:unet", 75, 25),
    "vae": Section("networks:vae", 45, 15),
    "text": Section("networks:text", 45, 15),
    "unet_compile": Section("networks:unet_compiled", 120, 40),
    "unet_graphs": Section("networks:unet_graphs", 60, 20),
    "diffusers": Section("references:eager", 60, 20),
    "startup": Section("training:startup", 150, 65),
    "train256": Section("training:train_256", 120, 40),
    "sampling": Section("references:sampling", 60, 20),
    "diffusers_compile": Section("references:compiled", 200, 60),
    "startup_compiled": Section("training:startup_compiled", 200, 80),
    "step": Section("step:plain", 100, 40),
    "kernel_layout": Section("layout:kernels", 100, 40),
    "pixel_layout": Section("layout:pixels", 30, 10),
    "save_copy": Section("layout:save", 30, 12),
    "encoder": Section("references:encoder", 45, 15),
    "step_compile": Section("step:compiled", 150, 50),
    "step_graphs": Section("step:graphs", 100, 40),
    "machine": Section("networks:machine", 30, 8),
}
"""In the order in which they run: those with rows of the table first, so that the budget reaches them all."""
BEFORE_VARIANTS = ("prepare", "train512", "unet", "vae", "text", "unet_compile", "unet_graphs")
ALSO_NAMED = {
    "batch2": "unet",
    "save": "train512",
    "memory": "train512",
    "kernels": "step",
    "compile": "step_compile",
    "graphs": "step_graphs",
}


def main() -> int:
    """Run the chosen sections; 1 when one of them failed."""
    args = parse_arguments()
    if args.run_section:
        return run_here(args)
    begun = time.monotonic()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "logs.txt").write_text("")
    work = Path(args.work or tempfile.mkdtemp(prefix="ldm-gpu-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"about": about(args), "sections": {}}
    try:
        for name in chosen(args.sections, args.variant):
            left = args.budget_s - (time.monotonic() - begun)
            results["sections"][name] = run_section(name, args, work, out, left)
            write(out, results)
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    results["about"]["seconds"] = time.monotonic() - begun
    write(out, results)
    print((out / "table.txt").read_text())
    failed = [name for name, r in results["sections"].items() if r["status"] not in ("done", "left out")]
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for gpu.json, table.txt, kernels.txt, logs.txt")
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="names, comma-separated (default: all)"
    )
    parser.add_argument("--budget-s", type=float, default=520.0, help="seconds in all")
    parser.add_argument("--small", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--train-steps", type=int, default=20, help="optimizer steps of a training run")
    parser.add_argument(
        "--train-override", action="append", default=[], metavar="a.b=c", help="of the recipe; repeatable"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:a.b=c,d.e=f",
        help="train512 once more under these settings too, as train512@NAME; repeatable",
    )
    parser.add_argument("--work", help="folder of shards and weights, kept and used again")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--run-section", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(names: str, variants: list[str]) -> list[str]:
    """Sections in their order, `prepare` always first, variants of training behind the networks alone.

    Raises:
        SystemExit: no such section.
    """
    wanted = {ALSO_NAMED.get(name, name) for name in names.split(",")}
    if unknown := wanted - SECTIONS.keys():
        raise SystemExit(f"no section {', '.join(unknown)}; there are {', '.join([*SECTIONS, *ALSO_NAMED])}.")
    found = [name for name in SECTIONS if name in wanted or name == "prepare"]
    place = sum(name in found for name in BEFORE_VARIANTS)
    return [*found[:place], *(f"train512@{v.partition(':')[0]}" for v in variants), *found[place:]]


def overrides_of(name: str, args: argparse.Namespace) -> list[str]:
    """What a section changes in the recipe: `--train-override`, and for a variant its own settings."""
    settings = {v.partition(":")[0]: v.partition(":")[2].split(",") for v in args.variant}
    variant = name.partition("@")[2]
    return [*args.train_override, *(settings[variant] if variant else [])]


def run_here(args: argparse.Namespace) -> int:
    """One section, in this process."""
    from gpu_sections.recipe import Setup

    name = args.run_section
    module, function = SECTIONS[name.partition("@")[0]].code.split(":")
    if args.small:  # a C++ compiler needs minutes for what a GPU's compiler does in seconds
        import torch

        torch.compiler.set_stance("force_eager")
    setup = Setup(
        Path(args.work), Path(args.result), args.small, args.train_steps, tuple(overrides_of(name, args))
    )
    getattr(importlib.import_module(f"gpu_sections.{module}"), function)(setup)
    return 0


def run_section(name: str, args: argparse.Namespace, work: Path, out: Path, left: float) -> dict[str, Any]:
    """One section in a process of its own; what it reported before it failed or was killed is kept."""
    section = SECTIONS[name.partition("@")[0]]
    if left < section.expected_s and not args.small:
        print(f"{name}: left out, {left:.0f} s of the budget are left", flush=True)
        return {"status": "left out", "why": f"{left:.0f} s of the budget were left"}
    if name == "prepare" and (work / "prepared").exists():
        return {"status": "done", "seconds": 0.0, "figures": {}}
    result, log_file = work / f"{name}.json", work / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE), *sys.argv[1:], "--run-section", name]
    command += ["--work", str(work), "--result", str(result)]
    begun = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        try:
            code = process.wait(timeout=None if args.small else max(1.0, min(section.limit_s, left)))
            status = "done" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            status = "killed at its time limit"
        finally:
            kill_family(process.pid)
            process.wait()
    seconds = time.monotonic() - begun
    print(f"{name}: {status}, {seconds:.1f} s", flush=True)
    if name == "prepare" and status == "done":
        (work / "prepared").touch()
    figures = json.loads(result.read_text()) if result.exists() else {}
    answer: dict[str, Any] = {"status": status, "seconds": seconds, "figures": figures, "clocks": clocks()}
    trained = log_file.with_suffix(".train.log")
    words = "".join(path.read_text(errors="replace") for path in (trained, log_file) if path.exists())
    with (out / "logs.txt").open("a", encoding="utf-8") as logs:
        logs.write(f"== {name}: {status}, {seconds:.1f} s\n{words[-100_000:]}\n")
    if status != "done":
        answer["log"] = words[-2000:]
        print("\n".join("    " + line for line in answer["log"].splitlines()[-12:]), flush=True)
    return answer


def write(out: Path, results: dict[str, Any]) -> None:
    """All files anew, so that a killed run keeps what it has."""
    figures = {name: r.get("figures", {}) for name, r in results["sections"].items()}
    results["table"] = table(figures, results)
    for path, text in (
        (out / "gpu.json", json.dumps(results, indent=1, default=str)),
        (out / "table.txt", "\n".join(results["table"]["lines"]) + "\n"),
        (out / "kernels.txt", kernel_tables(figures)),
    ):
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Card, driver, versions and commit."""
    card = smi("name,memory.total") if not args.small else None
    return {
        "card": card or f"CPU, {os.cpu_count()} cores",
        "driver": smi("driver_version"),
        **{name: version(name) for name in ("torch", "triton", "deepspeed", "diffusers")},
        "python": platform.python_version(),
        "commit": args.commit or commit(),
        "arguments": {k: v for k, v in vars(args).items() if v is not None},
        "clocks": clocks(),
    }


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Commit of this checkout, `unknown` outside one."""
    if str(ROOT) not in sys.path:  # as in the sections: this checkout, installed or not
        sys.path.insert(0, str(ROOT))
    from trainer.provenance import git_commit

    return git_commit(ROOT) or "unknown"


def clocks() -> str | None:
    """SM and memory clock, temperature and power now, as the driver tells them."""
    return smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")


def smi(fields: str) -> str | None:
    """What nvidia-smi answers, None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    found = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    return found.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
