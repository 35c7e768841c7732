"""Adapters that are judged in passes that they share: the losses of each alone, to the last bit."""

from importlib import import_module

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine
from lorica.train.judging import judged_together, losses_of
from lorica.train.loop import train
from lorica.train.measure import mean_loss
from lorica.train.plan import courses_of
from lorica.train.shared import SharedLayers
from tasks.test_beginnings import block
from train.words import WordTokenizer, examples

judging, passes = (import_module(f"lorica.train.{name}") for name in ("judging", "passes"))
SETTINGS = TrainSettings(max_steps=4, batch_size=3, eval_batch_size=4)


def courses(model, task, methods, held_out):
    found = []
    for name, method in methods.items():
        adapter = attach(model, method, name=name, seed=len(name))
        with torch.no_grad():
            for number, tensor in enumerate(adapter.parameters()):
                torch.nn.init.normal_(
                    tensor, std=0.3, generator=torch.Generator().manual_seed(number)
                )
        found += courses_of(model, task, {adapter: examples(1, 5)}, held_out, SETTINGS)[0]
    return found


@pytest.mark.parametrize("most", [4096, 150, 1])
@pytest.mark.parametrize("layers", [None, [1]])
def test_the_losses_are_those_of_each_alone(monkeypatch, most, layers):
    monkeypatch.setattr(passes, "MOST_TOKENS", most)
    model, task, held_out = (
        ARCHITECTURES["llama"].build(),
        CausalLM.of(WordTokenizer()),
        examples(3, 13),
    )
    how = {"target_modules": ["q_proj", "up_proj", "down_proj"], "layers_to_transform": layers}
    ranks = {f"{'x' * r}": LoRA(r=r, lora_dropout=0.3, **how) for r in (1, 2, 5)}
    found = courses(model, task, ranks, held_out)
    shared = SharedLayers(model, task)
    engine = Engine(model, task, sharing=shared.shared)
    (group,) = judged_together(engine, found)
    adapters = [course.trainee.adapter for course in group]
    each = losses_of(engine, adapters, group[0].held_out, 4)
    assert bool(shared.passes) == (layers is not None and most > 1)
    for course, losses in zip(group, each, strict=True):
        alone = []
        with activate(model, course.trainee.adapter):
            mean_loss(model, task, course.held_out, 4, each=alone)
        assert losses == alone
    assert len({tuple(losses) for losses in each}) == 3


def test_only_those_with_the_same_records_and_stacking_methods_share():
    model, task, held_out = (
        ARCHITECTURES["llama"].build(),
        CausalLM.of(WordTokenizer()),
        examples(3, 5),
    )
    how = {"target_modules": "all-linear"}
    same = {"a": LoRA(r=2, **how), "b": LoRA(r=3, **how), "c": DoRA(r=2, **how)}
    found = courses(model, task, same, held_out)
    found += courses(model, task, {"d": LoRA(r=2, **how)}, examples(3, 5))
    groups = judged_together(Engine(model, task), found)
    assert [[c.name for c in group] for group in groups] == [["a", "b"], ["c"], ["d"]]


def test_a_run_judges_its_adapters_together(tmp_path, monkeypatch):
    sizes, original = [], judging._pass

    def counted(engine, adapters, *how):
        sizes.append(len(adapters))
        return original(engine, adapters, *how)

    monkeypatch.setattr(judging, "_pass", counted)
    found = {}
    for names in ("ab", "a"):
        model = ARCHITECTURES["llama"].build()
        held_out = examples(3, 7)
        data = {
            attach(model, LoRA(r=2, target_modules="all-linear"), name=n, seed=3): examples(1, 6)
            for n in names
        }
        how = {"task": CausalLM.of(WordTokenizer()), "eval_data": held_out}
        report = train(model, data, SETTINGS, output_dir=tmp_path / names, **how)
        found[names] = report.eval_loss["a"]
    assert sizes and set(sizes) == {2} and found["ab"] == found["a"]


@pytest.mark.parametrize("layers", [None, [1]])
def test_records_that_begin_alike_are_judged_so(tmp_path, layers):
    """Beside another adapter to the same bits as alone; but for rounding as whole records."""
    found, rows, task = {}, {}, CausalLM.of(WordTokenizer())
    for names in ("ab", "a", "whole"):
        model, data = ARCHITECTURES["llama"].build(), {}
        seen = rows.setdefault(names, [])
        model.model.layers[0].mlp.register_forward_hook(
            lambda m, x, y, seen=seen: m.training or seen.append(x[0].shape[1])
        )
        for name in names if names != "whole" else "a":
            method = LoRA(r=2, target_modules="all-linear", layers_to_transform=layers)
            data[attach(model, method, name=name, seed=3)] = block()
        settings = SETTINGS.model_copy(
            update={"share_prompts": names != "whole", "eval_batch_size": 8, "max_steps": 1}
        )
        how = {"task": task, "eval_data": block()}
        report = train(model, data, settings, output_dir=tmp_path / names, **how)
        found[names] = report.eval_loss["a"]
    assert found["ab"] == found["a"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["a"] != found["whole"]  # other sums
    assert max(rows["a"]) < max(rows["whole"]) - 60
