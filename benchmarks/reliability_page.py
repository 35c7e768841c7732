"""docs/reliability.md from the figures of benchmarks/results/reliability.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs/reliability.md"

Figures = Mapping[str, Any]

HEAD = """# What happens when something goes wrong

A run of Lorica survives the loss of its process, its disk, its memory and its terminal: the same
command line, given again, goes on to the same bits. This page says what was tried, how often, and
what came of it. Every figure comes from one command, `python benchmarks/reliability.py`, which
anyone can run again (`--only PART` for a part); this page is written by it from
`benchmarks/results/reliability.json`.

    lorica train run.yaml --output-dir runs/x --resume runs/x

begins the run in `runs/x`, goes on with it where it was stopped, and says so where it is finished:
a line for a job scheduler that starts it again and again.
"""

# fault -> what happens -> tests that hold it (file: words of their names)
ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("F-01", "kill -9 at any moment", "the same command goes on; nothing older than a save "
     "interval is lost; the same adapter to the bit", "test_killing.py"),
    ("F-02", "kill -9, EIO or ENOSPC at any call of a save", "the previous checkpoint or the new "
     "one, never a mix", "test_injection.py"),
    ("F-03", "loss of power", "as F-02; and what was said to be saved is saved",
     "test_powerloss.py"),
    ("F-04", "a fault while recovering from a fault", "recovered the next time; nothing good is "
     "removed", "test_injection.py"),
    ("F-05", "full disk", "exit 1 with path, bytes needed and bytes free; earlier checkpoints "
     "stay; a warning at the start where it will not do", "test_disk.py: full_disk, cannot_grow, "
     "message_has_numbers, too_little_space"),
    ("F-06", "metrics cannot be written", "training goes on, one warning for each file",
     "test_disk.py: rows_that_cannot"),
    ("F-07", "read-only output", "exit 2 before anything is loaded", "test_disk.py: "
     "may_not_be_written, read_only"),
    ("F-08", "damaged checkpoint", "found by its hash, set aside, the older one used; a list "
     "where none is left", "test_disk.py: every_damage, no_damage"),
    ("F-09", "checkpoint of another version", "refused, and left as it is", "test_disk.py: "
     "other_schemas"),
    ("F-10", "NaN or infinity in the loss", "stops before the optimizer step, names the records "
     "by file and line; the last good state is kept", "test_numbers.py: not_finite, "
     "records_are_named"),
    ("F-11", "NaN or infinity in a gradient", "as F-10", "test_numbers.py: not_finite"),
    ("F-12", "nothing to learn in a record", "refused before training; a long prompt is cut so "
     "that labels remain", "test_numbers.py: prompt_at_the_limit"),
    ("F-13", "out of memory, torch", "exit 1 with what to lower, from what to what; the last "
     "checkpoint stands", "test_numbers.py: advice, real_allocation, levers"),
    ("F-14", "out of memory, system", "no hang, nothing torn; goes on with memory",
     "test_numbers.py: capped_memory"),
    ("F-15", "smaller batches for want of memory", "never by itself; advised so that each step "
     "keeps its records, and told in the checkpoint", "test_numbers.py: advice_keeps, "
     "losses_are_the_same"),
    ("F-16", "SIGINT, SIGTERM, SIGHUP", "the first saves and exits with 128 + n, the second at "
     "once; in every phase the same command goes on", "test_interrupts.py"),
    ("F-17", "readers of the output go away", "the run goes on", "test_surroundings.py: "
     "readers_that"),
    ("F-18", "resumed with other batches", "refused with the difference, unless each step keeps "
     "its records; then each is seen once per epoch", "test_changes.py: smaller_batches"),
    ("F-19", "resumed with other threads or versions", "goes on, and says that the last bits "
     "will differ", "test_changes.py: other_threads"),
    ("F-20", "resumed with other settings", "each setting is cosmetic, told, or refused",
     "test_changes.py: every_setting"),
    ("F-21", "two processes, one run folder", "the second is refused in under a second, with the "
     "number of the first", "test_surroundings.py: starters, second_process"),
    ("F-22", "base changed", "refused; moved but unchanged: goes on", "test_changes.py: "
     "another_base"),
    ("F-23", "records changed", "refused with the kind of change; other name, time or line ends: "
     "goes on", "test_changes.py: other_records"),
    ("F-24", "clock jumps, file times wrong", "nothing depends on them", "test_surroundings.py: "
     "file_times, clock"),
    ("F-25", "stopped and continued, laptop sleeps", "the same adapter", "test_surroundings.py: "
     "sleeps"),
    ("F-26", "few open files, umask, locale, strange paths", "works", "test_surroundings.py: "
     "surroundings, longest_names"),
    ("F-27", "base not downloaded whole", "refused before training (the download itself is "
     "huggingface_hub's, which resumes it)", "test_surroundings.py: downloaded_whole"),
    ("F-28", "a data loader's process dies", "there are none", "test_surroundings.py: "
     "loader_processes"),
    ("F-29", "file of the base overwritten while in use", "no SIGBUS, the same adapter",
     "test_surroundings.py: overwritten"),
    ("F-30", "a crash while an adapter or a merged model is written", "the old or the new one, "
     "whole", "test_injection.py"),
)  # fmt: skip


def page() -> str:
    """The text of docs/reliability.md, from the figures that there are."""
    file = RESULTS / "reliability.json"
    return text_of(json.loads(file.read_bytes()) if file.exists() else {})


def _machine(own: Figures) -> str:
    """What the figures depend on, in words."""
    system = str(own.get("system", "")).split("-")[0]
    return (
        f"torch {own.get('torch')}, Python {own.get('python')}, {system}, "
        f"{own.get('processors')} processors"
    )


def text_of(figures: Figures) -> str:
    """The page with these figures; parts that were not measured are left out."""
    measured = [part for part in SECTIONS if part in figures]
    more = sorted(part for part in figures if part not in SECTIONS)
    lines = [HEAD, "## Measured", ""]
    lines += ["| what was tried | cases | violations | beside |", "|---|---|---|---|"]
    lines += [line for part in measured for line in SECTIONS[part](figures[part])]
    lines.append("")
    if measured:
        own = figures[measured[0]]
        machine = _machine(own.get("machine", {}))
        lines += [f"Measured on {own.get('date')}: {machine}.",
                  ""]  # fmt: skip
    for part in more:
        lines += [f"### {part.capitalize()}", "", *_generic(figures[part]), ""]
    lines += ["## Thirty faults of training, and the tests that hold what happens", ""]
    lines += ["| | fault | what happens | held by, in tests/faults |", "|---|---|---|---|"]
    lines += [f"| {key} | {fault} | {then} | {test} |" for key, fault, then, test in ROWS]
    lines += ["", *LIMITS]
    return "\n".join(lines) + "\n"


LIMITS = """## What is not promised

- The same bits after a change of torch, of the number of threads or of the machine: the run goes on
  and says so.
- A periodic checkpoint that cannot be written ends the run (exit 1) instead of training on without
  one: earlier checkpoints stand, and the same command goes on when there is space.
- Where the system cannot exchange two names in one step (anything but Linux, some network file
  systems), replacing an adapter or a merged model has an instant without either; the old one is
  then beside it as `.old-...`.
- Files that other libraries write (tokenizer, merged weights) are synced and renamed by Lorica, but
  single bytes of them cannot be made to fail one by one: faults were put between their calls.
""".splitlines()


def _row(name: str, cases: Any, violations: Any, beside: str = "") -> str:
    cases = f"{cases:,}" if isinstance(cases, int) else cases
    return f"| {name} | {cases} | {violations} | {beside} |"


def _counted(name: str, own: Figures, beside: str = "") -> str:
    if "not run" in own:
        return _row(name, 0, "", f"not run: {own['not run']}")
    return _row(name, own["cases"], own["violations"], beside)


def _kills(own: Figures) -> list[str]:
    runs = own["runs"]
    wrong = len(runs["faults"])
    beside = (
        f"{runs['kills']} kills; {runs['same_adapter']}/{runs['trials']} adapters and "
        f"{runs['same_rows']}/{runs['trials']} metrics equal to those of an undisturbed run; "
        f"{runs['torn']} torn, {runs['manual_steps']} manual steps, at most "
        f"{runs['most_steps_lost']} steps lost with a save every {runs['save_steps']}"
    )
    dense, naive = own["dense"], own["dense, naive writer"]
    return [
        _row("runs killed at random, started again until done (F-01)", runs["trials"], wrong,
             beside),
        _row("runs that save every step, killed", dense["kills"], dense["torn"],
             "newest checkpoint torn"),
        _row("the same, with a writer that writes straight into the folder (control)",
             naive["kills"], "", f"{naive['torn']} torn ({naive['share']:.0%})"),
    ]  # fmt: skip


def _operations(name: str, own: Figures) -> list[str]:
    lines = [_row(name, own["cases"], own["violations"])]
    for operation, found in own["by operation"].items():
        beside = f"{found['calls']} calls that change the disk"
        lines.append(_row(f"&emsp;{operation}", found["cases"], found["violations"], beside))
    return lines


def _power(own: Figures) -> list[str]:
    lines = [_row("states of a disk after a loss of power (F-03)", own["states"],
                  own["violations"])]  # fmt: skip
    for name, found in own["by operation"].items():
        beside = (
            f"{found['calls']} calls; control: of {found['fsyncs']} fsyncs, removing one is "
            f"noticed for {found['fsyncs whose removal is noticed']} (the others are doubled)"
        )
        lines.append(_row(f"&emsp;{name}", found["states"], found["violations"], beside))
    return lines


def _space(own: Figures) -> list[str]:
    disks = own["disks"]
    failed = disks.get("runs that failed for lack of space")
    return [
        _counted("disks of rising size, then one with space (F-05)", disks,
                 f"{failed} runs failed and went on" if failed is not None else ""),
        _counted("limits on the length of files, then none", own["file size limits"]),
    ]  # fmt: skip


def _memory(own: Figures) -> list[str]:
    caps, allocations = own["caps"], own["allocations"]
    return [
        _counted("operations of a step that find no memory (F-13)", allocations),
        _counted("caps on the address space (F-14)", caps, "no hang over 30 s, nothing torn"),
    ]


def _interrupts(own: Figures) -> list[str]:
    random = own["at random"]
    median = random.get("median seconds from signal to end")
    return [
        _counted("SIGINT, SIGTERM, SIGHUP in each of 13 phases (F-16)", own["by phase"]),
        _counted("two signals at once in each phase", own["twice"]),
        _counted("signals at random moments", random, f"median {median} s until the end"),
    ]


def _others(own: Figures) -> list[str]:
    sleeps = own["stopped and continued"]
    return [
        _counted("rounds of four starters in one folder (F-21)", own["four starters"],
                 "exactly one winner"),
        _counted("a run stopped and continued (F-25)", sleeps, f"{sleeps['cycles']} times"),
        _counted("base overwritten while a run trains on it (F-29)", own["base overwritten"]),
    ]  # fmt: skip


SECTIONS = {
    "kills": _kills,
    "injections": lambda own: _operations(
        "every call x kill, EIO and ENOSPC, once and for good (F-02, F-30)", own
    ),
    "stacked": lambda own: _operations("five crashes in a row at every call (F-04)", own),
    "power": _power,
    "space": _space,
    "damage": lambda own: [
        _counted("every file of three checkpoints, damaged in seven ways (F-08)", own)
    ],
    "numbers": lambda own: [
        _counted("NaN and infinity in base, labels, gradient, learning rate (F-10, F-11)", own,
                 f"{own['runs stopped']} runs stopped, no tensor on the disk that is not finite")
    ],
    "memory": _memory,
    "interrupts": _interrupts,
    "others": _others,
}  # fmt: skip
"""Part of the figures -> its rows. Parts that are not here get a list of their own."""


def _generic(own: Any) -> list[str]:
    """A part that somebody else measured: its plain figures, one a line."""
    if not isinstance(own, Mapping):
        return [f"- {own}"]
    return [
        f"- {key}: {', '.join(f'{k} {v}' for k, v in value.items())}"
        if isinstance(value, Mapping)
        else f"- {key}: {value}"
        for key, value in own.items()
        if key not in ("machine", "date")
    ]
