"""Whose records go behind what they begin with in common: adapters for which nothing changes by it.

With the beginning of several records in the row once, every layer sees fewer rows. That is the same
sum for whatever works on rows one by one. It is not for what draws a number for each row or knows
where a record begins: dropout, virtual tokens, edits of hidden states, gates. Who shares is decided
for each adapter alone, or training beside others would not equal training alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

from lorica.attach.activate import activate
from lorica.attach.attach import Adapter
from lorica.attach.gates import is_gated
from lorica.attach.site import is_site, plates_of
from lorica.data.encode import Example
from lorica.data.pack import batches
from lorica.tasks.beginnings import Beginning, beginnings
from lorica.tasks.causal_lm import CausalLM
from lorica.tasks.task import Batch, Task
from lorica.train.course import Course
from lorica.train.passes import draws

BATCHES_SEEN = 64
"""Batches of an adapter that are looked at for what is told."""
BLOCKS_KNOWN = 64
"""Blocks of examples of which is remembered what they have in common: those of a pass are asked for
again by what runs below all adapters."""
WORTH_TELLING = 0.01
"""Of the tokens."""


class Beginnings:
    """What the batches of a run share of their prompts.

    Args:
        off: why nobody shares; None where each adapter decides it.
    """

    def __init__(self, model: nn.Module, task: Task, off: str | None = None) -> None:
        self.model, self.task, self.off = model, task, off
        self._faults: WeakKeyDictionary[Adapter, str | None] = WeakKeyDictionary()
        self._known: dict[tuple[int, ...], tuple[Sequence[Example], list[Beginning]]] = {}

    def collate(self, adapters: Sequence[Adapter], blocks: Sequence[Sequence[Example]]) -> Batch:
        """The blocks as one batch, each as its adapter has it."""
        alike = [self.of(*both) for both in zip(adapters, blocks, strict=True)]
        if not any(alike):
            return self.task.collate(blocks, self.model)
        assert isinstance(self.task, CausalLM)
        return self.task.collate(blocks, self.model, alike=alike)

    def of(self, adapter: Adapter, block: Sequence[Example]) -> list[Beginning]:
        """What records of this block go on behind, with this adapter."""
        may = self.off is None and isinstance(self.task, CausalLM)
        if not may or self._faults.get(adapter) is not None:
            return []
        found = self._beginnings(block)
        return found if found and self.fault(adapter) is None else []

    def _beginnings(self, block: Sequence[Example]) -> list[Beginning]:
        key = tuple(map(id, block))
        if key not in self._known:
            if len(self._known) >= BLOCKS_KNOWN:
                self._known.clear()
            self._known[key] = [*block], beginnings(block)  # held: numbers of objects come again
        return self._known[key][1]

    def fault(self, adapter: Adapter) -> str | None:
        """Why no records of an adapter share; None where they may."""
        if adapter not in self._faults:
            self._faults[adapter] = self._found(adapter)
        return self._faults[adapter]

    def _found(self, adapter: Adapter) -> str | None:
        if self.off is not None:
            return self.off
        assert isinstance(self.task, CausalLM)
        if draws(self.model):
            return "the base has dropout"
        if (fault := _fault_of(self.model, adapter)) is not None:
            return fault
        with activate(self.model, None):
            return self.task.begins_once(self.model)

    def notes(self, courses: Sequence[Course]) -> list[str]:
        """What a run is told: how many tokens it saves, or why none."""
        if self.off is not None or not isinstance(self.task, CausalLM):
            return []
        found = []
        for course in courses:
            share = _share(course)
            if share < WORTH_TELLING:
                continue
            who = "" if len(courses) == 1 else f"{course.name}: "
            fault = self.fault(course.trainee.adapter)
            if fault is None:
                found.append(
                    f"{who}prompts that begin alike go through the base once per batch: "
                    f"{share:.0%} fewer tokens"
                )
            else:
                found.append(
                    f"{who}prompts that begin alike go through the base each time ({share:.0%} of "
                    f"the tokens): {fault}"
                )
        return found


def beginnings_of(
    model: nn.Module, task: Task, *, wanted: bool, reuses: bool = False
) -> Beginnings:
    """For a run.

    Args:
        wanted: the setting.
        reuses: whether frozen layers are run once per record, each record as a whole.
    """
    off = (
        "it is off" if not wanted else "frozen layers are kept for each record" if reuses else None
    )
    return Beginnings(model, task, off)


def _fault_of(model: nn.Module, adapter: Adapter) -> str | None:
    stages = {stage.name for stage in adapter.stages}
    for module in model.modules():
        for plates in plates_of(module) if is_site(module) else ():
            for slot in (plates.slots[name] for name in stages & plates.slots.keys()):
                if slot.dropout:
                    return "the adapter has dropout"
                if plates.layer.kind in ("model", "block") or is_gated(slot.method):
                    return f"{slot.method.kind} looks at where records begin"
    return None


def _share(course: Course) -> float:
    """Of the tokens of the first batches of an epoch, those that are not computed again."""
    size, seed = course.settings.batch_size, course.settings.seed
    lengths = list(map(len, course.examples))
    made = batches(lengths, batch_size=size, seed=seed, group=course.group)
    saved = tokens = 0
    for chosen in made[:BATCHES_SEEN]:
        block = [course.examples[i] for i in chosen]
        saved += sum(one.saved for one in beginnings(block))
        tokens += sum(len(example) for example in block)
    return saved / max(1, tokens)
