"""F-10 to F-15: what is not finite, what has nothing to learn, what does not fit into memory."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from faults import rig
from faults.scenarios import POISONS, QUICK, Rig, capped_memory, failing_allocations, not_finite
from lorica.config import TrainSettings
from lorica.data.encode import CausalEncoder
from lorica.errors import NonFiniteError, OutOfMemory, is_out_of_memory
from lorica.tasks.causal_lm import CausalLM
from lorica.train.course import Course
from lorica.train.memory import levers
from lorica.train.plan import courses_of
from train.runs import model_with, rows, run
from train.words import WordTokenizer, examples, fast_tokenizer


@pytest.mark.parametrize("kind", POISONS)
def test_nothing_that_is_not_finite_is_kept(tmp_path, kind):
    found = not_finite(tmp_path, 2, (kind,))
    assert not found.violations, found.violations
    assert found.figures["runs stopped"] == 2


def test_the_records_are_named_with_file_and_line(own_rig):
    def trap():
        real = CausalLM.losses

        def losses(self, model, batch):
            found = real(self, model, batch)
            return [found[0] * math.nan] if model.training else found

        CausalLM.losses = losses

    folder = own_rig.folder()
    result = rig.finished(own_rig.words(folder), own_rig.output, before=trap)
    assert result.code == 1
    assert "the loss is not finite" in result.words
    assert result.words.count("records.jsonl:") == 4, result.words
    assert not list(folder.rglob("*.safetensors"))
    assert "records.jsonl:" in (folder / "run.json").read_text()


def test_the_error_carries_rows_and_adapter(tmp_path):
    losses = CausalLM.losses

    def poisoned(self, model, batch):
        return [loss * math.inf if model.training else loss for loss in losses(self, model, batch)]

    with mock.patch.object(CausalLM, "losses", poisoned), pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "r")
    assert caught.value.adapter == "a" and len(caught.value.rows) > 0


@pytest.mark.parametrize("over", [-1, 0, 1, 40])
def test_a_prompt_at_the_limit_leaves_something_to_learn(over):
    """F-12: labels are never all masked, whether the prompt fits or not."""
    encoder = CausalEncoder(fast_tokenizer(eos_token="</s>"), max_length=16)
    prompt = " ".join(["w5"] * (16 + over))
    for completion in ("w7", "w7 w8"):
        made = encoder.encode([{"prompt": prompt, "completion": completion}])
        assert len(made[0]) <= 16 and made[0].num_trained >= 1


def test_advice_instead_of_a_trace(tmp_path):
    """F-13: at every 90th operation of a step."""
    found = failing_allocations(tmp_path, every=90)
    assert found.cases > 10
    assert not found.violations, found.violations[:3]


def test_ways_to_say_that_memory_ran_out():
    said = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("alloc_cpu.cpp:117 DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        OSError(12, "Cannot allocate memory"),
    ]
    assert all(map(is_out_of_memory, said))
    assert not any(map(is_out_of_memory, [RuntimeError("shape"), ValueError("out of memory")]))


def test_a_real_allocation_that_fails(tmp_path):
    def greedy(self, model, batch):
        return [torch.empty(1 << 60).sum()]

    with mock.patch.object(CausalLM, "losses", greedy), pytest.raises(OutOfMemory) as caught:
        run(tmp_path / "r")
    told = str(caught.value)
    assert "Traceback" not in told and "batch_size: 3 -> 1 with gradient_acc" in told
    assert "bytes of the machine are free" in told


def test_the_levers_have_numbers():
    model = model_with("a")
    trainee = SimpleNamespace(adapter=SimpleNamespace(parameters=lambda: [torch.zeros(100_000)]))
    course = SimpleNamespace(trainee=trainee, examples=examples(1, 50), held_out=examples(2, 9))
    settings = TrainSettings(max_steps=1, batch_size=9, gradient_accumulation_steps=2)
    found = levers(model, [course], settings, evaluating=False)  # type: ignore[list-item]
    assert found[0].startswith("batch_size: 9 -> 3 with gradient_accumulation_steps: 2 -> 6")
    assert any("nine of ten" in line for line in found)
    assert any("bfloat16" in line for line in found)
    assert any("1,600,000 bytes" in line for line in found)
    judged = levers(model, [course], settings, evaluating=True)  # type: ignore[list-item]
    assert judged[0].startswith("eval_batch_size: 9 -> 4")


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_the_advice_keeps_the_step(tmp_path, parts):
    """F-15: smaller batches, more of them: the same records in each step, the same losses."""
    whole = run(tmp_path / "whole", batch_size=6, gradient_accumulation_steps=1, max_steps=6)
    cut = {"batch_size": 6 // parts, "gradient_accumulation_steps": parts}
    made = run(tmp_path / "cut", **cut, max_steps=6)
    assert isinstance(whole.steps, dict) and whole.steps == made.steps
    model = model_with("a", dropout=0.0)
    task = CausalLM.of(WordTokenizer())
    courses = [_course(model, task, {"batch_size": 6}), _course(model, task, cut)]
    for step in range(8):
        for course in courses:
            course.trainee.step = step
        there = [sorted(e.row for b in c.micro_batches() for e in b) for c in courses]
        assert there[0] == there[1]


def _course(model, task, settings) -> Course:
    made = TrainSettings(max_steps=9, learning_rate=1e-3, **settings)
    return courses_of(model, task, {"a": examples(1, 17)}, None, made)[0][0]


def test_losses_are_the_same_with_smaller_batches(tmp_path):
    changes = {"max_steps": 5, "logging_steps": 1}
    for name, size, number in (("one", 6, 1), ("two", 2, 3)):
        with mock.patch("train.runs.model_with", lambda *n, **how: model_with(*n, dropout=0.0)):
            run(tmp_path / name, batch_size=size, gradient_accumulation_steps=number, **changes)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_a_capped_memory(tmp_path):
    """F-14: no hang, nothing torn, and with memory again it goes on."""
    own = Rig(tmp_path, {**QUICK, "batch_size": 48, "r": 64})
    found = capped_memory(own, [0.05])
    assert not found.violations, found.violations
