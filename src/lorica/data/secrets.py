"""Secrets and personal data in texts: found by form, checked by checksum where there is one.

This finds what has a form: addresses, numbers, keys. It does not find names of people, and it is no
guarantee. Nothing that was found is ever shown whole.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Found(NamedTuple):
    """A piece of a text; `kind` is a key of `KINDS`."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Kind:
    """A kind of secret.

    Attributes:
        words: what it is called.
        pattern: its form.
        secret: whether it opens something; the others are personal data.
        holds: a further test of a match, such as a checksum, given also the text around it.
    """

    words: str
    pattern: str
    secret: bool = False
    holds: Callable[[str, str], bool] = lambda piece, around: True


def luhn(number: str) -> bool:
    """The checksum of payment cards (ISO/IEC 7812-1)."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) if i % 2 else d for i, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def iban(text: str) -> bool:
    """The checksum of bank accounts (ISO 13616: modulo 97)."""
    compact = re.sub(r"\s", "", text)
    turned = compact[4:] + compact[:4]
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _public(text: str, _: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


_STRICT_PHONE = re.compile(
    r"(?:\+|00)[1-9].*|\(\d{2,5}\) ?\d{3,4}[ .-]?\d{3,4}.*"
    r"|\d{3}-\d{3}-\d{4}.*|\d{3}\.\d{3}\.\d{4}.*"
)
_OF_PHONES = re.compile(r"(?i)\b(?:call|phone|tel|fax|mobile|cell|desk|office|dial|text me|ring)")
_NO_PHONE = re.compile(r"\d{4}[ .-]\d{2}[ .-]\d{2}|97[89][ -].*|(?:\d{1,3}\.){3}\d{1,3}")


def _phone(text: str, around: str) -> bool:
    """Digits in a form that only phone numbers have, or in groups near a word of phones. Dates,
    ISBNs and network addresses are in groups too.
    """
    number = text.partition("x")[0].strip()
    digits = sum(c.isdigit() for c in number)
    if not 8 <= digits <= 15 or _NO_PHONE.fullmatch(number):
        return False
    grouped = len(re.findall(r"\d+", number)) > 2
    return bool(_STRICT_PHONE.fullmatch(text) or (grouped and _OF_PHONES.search(around)))


AROUND = 40
"""Characters before and behind a match that may say what it is."""
_NOT_IN_NUMBER = r"(?<![\w.+-])"
_CARD = (
    _NOT_IN_NUMBER + r"(?=[2-6])(?:\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{1,4}(?:[ -]\d{1,3})?"
    r"|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{13,19})(?![\w-])"
)
_PHONE = (
    _NOT_IN_NUMBER
    + r"(?<!\d[ .-])(?:\+|00)?\(?\d{1,5}\)?(?:[ .-]?\(?\d{2,5}\)?){1,5}(?: ?x\d{2,6})?(?![\w-])"
)
KINDS = {
    "private_key": Kind("private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----", True),
    "api_key": Kind(
        "API key or token",
        r"\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}"
        r"|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}"
        r"|xox[abprs]-[A-Za-z0-9-]{10,}|glpat-[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{36}"
        r"|pypi-[A-Za-z0-9_-]{40,}|[sr]k_live_[A-Za-z0-9]{20,})(?![A-Za-z0-9])",
        True,
    ),
    "web_token": Kind(
        "JSON web token",
        r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
        True,
    ),
    "password": Kind(
        "password",
        r"\b(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?token)\b[\"']?\s{0,3}[:=]\s{0,3}"
        r"[\"'][^\s\"']{6,80}[\"']|\b[a-z][a-z0-9+.-]{1,15}://[^\s/:@]{1,60}:[^\s/:@]{3,60}@",
        True,
    ),
    "email": Kind(
        "e-mail address",
        r"\b[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)"
        r"{1,8}[A-Za-z]{2,24}\b",
    ),
    "iban": Kind(
        "bank account",
        r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b",
        holds=lambda piece, _: iban(piece),
    ),
    "card": Kind("payment card", _CARD, holds=lambda piece, _: luhn(piece)),
    "ssn": Kind(
        "US social security number",
        _NOT_IN_NUMBER + r"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])",
    ),
    "ip_address": Kind(
        "public IP address", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", holds=_public
    ),
    "phone": Kind("phone number", _PHONE, holds=_phone),
}
"""In the order of precedence: what belongs to an earlier kind is not told as a later one."""

_ANY = re.compile("|".join(f"(?P<{name}>{kind.pattern})" for name, kind in KINDS.items()))
# every form has one of these; most texts have none, and are done with after one quick search
_HINT = re.compile(
    r"@|\d[\d .()-]{5}|eyJ|PRIVATE KEY|[_-][A-Za-z0-9]{9}|://|[Pp]ass|pwd|[Ss]ecret|[Kk]ey"
    r"|[Tt]oken|AKIA|ASIA|AIza|\d\.\d"
)


def find(text: str) -> Iterator[Found]:
    """Everything in a text that has the form of a secret, from left to right, without overlap."""
    if not _HINT.search(text):
        return
    position = 0
    while match := _ANY.search(text, position):
        name = match.lastgroup or ""
        around = text[max(0, match.start() - AROUND) : match.end() + AROUND]
        if KINDS[name].holds(match.group(), around):
            yield Found(name, match.start(), match.end())
            position = match.end()
        else:
            position = match.start() + 1


def hidden(text: str) -> str:
    """The text without what opens something (keys, tokens, passwords), for all that is shown or
    kept of records. Personal data stays: a sample without names would show nothing.
    """
    if not _HINT.search(text):
        return text
    parts, position = [], 0
    for kind, start, end in find(text):
        if KINDS[kind].secret and start >= position:
            parts += [text[position:start], f"[{kind.upper()}]"]
            position = _end_of_key(text, end) if kind == "private_key" else end
    return "".join([*parts, text[position:]])


def _end_of_key(text: str, start: int) -> int:
    """Where a private key ends whose first line ends at `start`: the form is only that line."""
    closing = text.find("-----END", start)
    end = text.find("-----", closing + 8) if closing >= 0 else -1
    return len(text) if end < 0 else end + 5


def redacted(text: str) -> tuple[str, int]:
    """The text with every find replaced by [KIND], and how many there were."""
    parts, position, number = [], 0, 0
    for kind, start, end in find(text):
        parts += [text[position:start], f"[{kind.upper()}]"]
        position, number = end, number + 1
    return "".join([*parts, text[position:]]), number


def hint_of(text: str, found: Found) -> str:
    """Enough of a find to know it again, never the whole: its first letters and its length."""
    piece = text[found.start : found.end]
    return f"{piece[: min(4, len(piece) // 4)]}… ({len(piece)} characters)"
