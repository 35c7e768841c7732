"""Virtual tokens in training: the same bits beside others, after a stop, and in micro-batches."""

import pytest
import torch
from safetensors.torch import load_file

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.methods import LoRA, PrefixTuning, PromptTuning, PTuning
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine, Trainee
from lorica.train.loop import train
from train.words import WordTokenizer, examples

METHODS = {
    "prompt": PromptTuning(num_virtual_tokens=3),
    "network": PTuning(num_virtual_tokens=4, encoder_reparameterization_type="LSTM"),
    "prefix": PrefixTuning(num_virtual_tokens=5, prefix_projection=True),
    "lora": LoRA(r=2, target_modules="all-linear"),
}


def trained(*names: str, halves: bool = False, packing: bool | str = "auto") -> dict:
    model = ARCHITECTURES["llama"].build()
    settings = TrainSettings(learning_rate=1e-2, max_steps=3)
    handles = {name: attach(model, METHODS[name], name=name) for name in METHODS if name in names}
    engine = Engine(model, CausalLM.of(WordTokenizer(), packing=packing))
    trainees = [Trainee(handle, settings, 3) for handle in handles.values()]
    for step in range(3):
        data = examples(10 + step, 6)
        work = [data[:2], data[2:]] if halves else [data]
        engine.step(trainees, [work for _ in trainees])
    return {n: {k: p.detach() for k, p in h.named_parameters()} for n, h in handles.items()}


def test_beside_others_gives_the_same_bits_as_alone():
    together = trained(*METHODS)
    for name in METHODS:
        alone = trained(name)[name]
        assert alone.keys() == together[name].keys()
        for key, tensor in alone.items():
            assert torch.equal(tensor, together[name][key]), f"{name}: {key}"


@pytest.mark.parametrize("name", ["prompt", "network", "prefix"])
def test_packing_and_micro_batches_change_nothing_but_the_last_bits(name):
    expected = trained(name)[name]
    for other in (trained(name, halves=True), trained(name, packing=False)):
        for key, tensor in other[name].items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["network", "prefix"])
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path, monkeypatch):
    """The network that makes them is in the checkpoints, though not in the adapter's files."""

    def run(folder, *, resume=False):
        model = ARCHITECTURES["llama"].build()
        adapter = attach(model, METHODS[name], name="a")
        settings = TrainSettings(learning_rate=1e-2, max_steps=4, batch_size=3, save_steps=2)
        task = CausalLM.of(WordTokenizer())
        train(
            model, {adapter: examples(1, 9)}, settings, output_dir=folder, task=task, resume=resume
        )

    run(tmp_path / "whole")
    step, calls = Engine.step, []

    def stops(self, *given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "step", stops)
        run(tmp_path / "stopped")
    run(tmp_path / "stopped", resume=True)
    files = [
        load_file(tmp_path / f / "adapter/adapter_model.safetensors") for f in ("whole", "stopped")
    ]
    assert files[0].keys() == files[1].keys() == {"prompt_embeddings"}
    assert torch.equal(files[0]["prompt_embeddings"], files[1]["prompt_embeddings"])
