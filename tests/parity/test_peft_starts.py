"""Starts from data between Lorica and the real PEFT: the same directions, ranks and outputs."""

import peft
import pytest
import torch
from peft.tuners.lora import eva as their_eva
from peft.utils import loftq_utils

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import LoRA
from lorica.ops.nf4 import nf4_rounded
from lorica.tasks.causal_lm import CausalLM
from lorica.train.eva import RECORDS_PER_BATCH
from lorica.train.starts import attach_by_records
from train.words import WordTokenizer, examples

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning:peft"),
]
TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
ARCH = ARCHITECTURES["llama"]


def padded(chosen):
    """The records as PEFT's loader has them: padded, with the labels at the tokens."""
    longest = max(len(e.input_ids) for e in chosen)
    made = {"input_ids": [], "attention_mask": [], "labels": []}
    for e in chosen:
        rest = longest - len(e.input_ids)
        made["input_ids"].append([*e.input_ids, *[0] * rest])
        made["attention_mask"].append([1] * len(e.input_ids) + [0] * rest)
        made["labels"].append([*e.labels, *[-100] * rest])
    return {key: torch.tensor(rows) for key, rows in made.items()}


def angle(one, other):
    """Sine of the largest angle between two row spaces of one dimension."""
    Q, _ = torch.linalg.qr(one.double().T)
    P, _ = torch.linalg.qr(other.double().T)
    cosine = torch.linalg.svdvals(Q.T @ P).min().clamp(max=1.0)
    return (1 - cosine**2).sqrt().item()


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_gives_the_ranks_and_directions_of_peft(rho, monkeypatch):
    """With their own exact decomposition in the place of their randomized one."""
    pca = their_eva.IncrementalPCA
    monkeypatch.setattr(pca, "_svd_fn_lowrank", pca._svd_fn_full)
    records = examples(1, 3 * RECORDS_PER_BATCH)
    base = ARCH.build()
    size = RECORDS_PER_BATCH
    loader = [padded(records[i : i + size]) for i in range(0, len(records), size)]
    config = peft.LoraConfig(
        r=4,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.99),
        task_type="CAUSAL_LM",
    )
    theirs = their_eva.get_eva_state_dict(base, loader, config, show_progress_bar=False)
    model, task = ARCH.build(), CausalLM.of(WordTokenizer())
    method = LoRA(
        r=4, target_modules=TARGETS, init_lora_weights="eva", eva_rho=rho, init_records=24
    )
    adapter, found = attach_by_records(model, method, task, records, name="a")
    assert found.chosen == {path: len(rows) for path, rows in theirs.items()}
    worst = 0.0
    for path, slot in adapter.slots.items():
        worst = max(worst, angle(slot.tensors["A"], theirs[path]))
    assert worst < 1e-3, worst
    print("largest sine of an angle", worst)


def test_lora_ga_has_the_directions_of_peft_and_the_outputs_of_the_base(tmp_path):
    records, task = examples(1, 6), CausalLM.of(WordTokenizer())
    model = ARCH.build()
    expected = ARCH.logits(model(**ARCH.sample(model, 2, 7))).detach()
    method = LoRA(r=3, target_modules=TARGETS, init_lora_weights="lora_ga", init_records=6)
    adapter, _ = attach_by_records(model, method, task, records, name="a")
    base = ARCH.build()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=16,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )

    def train_step():
        batch = padded(records)
        logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss.backward()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.preprocess_loraga(base, config, train_step)
        theirs = peft.get_peft_model(base, config).eval()
    arch_logits = ARCH.logits(theirs(**ARCH.sample(base, 2, 7)))
    with activate(model, "a"):
        assert torch.equal(ARCH.logits(model(**ARCH.sample(model, 2, 7))), expected)
    assert (arch_logits - expected).abs().max() < 1e-4, "theirs takes it off the base"
    worst = 0.0
    for path, slot in adapter.slots.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        worst = max(worst, angle(slot.tensors["A"], A), angle(slot.tensors["B"].T, B.T))
    assert worst < 2e-3, worst
    print("largest sine of an angle", worst)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05
    with activate(model, "a"):
        tuned = ARCH.logits(model(**ARCH.sample(model, 2, 7))).detach()
    save_adapter(adapter, tmp_path / "a")
    again = ARCH.build()
    back = peft.PeftModel.from_pretrained(again, str(tmp_path / "a")).eval()
    actual = ARCH.logits(back(**ARCH.sample(again, 2, 7)))
    assert (actual - tuned).abs().max() <= 1e-5 * max(1.0, tuned.abs().max().item())


def test_eva_with_its_ranks_is_read_by_peft(tmp_path):
    model, task = ARCH.build(), CausalLM.of(WordTokenizer())
    method = LoRA(r=3, target_modules=TARGETS, init_lora_weights="eva", use_rslora=True)
    adapter, _ = attach_by_records(model, method, task, examples(1, 40), name="a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05
    with activate(model, "a"):
        tuned = ARCH.logits(model(**ARCH.sample(model, 2, 7))).detach()
    save_adapter(adapter, tmp_path / "a")
    again = ARCH.build()
    back = peft.PeftModel.from_pretrained(again, str(tmp_path / "a")).eval()
    actual = ARCH.logits(back(**ARCH.sample(again, 2, 7)))
    assert (actual - tuned).abs().max() <= 1e-5 * max(1.0, tuned.abs().max().item())
    load_adapter(model, tmp_path / "a", name="b")
    with activate(model, "b"):
        same = ARCH.logits(model(**ARCH.sample(model, 2, 7)))
    torch.testing.assert_close(same, tuned)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_alternates_as_peft_does(iterations):
    """Their loop with their decomposition; the quantizer is ours, theirs needs a GPU."""
    model = ARCH.build()
    method = LoRA(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="loftq",
        loftq_iter=iterations,
    )
    adapter = attach(model, method, name="a")
    for path, slot in adapter.slots.items():
        weight = model.get_submodule(path).weight.detach()
        rest, found = weight.clone(), {}
        for _ in range(iterations):
            rounded = nf4_rounded(rest)
            found = loftq_utils._low_rank_decomposition(weight - rounded, reduced_rank=4)
            rest = weight - found["L"] @ found["R"]
        ours = 2.0 * slot.tensors["B"] @ slot.tensors["A"]
        torch.testing.assert_close(ours, found["L"] @ found["R"], rtol=1e-4, atol=1e-5)
        before = (weight - nf4_rounded(weight)).norm()
        assert (weight - rounded - ours).norm() < before
