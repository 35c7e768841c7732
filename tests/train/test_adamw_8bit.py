"""AdamW with moments in 8 bits: against its equations in float64, stopped and gone on with, beside
32 bits."""

import math

import pytest
import safetensors.torch
import torch

from lorica.attach.attach import attach
from lorica.base.known import base_of
from lorica.base.load import load_model
from lorica.config import TrainSettings
from lorica.data.facts import facts
from lorica.errors import CheckpointError, ConfigError, Interrupted
from lorica.methods import LoRA
from lorica.ops.blockwise import blocks_of, dequantize, dynamic_code
from lorica.tasks import CausalLM
from lorica.train.adamw_8bit import SMALLEST, AdamW8bit, moment_bytes
from lorica.train.engine import Engine, Trainee
from lorica.train.loop import train
from lorica.train.optim import make_optimizer, moments, set_moments
from train.runs import outcome, stop_after

SETTINGS = TrainSettings(
    optim="adamw_8bit", learning_rate=0.01, max_steps=9, weight_decay=0.1, adam_beta2=0.95
)
SHAPE = (40, 127)
CODES = {"exp_avg": dynamic_code(signed=True), "exp_avg_sq": dynamic_code(signed=False)}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(state, key):
    """A moment as it is kept, in float64."""
    made = dequantize(state[key], state[f"{key}_scale"], CODES[key]).double()
    return made.view(-1)[: torch.Size(SHAPE).numel()].view(SHAPE)


def test_a_step_against_its_equations():
    """Every step begins from what was kept; its move and what it keeps are those of float64."""
    parameter = torch.nn.Parameter(random(*SHAPE, seed=0))
    optimizer = make_optimizer([("x.A", parameter)], SETTINGS)
    m = v = torch.zeros(SHAPE, dtype=torch.float64)
    for step in range(1, 6):
        gradient, before = random(*SHAPE, seed=step), parameter.detach().double()
        parameter.grad = gradient.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.95 * v + 0.05 * gradient.double() ** 2
        spread = (v / (1 - 0.95**step)).sqrt() + 1e-8
        wanted = before * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / spread
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-5, atol=1e-6)
        state = optimizer.state[parameter]
        assert state["step"] == step and state["exp_avg"].dtype == torch.uint8
        for key, exact in (("exp_avg", m), ("exp_avg_sq", v)):
            values = CODES[key].values.double()
            scaled = blocks_of(exact).double() / state[f"{key}_scale"].double()[:, None]
            chosen = (values[state[key].int()] - scaled).abs()
            nearest = (values - scaled[..., None]).abs().amin(-1)
            smallest = CODES[key].values[1].item() if key == "exp_avg_sq" else 0.0
            assert (chosen <= nearest.clamp(min=smallest) + 1e-6).all()
        m, v = read(state, "exp_avg"), read(state, "exp_avg_sq")


def test_small_tensors_are_moved_as_by_adamw():
    small = torch.Size((SMALLEST // 64, 63))
    assert small.numel() < SMALLEST
    ours, theirs = (torch.nn.Parameter(random(*small, seed=0)) for _ in range(2))
    how = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = AdamW8bit([ours], **how), torch.optim.AdamW([theirs], **how)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = random(*small, seed=step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert optimizers[0].state[ours].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_together_is_as_each_alone():
    """Tensors that go through a step as one; one of them is younger, for it rested."""
    shapes = [(64, 64), (70, 127), (3, 5), (4100,), (1025, 1024), (80, 60)]

    def stepped(chosen):
        parameters = {i: torch.nn.Parameter(random(*shapes[i], seed=i)) for i in chosen}
        how = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        optimizer = AdamW8bit(list(parameters.values()), **how)
        for step in range(3):
            for i, parameter in parameters.items():
                rests = i == 3 and step == 1
                parameter.grad = None if rests else random(*shapes[i], seed=9 * step + i)
            optimizer.step()
        return {i: parameter.detach() for i, parameter in parameters.items()}

    together = stepped(range(6))
    for i in range(6):
        torch.testing.assert_close(stepped([i])[i], together[i], rtol=1e-6, atol=1e-7)


def test_a_gradient_that_comes_seldom_makes_no_leap():
    """Beside numbers that are far larger, the second moment of a small one would round to 0."""
    parameter = torch.nn.Parameter(torch.zeros(SMALLEST))
    optimizer = AdamW8bit([parameter], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(20):
        parameter.grad = torch.ones(SMALLEST)
        parameter.grad[7] = 1e-4 if step == 0 else 0.0
        optimizer.step()
    assert parameter.abs().max() < 0.01 * 20 * 3.2  # AdamW's own bound: 0.1 / sqrt(0.001) a step


@pytest.mark.parametrize("shape", [(64, 63), (64, 64), (70, 127)], ids=str)
def test_bytes_are_those_that_are_planned(shape):
    parameter = torch.nn.Parameter(random(*shape, seed=0))
    optimizer = AdamW8bit([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    parameter.grad = random(*shape, seed=1)
    optimizer.step()
    kept = [t.nbytes for key, t in optimizer.state[parameter].items() if key != "step"]
    assert sorted(kept) == sorted(moment_bytes(parameter))
    if parameter.numel() >= SMALLEST:
        assert sum(kept) == 2 * 260 * math.ceil(parameter.numel() / 256)


def test_its_state_goes_through_a_file_to_the_same_bits():
    def step(parameter, optimizer, seed):
        parameter.grad = random(*SHAPE, seed=seed)
        optimizer.step()

    one = torch.nn.Parameter(random(*SHAPE, seed=0))
    first = make_optimizer([("x.A", one)], SETTINGS)
    for seed in (1, 2):
        step(one, first, seed)
    held = safetensors.torch.load(safetensors.torch.save(moments(first, {"x.A": one})))
    assert held["x.A|exp_avg"].dtype == torch.uint8
    other = torch.nn.Parameter(one.detach().clone())
    second = make_optimizer([("x.A", other)], SETTINGS)
    set_moments(second, {"x.A": other}, held)
    for seed in (3, 4):
        step(one, first, seed)
        step(other, second, seed)
    assert torch.equal(one, other)


def test_it_is_refused_where_all_tensors_are_small():
    small = torch.nn.Parameter(torch.zeros(SMALLEST - 1))
    with pytest.raises(ConfigError, match="largest tensor of this adapter has 4,095 numbers"):
        make_optimizer([("x.A", small)], SETTINGS)


def trained(optim, names=("a",), steps=12):
    """Losses of the first of some adapters that train together, and its tensors."""
    model = load_model("embedded", dtype="float32")
    task = CausalLM.of(base_of(model).tokenizer)
    block_of = task.encode(facts("train", num_records=48)).examples
    settings = TrainSettings(optim=optim, learning_rate=3e-3, max_steps=steps, batch_size=8)
    method = LoRA(r=32, target_modules="all-linear")
    trainees = [
        Trainee(attach(model, method, name=name, seed=i), settings, steps)
        for i, name in enumerate(names)
    ]
    engine, losses = Engine(model, task), []
    for step in range(steps):
        block = [block_of[(8 * step + i) % 48] for i in range(8)]
        losses.append(engine.step(trainees, [[block]] * len(names))[0].loss)
    return losses, [p.detach().clone() for p in trainees[0].adapter.parameters()]


def test_it_learns_as_in_32_bits():
    """Two passes over 48 records: the loss falls as far, within a hundredth of the way."""
    wide, narrow = trained("adamw")[0], trained("adamw_8bit")[0]
    assert narrow != wide
    fallen = wide[0] - wide[-1]
    assert fallen > 1.0
    assert max(abs(a - b) for a, b in zip(wide, narrow, strict=True)) < 0.01 * fallen


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    def run(folder, *, resume=False, optim="adamw_8bit"):
        model = load_model("embedded", dtype="float32")
        attach(model, LoRA(r=32, target_modules=["q_proj", "v_proj"]), name="a")
        return train(
            model,
            {"a": facts("train", num_records=9)},
            TrainSettings(optim=optim, batch_size=3, max_steps=5, save_steps=2, logging_steps=1),
            output_dir=folder,
            resume=resume,
        )

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(tmp_path / "run")
    (held,) = tmp_path.glob("run/checkpoints/step-00000003/optimizers/a.safetensors")
    kinds = {t.dtype for t in safetensors.torch.load_file(held).values()}
    assert kinds == {torch.uint8, torch.float32}
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path / "run", resume=True, optim="adamw")
    assert any("settings.optim" in problem for problem in caught.value.problems)
    run(tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_beside_others_is_as_alone():
    alone = trained("adamw_8bit", steps=3)[1]
    beside = trained("adamw_8bit", names=("a", "b"), steps=3)[1]
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
