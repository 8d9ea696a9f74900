"""What the ranks of test_collectives.py run."""

from __future__ import annotations

import dataclasses
import math
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.errors import FatalFault, NoShards
from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.config.training import DistributedConfig
from trainer.distributed import collectives
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv, meet
from trainer.exit_codes import StopRequest
from trainer.telling import layer_norms


def once(env: DistributedEnv, marker: str, fails: str) -> list[str]:
    """What `from_main_rank` gives on this rank, and how often anybody made it."""

    def make() -> str:
        with Path(marker).open("a") as file:
            file.write(f"{env.rank}\n")
        if fails == "mistake":
            raise NoShards("nothing there")
        if fails == "bug":
            raise KeyError("no such key")
        return "made"

    try:
        found = collectives.from_main_rank(make)
    except (NoShards, FatalFault) as error:
        found = f"{type(error).__name__}: {error}"
    collectives.barrier()
    return [found, Path(marker).read_text()]


def long_work(env: DistributedEnv, fails: bool) -> list[object]:
    """Work of rank 0 that takes twice as long as a collective may, and what this rank hears of it."""
    timeout_s, words = 6.0, 26
    collectives.barrier()
    # Only now: on a busy machine the ranks do not meet that quickly.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
    heard: list[tuple[str, int, int]] = []

    def work(tell: collectives.Told) -> str:
        for done in range(words):
            tell("indexing", done, words)
            time.sleep(2 * timeout_s / words)
        if fails:
            raise NoShards("nothing there")
        return "made"

    try:
        found = collectives.worked_on_main_rank(work, lambda *said: heard.append(said))
    except NoShards as error:
        found = f"NoShards: {error}"
    ascending = heard == sorted(set(heard)) and {(said[0], said[2]) for said in heard} == {
        ("indexing", words)
    }
    return [found, len(heard) >= 5, ascending, collectives.all_gather_object(env.rank)]


def cut_unevenly(env: DistributedEnv) -> list[object]:
    """FSDP on a node of two ranks and one of a single rank: how this rank has cut, and a step's norm."""
    second = env.rank == 2
    place = {"local_rank": 0 if second else env.rank, "local_world_size": 1 if second else 2}
    env = meet(dataclasses.replace(env, **place))
    config = Config(
        global_batch_size=3,
        micro_batch_size=1,
        distributed=DistributedConfig(engine="fsdp", precision="fp32"),
    )
    torch.manual_seed(0)
    engine = build_engine(nn.Linear(5, 7), config, env)
    engine.backward(engine(torch.ones(1, 5)).square().mean())
    norm = engine.step(1e-2)
    assert norm is not None
    held = sum(fragment.master.numel() for fragment in engine.fragments())
    return [env.num_nodes, round(float(norm), 5), int(collectives.reduce_sum(torch.tensor(held)))]


def agree(env: DistributedEnv) -> list[list[object]]:
    """What the ranks agree on in four steps, in which they hand in different things."""
    first = env.is_main
    steps = [
        collectives.agree(StopRequest.NONE, data_lost=False, save_failed=False, losses=[]),
        collectives.agree(
            StopRequest.NONE, data_lost=first, save_failed=False, losses=[1.0 if first else 2.0]
        ),
        collectives.agree(
            StopRequest.PREEMPTED if first else StopRequest.STOPPED,
            data_lost=False,
            save_failed=not first,
            losses=[0.25, math.nan if first else 1.0, math.inf],
        ),
        collectives.agree(StopRequest.PREEMPTED, data_lost=True, save_failed=True, losses=[0.1 + env.rank]),
    ]
    return [
        [step.request.name, step.data_lost, step.save_failed, [repr(loss) for loss in step.losses]]
        for step in steps
    ]


def gather(env: DistributedEnv) -> list[object]:
    """Values of other lengths on every rank, and a flag that only the last one sets."""
    values = collectives.all_gather_object({"rank": env.rank, "more": "x" * 1000 * env.rank})
    last = env.rank == env.world_size - 1
    agreed = collectives.agree(StopRequest.NONE, data_lost=last, save_failed=False, losses=[0.1 * env.rank])
    return [
        [value["rank"] for value in values],
        [len(value["more"]) for value in values],
        [collectives.any_rank(last), collectives.any_rank(False), agreed.data_lost],
        repr(agreed.losses[0]),
    ]


def norms(env: DistributedEnv, engine: str) -> dict[str, float]:
    """Norms by layer after two steps of a small network, and the same from whole tensors."""
    torch.manual_seed(0)
    network = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), "head": nn.Linear(3, 2)}
    )
    network.forward = lambda x: network["head"](network["body"](x))  # type: ignore[method-assign]
    stage = 0 if engine == "torch" else 1
    config = load_config(
        None,
        [
            *("global_batch_size=4", f"micro_batch_size={4 // env.world_size}"),
            *(
                f"distributed.engine={engine}",
                f"distributed.zero_stage={stage}",
                "distributed.precision=fp32",
            ),
        ],
    )
    built = build_engine(network, config, env)
    for _ in range(2):
        built.backward(built(torch.ones(2, 5)).square().mean())
        built.step(1e-2)
    found = layer_norms({"network": built})
    with built.gathered() as whole:
        for name, module in (
            ("body.0", whole["body"][0]),
            ("body.1", whole["body"][1]),
            ("head", whole["head"]),
        ):
            squares = sum(float(p.detach().double().square().sum()) for p in module.parameters())
            found[f"whole {name}"] = math.sqrt(squares)
    return found
