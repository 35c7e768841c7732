"""The matcher against Python's `re`, its globs, its refusals, and its speed on hostile input."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.errors import ConfigError
from lorica.methods.patterns import Pattern, pattern_value, spelling, unmatched_patterns

LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.experts.gate_up_proj")
PATHS = [
    *(f"model.layers.{i}.{layer}" for i in (0, 1, 3, 10, 13, 21) for layer in LAYERS),
    "lm_head",
    "model.language_model.layers.2.self_attn.q_proj",
    "vision.layers.2.self_attn.q_proj",
    "q_proj",
    "x.q_proj_extra",
    "xq_proj",
]

# Patterns as PEFT's documentation, LLaMA-Factory, Unsloth and adapter files spell them.
REGEXES = [
    r".*\.q_proj",
    r".*language_model\..*\.(q_proj|v_proj)",
    r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
    r"^(?!.*vision).*q_proj$",
    r"^(?!.*(?:vision|head)).*(?:q_proj|v_proj).*",
    r".*layers\.(0|1|[3-5])\..*",
    r".*\.layers.1.*q_proj",
    r"(?:.*?(?:layers).*?(?:attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
    r".*\.\d{2}\..*",
    r".*\.\d{2,}?\.[^m].*",
    r"(\w+\.?)+_proj",
    r"^$|lm_head",
    r".*[^0-9.]+_proj",
    r"lm_\w*|.*\bq_proj\b.*",
    r"model.*proj$",
    r"\Amodel\.layers\.[0-2]\D.*\Z",
    r"(?:model|vision)\.layers\.[^.]+\.(?:self_attn|mlp)\.[a-z_]+",
    r"x{2}|{a,b}|x.q_pro[a-j]_extra",
]


@pytest.mark.parametrize("text", REGEXES)
def test_regexes_match_what_re_matches(text):
    pattern = Pattern(f"regex:{text}")
    expected = [path for path in PATHS if re.fullmatch(text, path)]
    assert [path for path in PATHS if pattern.matches(path)] == expected


@pytest.mark.parametrize("text", REGEXES)
def test_keys_match_as_in_peft(text):
    expected = [path for path in PATHS if re.match(rf"(.*\.)?({text})$", path)]
    if "(?!" in text:  # a look-ahead inside PEFT's group looks from there, not from the start
        expected = [path for path in expected if re.fullmatch(text, path)]
    found = [path for path in PATHS if pattern_value({f"regex:{text}": 1}, path)]
    assert found == expected


ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", "0", r"\w"])
REGEX = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=7,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=REGEX, paths=st.lists(st.text("ab.0", max_size=7), min_size=1, max_size=6))
def test_generated_regexes_match_what_re_matches(text, paths):
    pattern = Pattern(f"regex:{text}")
    expected = [re.fullmatch(text, path) is not None for path in paths]
    assert [pattern.matches(path) for path in paths] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", "name"),
        ("self_attn.q_proj", "name"),
        ("layers.*.q_proj", "glob"),
        ("{q,v}_proj", "glob"),
        ("layers.[0-3].*", "glob"),
        (r"layers\.0", "regex"),
        (".*q_proj", "regex"),
        ("q_proj|v_proj", "regex"),
        ("regex:q_proj", "regex"),
    ],
)
def test_spelling(text, expected):
    assert spelling(text) == expected


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj", False),
        ("q_proj", "q_proj", True),
        ("layers.*.q_proj", "model.layers.13.self_attn.q_proj", True),
        ("model.layers.*.{q,v}_proj", "model.layers.13.self_attn.v_proj", True),
        ("model.layers.*.{q,v}_proj", "model.layers.13.self_attn.k_proj", False),
        ("layers.[2-12].mlp.*", "model.layers.12.mlp.up_proj", True),
        ("layers.[2-12].mlp.*", "model.layers.1.mlp.up_proj", False),
        ("layers.[2-12].mlp.*", "model.layers.13.mlp.up_proj", False),
        ("layers.[1,7-9].mlp", "layers.8.mlp", True),
        ("layers.[1,7-9].mlp", "layers.17.mlp", False),
        ("[qv]_proj", "a.v_proj", True),
        ("[!qv]_proj", "a.v_proj", False),
        ("layers.?.mlp", "layers.4.mlp", True),
        ("layers.?.mlp", "layers.14.mlp", False),
        ("a.{b,c.{d,e}}.f", "x.a.c.e.f", True),
        ("a.{b,c.{d,e}}.f", "x.a.c.f", False),
        ("a.b", "a_b", False),  # a dot is a dot
        ("a.*b", "a.xxb", True),
        ("**b", "a.xxb", True),
    ],
)
def test_names_and_globs(text, path, expected):
    assert Pattern(text).matches(path) is expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r"(a)\1", r"\1 is not supported"),
        ("(?=x)y", "(?=x is not supported"),
        ("(?i)abc", "(?i) is not supported"),
        ("(?P<n>a)", "(?P< is not supported"),
        ("a++", "a second quantifier"),
        ("a|*", "nothing to repeat"),
        ("(a", ") is missing"),
        ("a)", "an unmatched )"),
        (r"[a-\d]+", "a bad range"),
        ("[z-a](x)", "a bad range"),
        (r"\p", r"\p is not supported"),
        ("^*(a)", "an edge cannot be repeated"),
        ("(?!a)b|c", "need a group"),
        ("[ab", "more text is missing"),
        ("{a,b", "} is missing"),
        ("a}*", "an unmatched }"),
        ("[5-2]", "holds no number"),
        ("[0-" + "9" * 99 + "]", "or more than 256"),
        ("[1,2-300]", "or more than 256"),
        ("[1-]x*", "not a range of numbers"),
        (r"a{3,2}\.", "out of range"),
        ("", "1 to 4096"),
        ("a" * 5000, "1 to 4096"),
        ("(" * 100, "more than 40 groups"),
        ("{" * 100, "more than 40 groups"),
        ("((a{256}){256}){256}", "too large"),
        (7, "not a name"),
    ],
)
def test_refusals_say_why(text, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        Pattern(text)


@pytest.mark.parametrize(
    "text", [r"(\w+\.?)+X", r"((a*)*)*b", r"(.*a){30}", "*a" * 40, r"(a|a)*$b"]
)
def test_no_pattern_is_slow(text):
    """Python's `re` takes hours for the first of these, and longer for some others."""
    pattern = Pattern(text)
    start = time.perf_counter()
    assert not pattern.matches("a" * 300 + "." + "c" * 300)
    assert time.perf_counter() - start < 2


def test_too_many_readings_are_refused():
    with pytest.raises(ConfigError, match="too ambiguous"):
        Pattern("(.?){256}" * 8).matches("a" * 600)


def test_first_key_decides():
    patterns = {"q_proj": 4, r"layers\.[0-1]\..*": 2, "layers.[5-12].*": 9, "self_attn.v_proj": 7}
    values = [
        pattern_value(patterns, f"model.layers.{i}.self_attn.{name}")
        for i, name in ((0, "q_proj"), (1, "k_proj"), (7, "k_proj"), (3, "v_proj"), (3, "k_proj"))
    ]
    assert values == [4, 2, 9, 7, None]


def test_a_falsy_value_is_a_value():
    assert pattern_value({"q_proj": 0, "a.q_proj": 3}, "a.q_proj") == 0


def test_unmatched_patterns():
    paths = ["a.0.q_proj", "a.0.v_proj", "a.1.q_proj"]
    keys = ["q_proj", "k_proj", "0.q_proj", r".*v_.*"]
    assert unmatched_patterns(keys, paths) == ["k_proj", "0.q_proj"]  # the second is shadowed
    assert unmatched_patterns(dict.fromkeys(keys, 8), []) == keys
    assert unmatched_patterns([], paths) == []
