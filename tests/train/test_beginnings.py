"""Runs whose records begin alike: fewer rows, the same sums, and nobody's bits depend on others."""

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.methods.lora import LoRA
from lorica.methods.loreft import LoReFT
from lorica.methods.prompt_tuning import PromptTuning
from lorica.tasks.causal_lm import CausalLM
from lorica.train.beginnings import Beginnings, beginnings_of
from lorica.train.engine import Engine, Trainee
from lorica.train.loop import train
from lorica.train.shared import SharedLayers
from tasks.test_beginnings import TWO, block, example
from train.words import WordTokenizer, examples

PLAIN = {"target_modules": "all-linear"}
KINDS = {
    "plain": LoRA(r=4, **PLAIN),
    "upper": LoRA(r=4, layers_to_transform=[1], **PLAIN),
    "dropout": LoRA(r=2, lora_dropout=0.4, **PLAIN),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "edits": LoReFT(r=2),
}


class Trained:
    """Adapters of some kinds after three steps: their tensors, rows of every pass, what decided."""

    def __init__(self, *kinds, wanted=True, same=False):
        self.model, task = ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer())
        self.together = beginnings_of(self.model, task, wanted=wanted)
        self.layers = SharedLayers(self.model, task, self.together)
        self.handles = [
            attach(self.model, KINDS[kind], name=f"{kind}{i}", seed=7)
            for i, kind in enumerate(kinds)
        ]
        settings = TrainSettings(learning_rate=1e-2, max_steps=3, weight_decay=0.01)
        engine = Engine(
            self.model, task, sharing=self.layers.shared, collating=self.together.collate
        )
        trainees = [Trainee(handle, settings, 3) for handle in self.handles]
        self.rows = []
        self.model.model.layers[-1].mlp.register_forward_hook(
            lambda m, x, y: self.rows.append(x[0].shape[1])
        )
        blocks = [block() for _ in kinds]
        blocks = [blocks[0]] * len(kinds) if same else blocks
        for _ in range(3):
            engine.step(trainees, [[one] for one in blocks])
        self.tensors = [
            {key: p.detach().clone() for key, p in handle.named_parameters()}
            for handle in self.handles
        ]


def same_bits(one, other):
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("kinds", [("plain", "dropout"), ("upper", "plain"), ("plain", "prompt")])
def test_beside_others_is_as_alone(kinds):
    together = Trained(*kinds)
    for kind, tensors in zip(kinds, together.tensors, strict=True):
        (alone,) = Trained(kind).tensors
        assert same_bits(tensors, alone), kind


@pytest.mark.parametrize("kind", ["dropout", "prompt", "edits"])
def test_what_knows_of_rows_gets_whole_records(kind):
    shared, whole = Trained(kind), Trained(kind, wanted=False)
    assert same_bits(shared.tensors[0], whole.tensors[0])
    assert shared.together.fault(shared.handles[0])


def test_a_plain_adapter_comes_out_the_same_within_rounding():
    shared, whole = Trained("plain"), Trained("plain", wanted=False)
    assert shared.together.fault(shared.handles[0]) is None
    assert not same_bits(shared.tensors[0], whole.tensors[0])  # other sums
    for key, tensor in shared.tensors[0].items():
        torch.testing.assert_close(tensor, whole.tensors[0][key], rtol=1e-3, atol=1e-4)


def test_layers_below_all_adapters_run_once_for_shared_prompts_too():
    found = Trained("upper", "upper", same=True)
    assert found.layers.passes == 3
    assert same_bits(found.tensors[0], Trained("upper").tensors[0])


def test_a_base_with_dropout_shares_nothing():
    model, task = ARCHITECTURES["gpt2"].build(), CausalLM.of(WordTokenizer())
    model.config.attn_pdrop = 0.1
    adapter = attach(model, LoRA(r=2, target_modules="all-linear"), name="a")
    assert Beginnings(model, task).fault(adapter) == "the base has dropout"


def told(folder, records, **settings):
    model, task = ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer())
    method = LoRA(r=2, lora_dropout=settings.pop("dropout", 0.0), target_modules="all-linear")
    adapter = attach(model, method, name="a")
    train(
        model,
        {adapter: records},
        TrainSettings(max_steps=2, batch_size=4, **settings),
        output_dir=folder,
        task=task,
    )
    text = (folder / "metrics.jsonl").read_text() + (folder / "events.jsonl").read_text()
    return [line for line in text.splitlines() if "begin alike" in line]


def test_a_run_says_what_it_saves(tmp_path):
    alike = [example(TWO[0], [4 + i, 2]) for i in range(8)]
    (line,) = told(tmp_path / "alike", alike)
    assert "once per batch: 70% fewer tokens" in line  # 3 of 4 beginnings of 40, of 43 tokens
    (line,) = told(tmp_path / "dropout", alike, dropout=0.1)
    assert "each time (70% of the tokens): the adapter has dropout" in line
    assert told(tmp_path / "off", alike, share_prompts=False) == []
    assert told(tmp_path / "others", examples(0, 8)) == []
