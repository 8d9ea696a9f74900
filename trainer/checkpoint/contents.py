"""What of a run goes into a checkpoint, in which order, and how it comes back into engines and averages."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.layout import FROZEN, MASTER, WHOLE, ShardPlan, Span
from trainer.checkpoint.reader import EngineReader
from trainer.config.io import config_to_dict
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.adafactor import means_elements
from trainer.distributed.engine import Engine, Fragment
from trainer.ema import DECAY_PROFILE, EMA, profile_names

logger = logging.getLogger(__name__)

_PADDING = 1024
"""Elements; DeepSpeed rounds a rank's partition up to a few."""


class Stored(Protocol):
    """What a checkpoint needs of an engine; frozen weights have it, too."""

    parameter_shapes: dict[str, tuple[int, ...]]

    def fragments(self) -> list[Fragment]:
        """What this rank owns."""
        ...

    @property
    def moments(self) -> tuple[str, ...]:
        """What fragments have beside the master weights."""
        ...

    @property
    def whole_state(self) -> Mapping[str, Tensor]:
        """Optimizer state that every rank has."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Steps made."""
        ...


@dataclass(frozen=True)
class Contents:
    """One checkpoint, or one snapshot, about to be taken."""

    step: int
    engines: Mapping[str, Stored]
    ema: EMA
    kinds: dict[str, tuple[str, ...]]
    """By engine: which of its vectors are stored, in file order."""
    state: dict[str, Any]
    """JSON-able; the same on every rank."""
    tensors: dict[str, Tensor]
    """Small ones beside the weights; rank 0's count."""
    loss: float | None
    """Recent training loss; rank 0's counts."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What was measured on held-out samples at this step; `checkpoint.keep_best` may go by one of them."""

    @staticmethod
    def of_checkpoint(
        step: int,
        engines: Mapping[str, Stored],
        ema: EMA,
        *,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
        loss: float | None,
        metrics: dict[str, float] | None = None,
    ) -> Contents:
        """Everything that a run needs to go on."""
        averages = tuple(f"ema.{profile}" for profile in ema.profiles)
        whole = {f"{n}.{WHOLE}": WholeState(e.whole_state) for n, e in engines.items() if e.whole_state}
        stored = {**engines, **whole}
        kinds = {
            name: (MASTER, *engine.moments, *(averages if engine.fragments() is ema.fragments else ()))
            for name, engine in stored.items()
        }
        return Contents(step, stored, ema, kinds, state, tensors, loss, metrics or {})

    @staticmethod
    def of_snapshot(
        step: int, engines: Mapping[str, Stored], ema: EMA, tensors: dict[str, Tensor]
    ) -> Contents:
        """The power-function averages, from which `ldm ema` makes others, and what is frozen beside them."""
        profiles = tuple(f"ema.{profile}" for profile in ema.profiles if profile != DECAY_PROFILE)
        averaged = {name: engine for name, engine in engines.items() if engine.fragments() is ema.fragments}
        kinds = dict.fromkeys(averaged, profiles)
        if FROZEN in engines:
            averaged, kinds = averaged | {FROZEN: engines[FROZEN]}, kinds | {FROZEN: (MASTER,)}
        return Contents(step, averaged, ema, kinds, {}, tensors, None)

    def plan(self) -> ShardPlan:
        """Layout of this rank's shard."""
        tables = {name: tuple(spans_of(engine.fragments())) for name, engine in self.engines.items()}
        return ShardPlan(tables, self.kinds)

    def vectors(self, plan: ShardPlan) -> list[Tensor]:
        """The fp32 vectors of this rank's shard in file order; views, not copies."""
        vectors: list[Tensor] = []
        for name, kind, _ in plan.tensors():
            fragments = self.engines[name].fragments()
            if kind == MASTER:
                vectors += [fragment.master for fragment in fragments]
            elif kind in self.engines[name].moments:
                vectors += [fragment.moments[kind] for fragment in fragments]
            else:
                vectors += self.ema.values(kind.removeprefix("ema."))
        return vectors

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Whole shape of every parameter, by engine."""
        return {name: engine.parameter_shapes for name, engine in self.engines.items()}

    def state_file(self, config: Config, world_size: int) -> bytes:
        """JSON beside the shards: progress, configuration, versions."""
        everything = {
            "step": self.step,
            "world_size": world_size,
            "averaged": next(n for n, e in self.engines.items() if e.fragments() is self.ema.fragments),
            "optimizer_steps": {name: engine.optimizer_steps for name, engine in self.engines.items()},
            "config": config_to_dict(config),
            "versions": {"torch": torch.__version__},
            "state": self.state,
        }
        return json.dumps(everything).encode()

    def tensors_file(self) -> bytes:
        """safetensors beside the shards."""
        return safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in self.tensors.items()})


class WholeState:
    """What every rank has whole of an optimizer, as one more engine; rank 0 stores it."""

    optimizer_steps = 0
    moments: tuple[str, ...] = ()
    whole_state: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.parameter_shapes = {name: tuple(value.shape) for name, value in state.items()}
        owned = state if collectives.rank() == 0 else {}
        self._fragments = [
            Fragment(name, tuple(value.shape), 0, value.view(-1), {}) for name, value in owned.items()
        ]

    def fragments(self) -> list[Fragment]:
        """As of an engine, without moments."""
        return self._fragments

    def load(self, reader: EngineReader) -> None:
        """Read it on rank 0, and give it to all. Collective."""
        reader.read_into(MASTER, spans_of(self._fragments), [f.master for f in self._fragments])
        if collectives.world_size() > 1:
            values = list(self._state.values())
            packed = torch.cat(values)
            dist.broadcast(packed, 0)
            torch._foreach_copy_(values, list(packed.split([len(value) for value in values])))


def share_bytes(networks: Mapping[str, nn.Module], averaged: str, config: Config, world_size: int) -> int:
    """What a rank's shard of a checkpoint will take at most, known before there are engines.

    Engines divide either all elements or each parameter's, and pad both.
    """
    total = 0
    for name, network in networks.items():
        total += sum(-(-p.numel() // world_size) for p in network.parameters() if not p.requires_grad)
        trained = [p for p in network.parameters() if p.requires_grad]
        each = [-(-p.numel() // world_size) for p in trained]
        kinds = (
            1 + len(config.optimizer.moments) + (len(profile_names(config.ema)) if name == averaged else 0)
        )
        total += kinds * (sum(each) + _PADDING)
        if config.optimizer.name == "adafactor":
            total += means_elements(tuple(p.shape) for p in trained)
    return 4 * total


def spans_of(fragments: list[Fragment]) -> list[Span]:
    """The fragments as a table has them."""
    return [Span(fragment.name, fragment.start, fragment.master.numel()) for fragment in fragments]


def load_engine(reader: EngineReader, engine: Engine, optimizer_steps: int) -> None:
    """Masters and moments into what this rank owns now; `Engine.refresh` is still to be called."""
    fragments = engine.fragments()
    spans = spans_of(fragments)
    reader.read_into(MASTER, spans, [fragment.master for fragment in fragments])
    for key in engine.moments:
        reader.read_into(key, spans, [fragment.moments[key] for fragment in fragments])
    engine.optimizer_steps = optimizer_steps


@torch.no_grad()
def load_averages(reader: EngineReader, stored: tuple[str, ...], ema: EMA) -> None:
    """The averages that this run keeps, of the `stored` kinds; after `load_engine`."""
    spans = spans_of(list(ema.fragments))
    for profile in ema.profiles:
        kind, values = f"ema.{profile}", ema.values(profile)
        if kind in stored:
            reader.read_into(kind, spans, values)
            continue
        logger.warning("no average %r is stored: it starts from the trained weights", profile)
        for value, fragment in zip(values, ema.fragments, strict=True):
            value.copy_(fragment.master)
