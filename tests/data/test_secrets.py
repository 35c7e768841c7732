"""What has the form of a secret is found, what only looks like it is not, and nothing is shown."""

import json

import pytest

from lorica.data.secrets import KINDS, find, hint_of, iban, luhn, redacted

FOUND = {
    "email": ["mail anna.b+x@mail.example.org.", "<joe@a-b.io>", "JOE_1@EXAMPLE.COM"],
    "card": ["4111 1111 1111 1111", "pay 5500-0000-0000-0004 now", "378282246310005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "phone": ["+49 30 1234567", "call (415) 555-2671", "415-555-2671", "+1-415-555-2671"],
    "ssn": ["078-05-1120"],
    "ip_address": ["from 8.8.8.8 at noon", "host 93.184.216.34:80"],
    "api_key": [
        "sk-" + "aB3" * 10,
        "ghp_" + "a1" * 18,
        "hf_" + "Qx" * 17,
        "AKIA" + "Z7" * 8,
        "AIza" + "d" * 35,
        "xoxb-1234567890-abcdef",
    ],
    "private_key": ["-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----"],
    "web_token": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w"],
    "password": ['password = "hunter22"', "postgres://joe:s3cret@db/x", "api_key: 'abcdefgh'"],
}
NOT = [
    "4111 1111 1111 1112",  # fails Luhn
    "0000 0000 0000 0000",
    "DE88 3704 0044 0532 0130 00",  # fails modulo 97
    "version 1.2.3.4.5, and 10.0.0.1, 192.168.1.1, 127.0.0.1, 999.1.1.1",
    "in 1998-2004 there were 12,345,678 people; pi is 3.14159265358979",
    "meet at @home, a @ b, joe@localhost",
    "order 2023-05-11 14:30, ISBN 978-3-16-148410-0",
    "sk-short, the password is known, token: none",
    "name[The Vaults], priceRange[more than £30], customer rating[5 out of 5]",
    "x = 0x7fffffffffffffff; y = 123456789012345678901234567890",
    "",
]


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in FOUND.items() for t in texts])
def test_found(kind, text):
    assert [found.kind for found in find(text)] == [kind]


@pytest.mark.parametrize("text", NOT)
def test_not_found(text):
    assert [(f.kind, text[f.start : f.end]) for f in find(text)] == []


def test_every_kind_has_an_example():
    assert set(FOUND) == set(KINDS)


def test_several_in_one_text_from_left_to_right_and_redacted():
    text = "joe@example.org pays 4111111111111111 from 8.8.8.8."
    assert [found.kind for found in find(text)] == ["email", "card", "ip_address"]
    assert redacted(text) == ("[EMAIL] pays [CARD] from [IP_ADDRESS].", 3)
    assert redacted("nothing here") == ("nothing here", 0)
    assert redacted(redacted(text)[0])[1] == 0


def test_a_hint_is_no_secret():
    for texts in FOUND.values():
        for text in texts:
            (found,) = find(text)
            piece = text[found.start : found.end]
            shown = hint_of(text, found).split("…")[0]
            assert len(shown) <= 4 and len(shown) <= len(piece) // 4


def test_checksums():
    assert luhn("4111111111111111") and not luhn("1111111111111111") and not luhn("42")
    assert iban("GB82 WEST 1234 5698 7654 32") and not iban("GB82 WEST 1234 5698 7654 33")


@pytest.mark.parametrize(
    "text",
    ["1" * 50_000, "a@" * 20_000, "+1 " * 20_000, "A" * 60_000, "1.1." * 20_000, "12 " * 30_000],
)
def test_no_text_takes_long(text):
    import time

    start = time.process_time()
    list(find(text))
    assert time.process_time() - start < 3


def test_marked_sentences(shared_data):
    """100 sentences with marked personal data: every one that has a form is found, no other."""
    forms = {"PHONE_NUMBER", "CREDIT_CARD", "IP_ADDRESS", "EMAIL_ADDRESS", "US_SSN", "IBAN_CODE"}
    rows = json.loads((shared_data / "pii_presidio/generated_small.json").read_text("utf-8"))
    missed, invented, number = [], [], 0
    for row in rows:
        found = list(find(row["full_text"]))
        spans = [(s["start_position"], s["end_position"], s) for s in row["spans"]]
        hit = [any(f.start < end and start < f.end for f in found) for start, end, _ in spans]
        wanted = [s["entity_type"] in forms for _, _, s in spans]
        number += sum(wanted)
        missed += [s for h, w, (*_, s) in zip(hit, wanted, spans, strict=True) if w and not h]
        invented += [
            f for f in found if not any(f.start < end and start < f.end for start, end, _ in spans)
        ]
    assert number == 27 and not missed and not invented
