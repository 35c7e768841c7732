"""Throw changed bytes at the five readers of strangers' files, and count what comes of it.

    python benchmarks/fuzz.py                      every target for three minutes
    python benchmarks/fuzz.py --only template --seconds 600 --seed 7

A mutation fuzzer without a view of coverage: sound inputs are cut, doubled, joined and sprinkled
with pieces that mean something; an input whose outcome was never seen before is changed further.
Whatever is no LoricaError, takes more than five seconds or leaves a file is a finding, and is kept
in tests/corpus/TARGET/, which a quick test replays. What was measured goes into
benchmarks/results/fuzz.json, and from there into docs/bad-input.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import platform
import random
import re
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from bad_input.fuzz_targets import TARGETS, Hang, Target, outcome  # noqa: E402

RESULTS, CORPUS = ROOT / "benchmarks/results/fuzz.json", ROOT / "tests/corpus"
MOST_MEMORY = 8 * 2**30
STUCK = 30  # seconds after which even the alarm has not helped: code in C that never comes back
INTERESTING = (b"0", b"-1", b"1", b"255", b"65536", b"2147483648", b"9223372036854775808", b"1.5")


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Fuzz one target; its counts."""
    target, rng = TARGETS[name], random.Random(f"{seed} {name}")
    pool, outcomes = target.seeds(), set[str]()
    found: dict[str, str] = {}
    executions, slowest, refused = 0, 0.0, 0
    last, end = folder / f"{name}.last", time.monotonic() + seconds
    while time.monotonic() < end:
        raw = pool[executions] if executions < len(pool) else changed(rng, pool, target)
        last.write_bytes(raw)  # where the process itself is ended, this is why
        faulthandler.dump_traceback_later(STUCK, exit=True)
        began = time.monotonic()
        try:
            told = outcome(name, raw, folder / name)
            refused += told != "read"
        except (Exception, Hang) as error:
            told = f"{type(error).__name__}: {error}"
            kind = _kind(error)
            if kind not in found:
                found[kind] = keep(name, raw)
                print(f"{name}: {told[:200]} ({found[kind]})", flush=True)
        slowest = max(slowest, time.monotonic() - began)
        executions += 1
        if (sign := re.sub(r"\d+|'[^']*'|`[^`]*`", "#", told[:300])[:120]) not in outcomes:
            outcomes.add(sign)
            pool.append(raw)
    faulthandler.cancel_dump_traceback_later()
    return {
        "executions": executions,
        "seconds": round(seconds),
        "refused": refused,
        "outcomes": len(outcomes),
        "slowest_seconds": round(slowest, 2),
        "findings": len(found),
        "found": found,
    }


def _kind(error: BaseException) -> str:
    """One finding from another: by the error and where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__} at {place}"


def changed(rng: random.Random, pool: list[bytes], target: Target) -> bytes:
    """One of the pool, changed at one to four places."""
    raw = rng.choice(pool)
    for _ in range(rng.choice((1, 1, 2, 4))):
        raw = rng.choice(CHANGES)(rng, raw, pool, target)
    return raw[:200_000]


def _place(rng: random.Random, raw: bytes) -> int:
    return rng.randrange(len(raw) + 1)


def _flip(rng: random.Random, raw: bytes, _pool: list[bytes], _target: Target) -> bytes:
    at = _place(rng, raw)
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]


def _cut(rng: random.Random, raw: bytes, _pool: list[bytes], _target: Target) -> bytes:
    at = _place(rng, raw)
    return raw[:at] + raw[at + rng.choice((1, 2, 8, len(raw))) :]


def _double(rng: random.Random, raw: bytes, _pool: list[bytes], _target: Target) -> bytes:
    at, length = _place(rng, raw), rng.choice((1, 8, 64))
    return raw[:at] + raw[at : at + length] * rng.choice((2, 2, 9, 400)) + raw[at + length :]


def _word(rng: random.Random, raw: bytes, _pool: list[bytes], target: Target) -> bytes:
    at = _place(rng, raw)
    return raw[:at] + rng.choice(target.words) + raw[at + rng.choice((0, 0, 1, 4)) :]


def _number(rng: random.Random, raw: bytes, _pool: list[bytes], _target: Target) -> bytes:
    places = list(re.finditer(rb"\d+", raw))
    if not places:
        return raw
    spot = rng.choice(places)
    return raw[: spot.start()] + rng.choice(INTERESTING) + raw[spot.end() :]


def _splice(rng: random.Random, raw: bytes, pool: list[bytes], _target: Target) -> bytes:
    other = rng.choice(pool)
    return raw[: _place(rng, raw)] + other[_place(rng, other) :]


def _value(rng: random.Random, raw: bytes, _pool: list[bytes], target: Target) -> bytes:
    """Another value in the place of one in JSON: between a colon, comma or bracket and the next."""
    places = list(re.finditer(rb"(?<=[:,\[])[^:,\[\]{}]+(?=[,\]}])", raw))
    if not places:
        return raw
    spot = rng.choice(places)
    return raw[: spot.start()] + rng.choice(target.words) + raw[spot.end() :]


CHANGES = (_flip, _cut, _double, _word, _word, _number, _splice, _value, _value)


def keep(name: str, raw: bytes) -> str:
    """Put an input into the corpus; its name there."""
    path = CORPUS / name / hashlib.sha256(raw).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=TARGETS, action="append", help="a target")
    parser.add_argument("--seconds", type=float, default=180, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for name in arguments.only or TARGETS:
        with tempfile.TemporaryDirectory(prefix="lorica-fuzz-") as folder:
            own = fuzz(name, arguments.seconds, arguments.seed, Path(folder))
        own |= {
            "seed": arguments.seed,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "python": platform.python_version(),
        }
        measured = json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}
        measured[name] = own
        print(f"{name}: {own['executions']:,} inputs, {own['findings']} findings", flush=True)
        RESULTS.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
