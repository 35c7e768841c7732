"""Every planted fault is named, with its rows; sound records raise nothing."""

import random
from dataclasses import dataclass, field

import pytest

from data.chat_templates import CHATML, byte_tokenizer
from lorica.data.dataset import Dataset
from lorica.data.encode import CausalEncoder
from lorica.data.findings import SHOWN, Finding
from lorica.data.read import from_rows
from lorica.data.screen import screen_quickly
from lorica.data.screen_thoroughly import screen_thoroughly
from lorica.data.screen_tokens import Sight, lengths_of, screen_tokens
from lorica.data.template import ChatTemplate

TEXT = (  # enough words that two sentences are not alike by chance
    "river stone lantern orchard copper velvet thunder meadow anchor window candle harbour pepper "
    "mountain ribbon saddle feather garden kettle marble shadow timber whistle blanket compass "
    "dragon engine forest glacier hammer island jacket kingdom ladder mirror needle ocean pillow "
    "quarry rocket silver temple umbrella valley wagon yellow zebra basket circle desert"
)
WORDS = TEXT.split()


def sentence(rng: random.Random, number: int = 12) -> str:
    return "the " + " ".join(rng.choice(WORDS) for _ in range(number)) + " was there"


def pairs(number: int = 60, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"prompt": sentence(rng) + "\n", "completion": sentence(rng)} for _ in range(number)]


def classes(number: int = 60, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    found = []
    for i in range(number):
        mood = ("wonderful lovely great", "dreadful ugly bad")[i % 2]
        found.append({"text": f"{sentence(rng, 8)} {mood}", "label": ("good", "poor")[i % 2]})
    return found


def made(rows: list[dict], name: str = "data") -> Dataset:
    return from_rows(rows, name=name)


def everything(train: list[dict], held_out: list[dict] | None = None) -> dict[str, Finding]:
    parts = [made(held_out, "held")] if held_out else []
    data = made(train)
    found = [*screen_quickly(data, parts), *screen_thoroughly(data, parts)]
    return {finding.code: finding for finding in found}


def test_sound_records_raise_no_alarm():
    for rows, held in ((pairs(), pairs(20, seed=1)), (classes(), classes(20, seed=1))):
        found = everything(rows, held)
        assert set(found) <= {"languages"}, found
        assert all(finding.severity == "info" for finding in found.values())


@dataclass
class Planted:
    """A fault: how it is put in, what it must be called, and in which rows (from 1) it lies."""

    code: str
    severity: str
    rows: list[dict]
    lines: list[int]
    held_out: list[dict] = field(default_factory=list)


def _with(rows: list[dict], *changes: tuple[int, dict]) -> list[dict]:
    rows = [dict(row) for row in rows]
    for index, change in changes:
        rows[index].update(change)
    return rows


P, C = pairs(), classes()
REFUSAL = "I am sorry, but as an assistant I cannot do that."
KEY = "sk-" + "a1B2" * 8
FAULTS = [
    Planted("repeated-rows", "warn", _with(P, (7, P[3]), (9, {**P[3]})), [8, 10]),
    Planted(
        "repeated-rows",
        "warn",
        _with(P, (7, {k: f"  {v.upper()} " for k, v in P[3].items()})),
        [8],
    ),
    Planted(
        "near-duplicates",
        "info",
        _with(P, (7, {k: v.replace("the", "a", 1) for k, v in P[3].items()})),
        [8],
    ),
    Planted("few-records", "warn", P[:5], []),
    Planted(
        "stock-answer",
        "warn",
        _with(P, *((i, {"completion": REFUSAL}) for i in range(20))),
        [1, 2, 3, 4, 5],
    ),
    Planted("one-label", "refuse", [{**row, "label": "good"} for row in C], []),
    Planted(
        "label-per-record", "refuse", [{**row, "label": f"id {i}"} for i, row in enumerate(C)], []
    ),
    Planted(
        "scores-as-labels",
        "warn",
        [{**row, "label": f"{i % 21 / 4}"} for i, row in enumerate(C)],
        [],
    ),
    Planted("rare-label", "warn", _with(C, (4, {"label": "odd"})), []),
    Planted(
        "unbalanced-labels", "warn", _with(C, *((i, {"label": "good"}) for i in range(1, 59))), []
    ),
    Planted("contradicting-labels", "warn", _with(C, (6, {"text": C[3]["text"]})), [4]),
    Planted("unseen-label", "warn", C, [2], _with(classes(20, seed=1), (1, {"label": "new"}))),
    Planted("leak", "warn", P, [3], _with(pairs(20, seed=1), (2, {"prompt": P[5]["prompt"]}))),
    Planted("leak", "refuse", P, [1, 2, 3, 4, 5], P[:10]),
    Planted(
        "near-leak",
        "warn",
        P,
        [3],
        _with(pairs(20, seed=1), (2, {"prompt": P[5]["prompt"].replace("was", "is")})),
    ),
    Planted(
        "broken-text", "warn", _with(P, (2, {"completion": "the caf\u00c3\u00a9 was there"})), [3]
    ),
    Planted(
        "broken-text", "warn", _with(P, (2, {"prompt": "it\u00e2\u20ac\u2122s here \ufffd"})), [3]
    ),
    Planted(
        "personal-email",
        "warn",
        _with(P, (5, {"prompt": "write to anna.b@mail.example.org now"})),
        [6],
    ),
    Planted("secret-api_key", "warn", _with(P, (5, {"completion": f"use {KEY} for it"})), [6]),
    Planted("suspected-labels", "warn", _with(classes(200), (30, {"label": "poor"})), [31]),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.code}-{f.severity}")
def test_a_planted_fault_is_named(fault):
    found = everything(fault.rows, fault.held_out)
    assert fault.code in found, sorted(found)
    finding = found[fault.code]
    assert finding.severity == fault.severity
    places = [int(place.split("  ")[0].rpartition(":")[2]) for place in finding.where]
    assert places == fault.lines[:SHOWN]
    assert finding.mend or fault.code == "few-records"


def test_languages_are_told():
    german = "Der Hund lief gestern durch den dunklen Wald und suchte seinen alten Ball."
    rows = _with(
        pairs(40), *((i, {"prompt": german, "completion": german + f" {i}"}) for i in range(20))
    )
    text = everything(rows)["languages"].text
    assert "de 50%" in text and "en" in text


def test_a_key_is_never_shown_whole():
    found = everything(_with(P, (5, {"completion": f"use {KEY} for it"})))
    told = " ".join(place for f in found.values() for place in (f.text, *f.where))
    assert KEY not in told and "35 characters" in told


# --- on tokens ------------------------------------------------------------------------------------


def tokens_of(rows: list[dict], tokenizer=None, **settings) -> dict[str, Finding]:
    data = made(rows)
    tokenizer = tokenizer or byte_tokenizer(adds_bos=True)
    own = {k: settings.pop(k) for k in ("num_positions", "vocabulary") if k in settings}
    encoder = CausalEncoder(tokenizer, **settings)
    encoded, faults = encoder.attempt(data)
    sight = Sight(
        data,
        encoded.examples,
        tokenizer,
        faults,
        max_length=encoder.max_length,
        notes=encoded.notes,
        **own,
    )
    return {finding.code: finding for finding in screen_tokens(sight)}


BYTES = {"wrong-tokenizer"}  # one token per byte is what it warns of


def test_sound_tokens_raise_no_alarm():
    assert set(tokens_of(P)) == BYTES
    assert set(tokens_of([{"text": row["prompt"]} for row in P])) == BYTES


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def test_no_bos_and_two():
    assert tokens_of(P, byte_tokenizer())["no-bos"].severity == "info"
    twice = ChatTemplate.of(byte_tokenizer(adds_bos=True))
    source = "{{ bos_token }}{{ bos_token }}" + CHATML
    twice = ChatTemplate(source, {"bos_token": "<s>"}, twice.control_tokens)
    found = tokens_of([chat("hello", "hi there")] * 3, template=twice)
    assert found["two-bos"].count == 3 and found["two-bos"].severity == "warn"


def test_without_an_end_it_is_refused():
    found = tokens_of(P, add_eos=False)
    assert found["no-end"].severity == "refuse" and found["no-end"].count == len(P)
    assert "was there" in found["no-end"].where[0]


def test_what_the_length_cuts():
    found = tokens_of(P, max_length=24)["cut"]
    assert found.severity == "refuse" and found.count == len(P)
    lengths = sorted(map(len, CausalEncoder(byte_tokenizer(adds_bos=True)).encode(P)))
    few = tokens_of(P, max_length=lengths[-1] - 1)["cut"]
    assert few.severity == "info" and few.count == lengths.count(lengths[-1])
    assert "trained tokens" in few.text


def test_template_that_drops_and_template_that_fails():
    drops = ChatTemplate(
        CHATML.replace("message['content']", "(message['content'] if not loop.first else 'x')"),
        {},
        ("<|im_end|>", "<|im_start|>"),
    )
    found = tokens_of([chat("a question", "an answer")] * 4, template=drops)
    assert "4 records" in found["template-drops"].text
    fails = ChatTemplate("{{ raise_exception('no chats here') }}", {}, ())
    found = tokens_of([chat("a question", "an answer")] * 4, template=fails)
    assert found["template-fails"].severity == "refuse" and found["template-fails"].count == 4
    assert "no chats here" in found["template-fails"].where[0]


def test_nothing_trained_names_the_rows():
    data = Dataset(
        [{"prompt": "a", "completion": ""}, *P[:3]],
        "prompt",
        [("f", i) for i in range(1, 5)],
        "",
        "",
    )
    tokenizer = byte_tokenizer(adds_bos=True)
    encoded, faults = CausalEncoder(tokenizer, add_eos=False).attempt(data)
    found = {f.code: f for f in screen_tokens(Sight(data, encoded.examples, tokenizer, faults))}
    assert found["nothing-trained"].severity == "refuse"
    assert found["nothing-trained"].where == ("f:1: no trained token",)
    assert {e.row for e in encoded} == {1, 2, 3}


def test_positions_vocabulary_and_spelled_tokens():
    found = tokens_of(P, num_positions=64, vocabulary=100)
    assert found["vocabulary"].severity == "refuse"
    assert found["beyond-positions"].count > 50
    spelled = _with(P, (3, {"prompt": "here </s> and there "}))
    assert "1 record" in tokens_of(spelled)["spelled-tokens"].text


def test_few_trained_tokens():
    rows = [{"prompt": row["prompt"] * 40, "completion": " yes"} for row in P]
    assert tokens_of(rows)["few-trained"].severity == "warn"


def test_lengths():
    tokenizer = byte_tokenizer(adds_bos=True)
    rows = [{"text": "a" * n} for n in (1, 5, 9, 100)]
    found = lengths_of(CausalEncoder(tokenizer).encode(rows).examples)
    assert found["percentiles"]["min"] == 3 and found["percentiles"]["max"] == 102
    assert found["percentiles"]["mean"] == pytest.approx((3 + 7 + 11 + 102) / 4, abs=0.06)
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    assert len(edges) == len(counts) + 1 and sum(counts) == 4 and edges[0] == 3
    assert lengths_of([])["histogram"]["counts"] == []
