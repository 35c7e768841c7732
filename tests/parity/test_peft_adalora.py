"""Training with AdaLoRA beside PEFT: the same budgets, masks, importances, tensors and files."""

import json
from dataclasses import replace

import peft
import pytest
import torch

from architectures import ARCHITECTURES
from exact.measured import without_dropout
from lorica.attach.activate import activate
from lorica.config import TrainSettings
from lorica.errors import AdapterFileError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods.adalora import Allocation
from lorica.tasks.causal_lm import CausalLM
from lorica.train.course import Course
from lorica.train.engine import Engine, Trainee
from train.words import WordTokenizer, examples

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # PEFT says so of its own files too: it takes the pattern for LoRA's
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning:peft"),
]

STEPS, BATCH = 14, 4
SETTINGS = TrainSettings(learning_rate=2e-2, max_steps=STEPS, lr_scheduler_type="constant")
CONFIG = {
    "init_r": 4,
    "target_r": 2,
    "lora_alpha": 6,
    "tinit": 2,
    "tfinal": 4,
    "deltaT": 2,
    "total_step": STEPS,
    "task_type": "CAUSAL_LM",  # without a task, PEFT leaves the orthogonality out of the loss
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both sides from one start, with what each step did to them."""
    folder = tmp_path_factory.mktemp("adalora")
    torch.manual_seed(3)
    base = without_dropout(ARCHITECTURES["llama"].build())
    theirs = peft.get_peft_model(base, peft.AdaLoraConfig(**CONFIG))
    theirs.save_pretrained(str(folder / "start"))
    model = without_dropout(ARCHITECTURES["llama"].build())
    adapter = load_adapter(model, folder / "start", name="a")
    trainee = Trainee(adapter, SETTINGS, STEPS)
    engine = Engine(model, CausalLM.of(WordTokenizer()))
    records = examples(5, 4 * BATCH, longest=19)
    blocks = [records[i : i + BATCH] for i in range(0, len(records), BATCH)]
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0
    )
    theirs.train()
    history = []
    for step in range(1, STEPS + 1):
        block = blocks[step % len(blocks)]
        engine.step([trainee], [[block]])
        _their_step(theirs, optimizer, block, step)
        history.append((_ours(trainee), _theirs(theirs)))
    return trainee, theirs, history, folder


def _their_step(model, optimizer, block, step):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(e.input_ids) for e in block]
    labels = [torch.tensor(e.labels) for e in block]
    model(
        input_ids=pad(ids, batch_first=True),
        attention_mask=pad([torch.ones_like(i) for i in ids], batch_first=True),
        labels=pad(labels, batch_first=True, padding_value=-100),
    ).loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    model.base_model.update_and_allocate(step)  # before zero_grad, as PEFT asks for
    optimizer.zero_grad()


def _ours(trainee):
    found = {name: p.detach().clone() for name, p in trainee.adapter.named_parameters()}
    return found | {key: t.clone() for key, t in trainee.between.state.items()}


def _theirs(model):
    """PEFT's tensors and running means under our names."""

    def named(name):
        path, _, rest = name.removeprefix("model.").rpartition(".lora_")
        return f"{path.removeprefix('base_model.model.')}.{rest.removesuffix('.default')}"

    inner = model.base_model.model
    tensors = {f"model.{n}": p for n, p in inner.named_parameters() if p.requires_grad}
    found = {named(n): p.detach().clone() for n, p in tensors.items()}
    allocator = model.base_model.rankallocator
    for ours, table in (
        ("sensitivity", allocator.exp_avg_ipt),
        ("uncertainty", allocator.exp_avg_unc),
    ):
        own = {n: t for n, t in table.items() if ".ranknum." not in n}
        found |= {f"{named(f'model.{n}')}|{ours}": t.clone() for n, t in own.items()}
    return found


def test_every_step_does_the_same_to_both(trained):
    trainee, _, history, _ = trained
    for step, (ours, theirs) in enumerate(history, 1):
        own = {key: t for key, t in ours.items() if not key.endswith("|kept")}
        assert own.keys() == theirs.keys(), step
        for key, tensor in own.items():
            assert torch.equal(tensor == 0, theirs[key] == 0), (step, key)
            error = (tensor - theirs[key]).abs().max()
            assert error <= 1e-5 * max(1.0, theirs[key].abs().max()), (step, key, error)
    zeros = [sum(int((t == 0).sum()) for k, t in o.items() if k[-2:] == ".E") for o, _ in history]
    places = len(trainee.adapter.slots)
    assert zeros[0] == zeros[1] == 0 and zeros[-1] == 2 * places
    assert any(0 < count < 2 * places for count in zeros)
    assert any(f"{path}|kept" in history[-1][0] for path in trainee.adapter.slots)


def test_the_budget_falls_as_theirs(trained):
    trainee, theirs, _, _ = trained
    allocation, allocator = trainee.between, theirs.base_model.rankallocator
    budgets = [allocation.budget(step) for step in range(1, STEPS + 1)]
    assert budgets == [allocator.budget_schedule(step)[0] for step in range(1, STEPS + 1)]
    assert budgets[0] == 4 * len(allocation.held) and budgets[-1] == 2 * len(allocation.held)


def test_what_is_left_goes_both_ways(trained, tmp_path):
    """Layers of different ranks, one of which has none left."""
    trainee, theirs, _, _ = trained
    sample = ARCHITECTURES["llama"].sample(trainee.adapter.model, 2, 7)
    inner = theirs.base_model.model
    slots = trainee.adapter.slots
    by_rank = sorted(slots, key=lambda path: int((slots[path].tensors["E"] != 0).sum()))
    gone, smaller = by_rank[-2:]
    pattern = theirs.peft_config["default"].rank_pattern
    for path, ranks in ((gone, 0), (smaller, 1)):
        size = trainee.adapter.slots[path].tensors["E"].detach().abs().flatten()
        kept = (size.argsort(descending=True).argsort() < ranks).tolist()
        pattern[f"{path}.lora_E.default"] = kept
        dropped = ~torch.tensor(kept)
        inner.get_submodule(path).lora_E["default"].data[dropped] = 0.0
        trainee.adapter.slots[path].tensors["E"].data[dropped] = 0.0
    with torch.no_grad():
        expected = theirs.eval()(**sample).logits
    with pytest.warns(UserWarning, match="invalid shape"):
        theirs.save_pretrained(str(tmp_path / "theirs"))
    read = ARCHITECTURES["llama"].build()
    adapter = load_adapter(read, tmp_path / "theirs", name="a")
    _answers(read, sample, expected)
    assert gone not in adapter.slots and adapter.method.rank_pattern[smaller] == 1
    model = trainee.adapter.model
    Course(trainee, [], []).finish()
    _answers(model, sample, expected)
    assert gone not in trainee.adapter.slots and trainee.adapter.slots[smaller].method.kept_r == 1
    assert type(model.get_submodule(gone)) is torch.nn.Linear
    assert trainee.adapter.method.rank_pattern == adapter.method.rank_pattern
    save_adapter(trainee.adapter, tmp_path / "ours")
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["rank_pattern"][f"{smaller}.lora_E"] == [True, False, False, False]
    base = ARCHITECTURES["llama"].build()
    back = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(**sample).logits, expected, rtol=1e-5, atol=1e-5)
    again = ARCHITECTURES["llama"].build()
    save_adapter(load_adapter(again, tmp_path / "ours", name="a"), tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def _answers(model, sample, expected):
    with torch.no_grad(), activate(model, "a"):
        torch.testing.assert_close(model(**sample).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        (["x"], "no table"),
        ({"x.lora_A": [True] * 4}, "no list of true and false"),
        ({"x.lora_E": [1, 0, 0, 0]}, "no list of true and false"),
        ({"x.lora_E": [True]}, "not as many values as init_r"),
        ({"model.layers.7.lora_E": [False] * 4}, "is no layer of the file"),
        ({"model.layers.7.lora_E": [True, False, False, False]}, "is no layer of the file"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [True, False, False, False]}, "base needs"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(trained, tmp_path, pattern, word):
    folder = tmp_path / "x"
    save_adapter(load_adapter(ARCHITECTURES["llama"].build(), trained[3] / "start"), folder)
    path = folder / "adapter_config.json"
    changed = {**json.loads(path.read_text()), "rank_pattern": pattern}
    path.write_text(json.dumps(changed))
    with pytest.raises(AdapterFileError, match=word):
        load_adapter(ARCHITECTURES["llama"].build(), folder)


def test_without_numbers_the_schedule_follows_from_the_run(trained):
    trainee, *_ = trained
    held = {path: (s.method, s.tensors) for path, s in trainee.adapter.slots.items()}
    method = replace(trainee.adapter.method, tinit=None, tfinal=None)
    allocation = Allocation(method, held, 100)
    assert (allocation.tinit, allocation.decided) == (10, 50)
    assert not allocation.settled(49) and allocation.settled(50)
    for total in range(1, 9):
        assert not Allocation(method, held, total).problems()
    assert "none of the 100 steps" in Allocation(replace(method, tinit=50), held, 100).problems()[0]


def test_a_target_above_the_initial_rank_is_read_as_none(tmp_path):
    """PEFT's target_r is 8 where nobody says anything, also for an init_r of 3."""
    config = peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["q_proj"])
    theirs = peft.get_peft_model(ARCHITECTURES["llama"].build(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapter = load_adapter(ARCHITECTURES["llama"].build(), tmp_path / "theirs")
    assert (adapter.method.init_r, adapter.method.target_r) == (3, 3)
