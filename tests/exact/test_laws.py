"""Laws that hold for all adapters, over drawn shapes, ranks, scales, weights and values."""

from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorica
from lorica.attach.handle import Adapter
from lorica.config import TrainSettings
from lorica.data.pack import batches
from lorica.train.optim import learning_rate

quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**20)
weights = st.integers(-24, 24).map(lambda n: n / 8)
"""Of a mixture; they are kept in float32, so these are numbers that it holds exactly."""


class Net(nn.Module):
    """An embedding, a linear layer, one with a bias: float64, so that laws are sharp."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(11, width)
            self.inner = nn.Linear(width, width + 2, bias=False)
            self.outer = nn.Linear(width + 2, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(self.table(ids))))


def adapter_of(model: nn.Module, name: str, r: int, alpha: float, seed: int) -> Adapter:
    method = lorica.LoRA(r=r, lora_alpha=alpha, target_modules=("table", "inner", "outer"))
    adapter = lorica.attach(model, method, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for slot in adapter.slots.values():
        for tensor in slot.tensors.values():
            tensor.data = torch.randn(tensor.shape, generator=generator).double()
    return adapter


def draw_ids(seed: int, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (rows, 5), generator=generator)


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-10 * (1 + b.abs().max()))


def inner_of(model: Net, ids: Tensor) -> Tensor:
    """Before the non-linearity, where updates add up."""
    return model.inner(model.table.weight[ids].detach())


@quick
@given(width=st.integers(3, 9), r=st.integers(1, 3), seed=seeds)
def test_detaching_gives_back_objects_and_bits(width, r, seed):
    model, ids = Net(width, seed), draw_ids(seed)
    before, objects = model(ids), [*model.modules(), *model.parameters()]
    keys = [*model.state_dict()]
    adapter_of(model, "a", r, 4.0, seed)
    adapter_of(model, "b", r, 2.0, seed + 1)
    with lorica.activate(model, {"a": 1.0, "b": -1.0}):
        model(ids)
    assert [*model.state_dict()] == keys
    lorica.detach(model, "b")
    lorica.detach(model, "a")
    assert torch.equal(model(ids), before)
    after = [*model.modules(), *model.parameters()]
    assert all(a is b for a, b in zip(after, objects, strict=True))
    assert all(type(m) in (Net, nn.Embedding, nn.Linear) for m in model.modules())


@quick
@given(r=st.integers(1, 3), alpha=st.floats(0.5, 20), factor=weights, seed=seeds)
def test_the_effect_is_linear_in_the_weight(r, alpha, factor, seed):
    model, ids = Net(5, seed), draw_ids(seed)
    adapter_of(model, "a", r, alpha, seed)
    with lorica.activate(model, None):
        base = inner_of(model, ids)
    with lorica.activate(model, "a"):
        once = inner_of(model, ids) - base
    with lorica.activate(model, {"a": factor}):
        scaled = inner_of(model, ids) - base
    assert near(scaled, once * factor)


@quick
@given(
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)), w=st.tuples(weights, weights), seed=seeds
)
def test_mixtures_add_and_commute(ranks, w, seed):
    model, ids = Net(6, seed), draw_ids(seed)
    adapter_of(model, "a", ranks[0], 4.0, seed)
    adapter_of(model, "b", ranks[1], 8.0, seed + 1)
    with lorica.activate(model, None):
        base = inner_of(model, ids)
    parts = []
    for name, weight in zip("ab", w, strict=True):
        with lorica.activate(model, {name: weight}):
            parts.append(inner_of(model, ids) - base)
    with lorica.activate(model, {"a": w[0], "b": w[1]}):
        both, end = inner_of(model, ids) - base, model(ids)
    with lorica.activate(model, {"b": w[1], "a": w[0]}):
        assert near(inner_of(model, ids) - base, both) and near(model(ids), end)
    assert near(both, parts[0] + parts[1])


@quick
@given(seed=seeds, chosen=st.lists(st.sampled_from(["a", "b", "ab", None]), min_size=1, max_size=6))
def test_rows_of_a_batch_equal_each_alone_in_any_order(seed, chosen):
    model, ids = Net(5, seed), draw_ids(seed, rows=len(chosen))
    adapter_of(model, "a", 2, 4.0, seed)
    adapter_of(model, "b", 3, 8.0, seed + 1)
    kinds = {"a": "a", "b": "b", "ab": {"a": 0.5, "b": -2.0}, None: None}
    rows = [kinds[c] for c in chosen]
    with lorica.activate(model, rows):
        together = model(ids)
    for i, row in enumerate(rows):
        with lorica.activate(model, [row]):
            assert near(model(ids[i : i + 1])[0], together[i])
    turned = list(reversed(range(len(rows))))
    with lorica.activate(model, [rows[i] for i in turned]):
        assert near(model(ids[turned]), together[turned])


@quick
@given(r=st.integers(1, 3), share=weights, seed=seeds)
def test_merged_equals_attached(r, share, seed):
    model, copy, ids = Net(6, seed), Net(6, seed), draw_ids(seed)
    adapter_of(model, "a", r, 3.0, seed)
    adapter_of(copy, "a", r, 3.0, seed)
    with lorica.activate(model, {"a": share}):
        attached = model(ids)
    if share:
        lorica.merge(copy, {"a": share})
        lorica.activate(copy, None)
        assert near(copy(ids), attached)


@quick
@given(
    r=st.integers(1, 3),
    seed=seeds,
    value=st.floats(allow_nan=False, allow_infinity=False, width=32),
)
def test_any_finite_tensors_are_read_back_bit_for_bit(tmp_path_factory, r, seed, value):
    folder = tmp_path_factory.mktemp("laws")
    model, other = Net(4, seed).float(), Net(4, seed).float()
    adapter = lorica.attach(
        model, lorica.LoRA(r=r, target_modules=("table", "inner", "outer")), name="a", seed=seed
    )
    for slot in adapter.slots.values():
        slot.tensors["B"].data.view(-1)[0] = value
    lorica.save_adapter(adapter, folder / "one")
    read = lorica.load_adapter(other, folder / "one", name="b")
    for path, slot in adapter.slots.items():
        for name, tensor in slot.tensors.items():
            assert torch.equal(read.slots[path].tensors[name], tensor)
    lorica.save_adapter(read, folder / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


@quick
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=70),
    batch=st.integers(1, 9),
    group=st.integers(1, 5),
    seed=seeds,
    cut=st.integers(0, 70),
)
def test_every_record_is_seen_once_an_epoch_wherever_a_run_stops(lengths, batch, group, seed, cut):
    how = {"batch_size": batch, "group": group, "seed": seed}
    whole = [b for epoch in (0, 1) for b in batches(lengths, epoch=epoch, **how)]
    again = [b for epoch in (0, 1) for b in batches(lengths, epoch=epoch, **how)]
    seen = [i for b in [*whole[:cut], *again[cut:]] for i in b]
    assert sorted(seen) == sorted([*range(len(lengths))] * 2)


@quick
@given(
    total=st.integers(1, 400),
    warmup=st.floats(0, 0.9),
    kind=st.sampled_from(["linear", "cosine", "constant", "wsd"]),
)
def test_the_rate_never_jumps(total, warmup, kind):
    """One step changes it by no more than the steepest straight line would."""
    decay = {"decay_ratio": 0.1} if kind == "wsd" else {}
    own = TrainSettings(
        learning_rate=1.0, max_steps=total, warmup_ratio=warmup, lr_scheduler_type=kind, **decay
    )
    rates = [learning_rate(step, total, own) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    rising = max(1, round(warmup * total))
    falling = max(1, total - rising) if kind in ("linear", "cosine") else max(1, round(0.1 * total))
    steepest = max(1 / rising if warmup else 0, 1.6 / falling)
    assert all(abs(b - a) <= steepest + 1e-9 for a, b in pairwise(rates))
