"""What prompts of a batch begin with in common lies there once: the same losses and gradients."""

import random
import time

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.data.encode import IGNORED, Example
from lorica.methods.lora import LoRA
from lorica.tasks.beginnings import WORTH, beginnings
from lorica.tasks.causal_lm import CausalLM
from tasks.test_causal_lm import PACKED
from train.words import WordTokenizer

TWO = [1, *(3 + 7 * i % 80 for i in range(40))], [1, *(5 + 11 * i % 80 for i in range(33))]


def example(prompt, answer):
    return Example([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))


def block():
    """Three examples behind one beginning, two behind another, among two of their own."""
    a, b = TWO
    return [
        example([*a, 9, 8], [4, 5, 2]),
        example([1, 40, 41], [6, 2]),
        example([*b, 7], [8, 9, 10, 2]),
        example(a, [11, 2]),
        example([*a, 30, 31, 32, 33, 34], [12, 2]),
        example([1], [3, 4, 2]),
        example([*b, 6, 5], [7, 2]),
        example(b, [13, 2]),
    ]


def test_the_choice_saves_the_most_rows():
    found = {one.members: one.length for one in beginnings(block())}
    assert found == {(0, 3, 4): 40, (2, 6, 7): 33}
    assert WORTH == 64  # so two of the latter would not be worth it
    fewer = [*block()[:6], block()[7]]
    assert {one.members for one in beginnings(fewer)} == {(0, 3, 4)}


def gain(examples, groups):
    """What a choice saves, counted from the tokens; groups of one do not count."""
    total = 0
    for group in groups:
        prompts = [e.input_ids[: e.num_prompt - 1] for e in (examples[i] for i in group)]
        length = 0
        while all(len(p) > length and p[length] == prompts[0][length] for p in prompts):
            length += 1
        total += (len(group) - 1) * length - WORTH if len(group) > 1 and length else 0
    return total


def partitions(members):
    if not members:
        yield []
        return
    first, *rest = members
    for others in partitions(rest):
        yield [[first], *others]
        for i, group in enumerate(others):
            yield [*others[:i], [first, *group], *others[i + 1 :]]


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_saves_more(seed):
    draw = random.Random(seed)
    stems = [[draw.randrange(1, 4) for _ in range(30)] for _ in range(2)]
    if seed > 5:  # beginnings of beginnings
        longer = (
            s[: draw.randrange(30)] + [draw.randrange(1, 4) for _ in range(20)] for s in stems
        )
        stems += [*longer]
    examples = [
        example([*draw.choice(stems)[: draw.randrange(20, 31)] * 3, draw.randrange(9)], [5, 2])
        for _ in range(6)
    ]
    best = max(gain(examples, groups) for groups in partitions(list(range(6))))
    assert gain(examples, [one.members for one in beginnings(examples)]) == best


def test_those_around_a_longer_beginning_share_the_shorter_one():
    """In the order of the tokens the three of the longer one lie between the four others."""
    short, long = list(range(100, 170)), list(range(200, 240))
    rest = [[150 + i] for i in (0, 1)] + [[*long, i] for i in (7, 8, 9)] + [[300], [400]]
    examples = [example([*short, *one, 5], [4, 2]) for one in rest]
    # 70 of five and 110 of three save 4 * 70 + 2 * 110 = 500, 70 of all 420
    found = {one.members: one.length for one in beginnings(examples)}
    assert found == {tuple(range(7)): 70}  # 500 - 2 * WORTH is less than 420 - WORTH
    long *= 2
    rest = [[150 + i] for i in (0, 1)] + [[*long, i] for i in (7, 8, 9)] + [[300], [400]]
    examples = [example([*short, *one, 5], [4, 2]) for one in rest]
    found = {one.members: one.length for one in beginnings(examples)}
    assert found == {(0, 1, 5, 6): 70, (2, 3, 4): 150}


def test_thousands_of_records_take_no_longer_each():
    """Five seconds are fifty times what it takes; a search of all pairs took minutes."""
    stem = list(range(3, 120))
    examples = [example([*stem, 200 + i % 50, i], [4, 2]) for i in range(5000)]
    began = time.process_time()
    (one,) = beginnings(examples)
    assert len(one.members) == 5000 and time.process_time() - began < 5
    nested = [example(stem[: 2 + i % 100], [4, 2]) for i in range(1000)]
    began = time.process_time()
    assert beginnings(nested) and time.process_time() - began < 5


def trained_once(model, alike, block):
    """Loss and gradients of an adapter on all layers, and rows of a pass."""
    task = CausalLM.of(WordTokenizer(), packing=True)
    assert task.begins_once(model) is None and task.place(model) is not None
    adapter = attach(model, LoRA(r=4, target_modules="all-linear"), name="a", seed=1)
    with torch.no_grad():
        for i, (_, tensor) in enumerate(adapter.named_parameters()):
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    batch = task.collate([block], model, alike=[beginnings(block) if alike else []])
    with task.running(model), activate(model, adapter):
        (loss,) = task.losses(model, batch)
        loss.backward()
        (found,) = task.each_loss(model, batch, [block])
    gradients = {key: p.grad for key, p in adapter.named_parameters()}
    return loss.item(), gradients, batch.inputs["input_ids"].shape[1], found


@pytest.mark.parametrize("name", PACKED)
def test_losses_and_gradients_are_those_of_whole_records(name):
    whole = trained_once(ARCHITECTURES[name].build(), False, block())
    once = trained_once(ARCHITECTURES[name].build(), True, block())
    assert once[2] < whole[2] - 60
    assert once[0] == pytest.approx(whole[0], rel=1e-6)
    assert once[3] == pytest.approx(whole[3], rel=1e-5)
    for key, gradient in once[1].items():
        apart = (gradient - whole[1][key]).norm()
        assert apart <= 1e-6 * max(g.norm() for g in whole[1].values()), key
        assert apart <= 1e-5 * whole[1][key].norm(), key


def test_a_sliding_window_reaches_back_into_the_beginning():
    def model(window):
        made = ARCHITECTURES["mistral"].build()
        made.config.sliding_window = window
        for layer in made.model.layers:
            layer.self_attn.sliding_window = window
        return made

    for window in (3, 20, 43):  # shorter than what goes on behind, longer, and as long as a record
        whole = trained_once(model(window), False, block())
        once = trained_once(model(window), True, block())
        assert once[0] == pytest.approx(whole[0], rel=1e-6)
        assert once[0] != pytest.approx(trained_once(model(None), True, block())[0], rel=1e-4)


def test_nothing_with_a_label_is_shared():
    """Every row of what is shared, whose target is the next token, is in front of all labels."""
    a, _ = TWO
    same = [example(a, [4, 5, 2]) for _ in range(4)]
    assert [one.length for one in beginnings(same)] == [len(a) - 1]
    all_labels = [Example(a, [IGNORED, *a[1:]]) for _ in range(4)]
    assert beginnings(all_labels) == []
    assert beginnings([]) == [] and beginnings(same[:1]) == []
