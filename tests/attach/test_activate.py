"""Who acts: names, mixtures, rows; for a while or for good; and what is refused."""

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.attach.activate import activate
from lorica.attach.plates import plates_of
from lorica.errors import ActivationError, ConfigError, LoricaWarning, TargetError
from lorica.methods.lora import LoRA

X = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.second = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def _net(**names: dict) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    names = names or {"sql": {}, "style": {}}
    for seed, (name, settings) in enumerate(names.items()):
        method = LoRA(
            **{"r": 3, "target_modules": "all-linear", "init_lora_weights": "random", **settings}
        )
        lorica.attach(model, method, name=name, seed=seed)
    return model


def _run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def _under(model: nn.Module, mixture) -> Tensor:
    with activate(model, mixture):
        return _run(model)


def test_a_name_a_handle_and_a_weight_of_one_are_the_same():
    model = _net()
    handle = lorica.adapters(model)["sql"]
    expected = _under(model, "sql")
    for mixture in (handle, {"sql": 1.0}, {"sql": 1}, {handle: 1.0}):
        assert torch.equal(_under(model, mixture), expected)
    torch.testing.assert_close(_under(model, ["sql", handle, {handle: 1.0}]), expected)
    assert not torch.equal(expected, _under(model, "style"))


def test_nobody_is_the_base():
    model = _net()
    base = Net()
    base.load_state_dict(model.state_dict())
    expected = _run(base)
    for mixture in (None, {}, [None, None, None], ({},) * 3):
        assert torch.equal(_under(model, mixture), expected)
    torch.testing.assert_close(_under(model, {"sql": 0.0}), expected)


def test_adapters_that_sit_on_different_layers():
    model = _net(a={"target_modules": ["first"]}, b={"target_modules": ["second"]})
    rows = ["a", "b", {"a": 0.5, "b": -2.0}]
    together = _under(model, rows)
    for number, row in enumerate(rows):
        torch.testing.assert_close(together[number], _under(model, row)[number])


def test_a_fresh_adapter_does_not_inherit_an_activation():
    """Nothing acts that nobody activated, although its name did act before."""
    model = _net()
    base = _under(model, None)
    activate(model, "sql")
    with activate(model, None):
        lorica.detach(model, "sql")
        method = LoRA(r=3, target_modules="all-linear", init_lora_weights="random")
        lorica.attach(model, method, name="sql")
    assert torch.equal(_run(model), base)
    with activate(model, "sql"), activate(model, "style"):
        pass
    activate(model, "sql")
    with activate(model, None):
        lorica.detach(model, "style")
    assert not torch.equal(_run(model), base), "that of another adapter goes on"


def test_contexts_nest_and_put_back_what_was():
    model = _net()
    sql, style, none = _under(model, "sql"), _under(model, "style"), _under(model, None)
    with activate(model, "sql"):
        with activate(model, "style"):
            assert torch.equal(_run(model), style)
            with activate(model, None):
                assert torch.equal(_run(model), none)
            assert torch.equal(_run(model), style)
        assert torch.equal(_run(model), sql)
    assert torch.equal(_run(model), none)


def test_an_exception_puts_back_too():
    model = _net()
    expected = _under(model, "sql")
    activate(model, "sql")
    with pytest.raises(ZeroDivisionError), activate(model, "style"):
        raise ZeroDivisionError
    assert torch.equal(_run(model), expected)
    with pytest.raises(ConfigError):
        activate(model, "nobody")
    assert torch.equal(_run(model), expected)


def test_without_a_block_it_stays():
    model = _net()
    style, none = _under(model, "style"), _under(model, None)
    activate(model, "style")
    assert torch.equal(_run(model), style)
    activate(model, None)
    assert torch.equal(_run(model), none)


def test_unknown_names_bad_weights_and_bad_entries():
    model = _net()
    with pytest.raises(ConfigError) as caught:
        activate(model, ["sqll", {"stile": float("nan"), "sql": True}, "zzz"])
    text = str(caught.value)
    assert "no adapter 'sqll' is attached; did you mean 'sql'?" in text
    assert "no adapter 'stile' is attached; did you mean 'style'?" in text
    assert "no adapter 'zzz' is attached\n" in text
    assert (
        "row 1: the weight of 'stile' is nan" in text
        and "row 1: the weight of 'sql' is True" in text
    )
    assert "adapters: sql, style" in text
    with pytest.raises(ConfigError, match="- the weight of 'sql' is inf"):
        activate(model, {"sql": float("inf")})
    with pytest.raises(ConfigError, match="5 is no mixture"):
        activate(model, 5)  # pyright: ignore
    with pytest.raises(ConfigError, match="the list has no rows"):
        activate(model, [])
    with pytest.raises(ConfigError, match="adapters: none"):
        activate(Net(), "sql")


def test_wrong_row_counts_name_the_place_and_the_shape():
    model = _net()
    with pytest.raises(ActivationError, match=r"^first: 2 rows are active.*given \(3, 4, 7\)"):
        _under(model, ["sql", None])
    with activate(model, ["sql", None]), pytest.raises(ActivationError, match=r"\(7,\)"):
        _run(model, X[0, 0])


def test_rows_are_repeated_in_place_as_beams_are():
    model = _net()
    rows = ["sql", "style", None]
    with activate(model, rows):
        once, twice = _run(model), _run(model, X.repeat_interleave(2, 0))
        torch.testing.assert_close(twice, once.repeat_interleave(2, 0))


def test_tokens_in_one_dimension_belong_to_the_rows_of_the_layer_before():
    """As in OPT, whose feed-forward layers see (batch x positions, width)."""

    class Flat(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).tanh()
            return self.second(hidden.flatten(0, 1)).view(*x.shape[:-1], 5)

    model, flat = _net(), _net()
    flat.__class__ = Flat
    rows = ["sql", "style", None]
    with activate(model, rows), activate(flat, rows):
        torch.testing.assert_close(_run(flat), _run(model))
        torch.testing.assert_close(_run(flat, X[:, :1]), _run(model, X[:, :1]))
        with pytest.raises(ActivationError, match=r"^second: 3 rows.*\(6, 9\)"):
            flat.second(torch.zeros(6, 9))


def test_a_routed_expert_sees_tokens_of_any_row_and_is_refused():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Sequential(nn.Linear(7, 5))])})
    method = LoRA(r=2, target_modules=["experts.0.0"], init_lora_weights="random")
    lorica.attach(model, method, name="sql")
    refused = pytest.raises(ActivationError, match=r"experts\.0\.0: 3 rows")
    with activate(model, ["sql", None, "sql"]), refused:
        model["experts"][0](X[:, 0])


def test_the_undecided_model_warns_once():
    model = _net()
    with pytest.warns(LoricaWarning, match=r"none was activated.*lorica\.activate\(model, NAME\)"):
        _run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(model)
    decided = _net()
    activate(decided, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(decided)


@pytest.mark.parametrize("second", ["style", None])
def test_another_thread_is_refused_while_one_is_active(second):
    model = _net()
    caught: list[BaseException] = []

    def other() -> None:
        try:
            activate(model, second)
        except ActivationError as error:
            caught.append(error)

    with activate(model, "sql"):
        expected = _run(model)
        thread = threading.Thread(target=other)
        thread.start(), thread.join()
        assert len(caught) == 1 and "another thread" in str(caught[0])
        assert torch.equal(_run(model), expected)
    thread = threading.Thread(target=other)
    thread.start(), thread.join()
    assert len(caught) == 1


def test_a_thread_that_ended_holds_nothing():
    model = _net()
    thread = threading.Thread(target=lambda: activate(model, "sql"))
    thread.start(), thread.join()
    assert torch.equal(_under(model, "style"), _under(_net(), "style"))


def test_a_generator_left_unfinished_leaves_it_on():
    """Documented: activate around whole calls, never around a yield."""
    model = _net()
    none, sql = _under(model, None), _under(model, "sql")

    def answers():
        with activate(model, "sql"):
            yield _run(model)

    unfinished = answers()
    next(unfinished)
    assert torch.equal(_run(model), sql)
    unfinished.close()
    assert torch.equal(_run(model), none)


def test_mixing_needs_no_copy_of_the_base_weights():
    model = _net()
    before = [p.data_ptr() for p in model.parameters()]
    _under(model, {"sql": 0.7, "style": 0.3})
    assert [p.data_ptr() for p in model.parameters()] == before


def test_detaching_an_active_adapter_ends_the_activation():
    """So that a later one of its name does not act at some places only."""
    model = _net(a={}, b={"target_modules": ["first"]})
    activate(model, "a")
    lorica.detach(model, "a")
    assert all(p.route is None for m in model.modules() for p in plates_of(m))
    lorica.attach(
        model, LoRA(r=2, target_modules="all-linear", init_lora_weights="random"), name="a"
    )
    base = Net()
    base.load_state_dict(model.state_dict())
    assert torch.equal(_run(model), _run(base))


def test_a_compiled_or_wrapped_model_is_seen_through():
    model = _net()
    expected = _under(model, "sql")
    compiled = torch.compile(model, backend="eager")
    assert lorica.adapters(compiled).keys() == {"sql", "style"}
    with activate(compiled, "sql"):
        assert torch.equal(_run(model), expected)
    lorica.detach(compiled, "sql")
    assert lorica.adapters(model).keys() == {"style"}
    with pytest.raises(TargetError, match="DataParallel"):
        activate(nn.DataParallel(model), "style")


def _operations(model: nn.Module, x: Tensor, recorded: bool) -> list[str]:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func).removeprefix("aten."))
            return func(*args, **(kwargs or {}))

    with torch.set_grad_enabled(recorded), Count():
        model(x)
    return seen


@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_call_costs_in_operations(recorded):
    model = nn.Sequential(nn.Linear(7, 9))
    bare = _operations(model, X, recorded)
    for seed, name in enumerate(("a", "b")):
        lorica.attach(model, LoRA(r=3, target_modules=("0",)), name=name, seed=seed)
    activate(model, None)
    assert _operations(model, X, recorded) == bare

    def added(mixture) -> list[str]:
        with activate(model, mixture):
            operations = _operations(model, X, recorded)
        free = ("view", "t.", "slice", "detach", "_unsafe_view", "alias", "expand", "unsqueeze")
        return [op.split(".")[0] for op in operations[len(bare) :] if not op.startswith(free)]

    assert added("a") == ["mm", "addmm_"]
    mixture = added({"a": 0.5, "b": 2.0})
    assert mixture == ["cat", "cat", "mul", "mul", "cat", "mm", "mul", "addmm_"]
    assert len(added(["a", "b", None])) <= len(mixture) + 2
