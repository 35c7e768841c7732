"""A run whose base several processes hold together (`shard_base`): what it can be, and its base."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorica.cli.start import waits_for_records
from lorica.config import Resolved
from lorica.errors import ConfigError


def check_spread(settings: Resolved, size: int) -> None:
    """What can be told before anything is read.

    Args:
        size: how many processes there are.

    Raises:
        ConfigError: a run that processes cannot make together; with all reasons.
    """
    if size == 1:
        raise ConfigError(
            f"{settings.origins['shard_base']}: shard_base spreads the base over processes, and "
            "there is one",
            mend="torchrun --standalone --nproc-per-node N -m lorica train ..., or take it out",
        )
    if problems := [*_problems(settings)]:
        raise ConfigError(
            "this cannot be done on a base that several processes hold together",
            problems=problems,
            mend="take shard_base out, or these",
        )


def refuse_spread(settings: Resolved, why: str) -> None:
    """Raises ConfigError for a command that does not spread a base."""
    if settings.run.shard_base:
        raise ConfigError(
            f"{settings.origins['shard_base']}: shard_base is for lorica train",
            expected=why,
            mend="take it out",
        )


def _problems(settings: Resolved) -> Iterator[str]:
    run, origins = settings.run, settings.origins
    if run.quantize:
        yield f"{origins['quantize']}: quantize: packed weights are not spread"
    if settings.train.reuse_frozen_layers:
        yield f"{origins['reuse_frozen_layers']}: reuse_frozen_layers: it leaves out layers"
    if settings.train.gradient_checkpointing == "offload":
        yield f"{origins['gradient_checkpointing']}: gradient_checkpointing: offload"
    if run.seeds or settings.stages:
        yield "several runs after each other (seeds, stages): train them one by one"
    if run.task not in ("auto", "causal-lm"):
        yield f"{origins['task']}: task {run.task}: causal language models alone are spread"
    for one in (settings, *settings.adapters.values()):
        if one.method is not None and waits_for_records(one):
            yield f"{one.origins['method']}: records decide about its start"


def load_spread(settings: Resolved, kind: str) -> nn.Module:
    """The base of a run, of which this process reads its share.

    Raises:
        BaseModelError: as `load_sharded` does.
        ConfigError: the records are for another task; or no processes have met.
    """
    from lorica.base.processes import here  # these bring all of FSDP
    from lorica.base.sharded import load_sharded

    run, processes = settings.run, here()
    if kind != "causal-lm" or processes is None:
        raise ConfigError(
            f"shard_base: a base for {kind} is not spread over processes"
            if processes is not None
            else "shard_base: lorica train alone spreads a base over processes",
            mend="take shard_base out",
        )
    return load_sharded(
        run.model,
        processes,
        dtype=settings.train.dtype,
        revision=run.revision or "main",
        trust_remote_code=run.trust_remote_code,
        eos_token=run.eos_token,
    )
