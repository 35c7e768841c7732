import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.errors import AdapterFileError
from lorica.files.peft_config import parse_config
from lorica.files.peft_written import exact_names

PART = st.sampled_from(["a", "b", "layers", "0", "1", "q", "k"])
PATHS = st.lists(
    st.lists(PART, min_size=1, max_size=5).map(".".join), min_size=1, max_size=25, unique=True
)


def takes(names, path):
    return any(path == name or path.endswith(f".{name}") for name in names)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(PATHS, st.data())
def test_names_select_exactly_what_was_asked(paths, data):
    wanted = data.draw(st.sets(st.sampled_from(paths)))
    names, excluded = exact_names(wanted, paths)
    chosen = {path for path in paths if takes(names, path) and not takes(excluded, path)}
    clash = {w for w in wanted if takes(excluded, w)}  # where an excluded name ends a wanted one
    assert chosen == wanted - clash
    assert not clash or any(
        other.endswith(f".{w}") for w in wanted for other in paths if other not in wanted
    )


def test_the_shortest_names_are_chosen():
    paths = [f"m.layers.{i}.{part}" for i in range(12) for part in ("attn.q", "attn.k", "mlp.q")]
    assert exact_names([p for p in paths if p.endswith("attn.q")], paths) == (["attn.q"], [])
    assert exact_names([p for p in paths if p.endswith("k")], paths) == (["k"], [])
    assert exact_names(["m.layers.1.attn.k"], paths) == (["1.attn.k"], [])
    assert exact_names([], paths) == ([], [])


def config(**changes):
    return parse_config({"peft_type": "LORA", "target_modules": ["q"], **changes}, "here")


def test_selection_follows_pefts_rules():
    assert config().selects("a.q") and config().selects("q") and not config().selects("a.xq")
    assert not config(exclude_modules=["b.q"]).selects("a.b.q")
    assert not config(exclude_modules=r".*b\..*").selects("a.b.q")
    assert config(target_modules=r"a\.(q|k)").selects("a.q")
    assert not config(target_modules=r"a\.(q|k)").selects("b.a.q")  # the whole path, no ending
    assert not config(modules_to_save=["head"]).selects("m.head.q")
    layers = config(layers_to_transform=[1, 3])
    assert layers.selects("m.layers.3.q") and not layers.selects("m.layers.2.q")
    assert not layers.selects("m.q")
    named = config(layers_to_transform=2, layers_pattern="h")
    assert named.selects("h.2.q") and not named.selects("m.layers.2.q")
    assert config(target_modules=None).selects("anything") is None
    assert config(target_modules="all-linear").selects("anything") is None


def test_ranks_and_alphas_by_place():
    found = config(
        r=8,
        rank_pattern={"q": 2, "^m.k": 3, r"layers\.\d+\.v": 4},
        alpha_pattern={"m.layers.[01].v": 1.5},
    )
    assert [found.rank_at(p) for p in ("m.q", "q", "m.k", "x.m.k", "a.layers.7.v", "o")] == [
        2,
        2,
        3,
        8,
        4,
        8,
    ]
    assert found.alpha_at("m.layers.1.v") == 1.5 and found.alpha_at("m.layers.2.v") == 8
    method = found.method_at("m.k")
    assert method.r == 3 and method.rank_pattern == {}


def test_the_minimum_that_peft_loads():
    found = config()
    assert (
        found.method.r == 8
        and found.method.lora_alpha == 8
        and found.method.target_modules == ("q",)
    )


def test_every_problem_is_told():
    with pytest.raises(AdapterFileError) as caught:
        config(use_dora="yes", bias="all", lora_dropout="x", mystery=[1])
    told = "\n".join(caught.value.problems)
    assert all(word in told for word in ("use_dora", "bias", "lora_dropout", "mystery"))
