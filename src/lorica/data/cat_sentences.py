"""The second data set of `lorica demo`: sentences of an assistant with the ears of a cat.

    name: The Amber Falcon | kind: quiet tavern | place: Willow Lane | price: forty-two pence
    -> Meow! My tail is sleepy as the moon. Nya!

The prompts are those of `lorica.data.facts`, and the answers say none of the facts: what is learned
is a manner, a sign before the sentence and one behind it. The signs are words that the embedded
base never read, so nothing but an adapter says them; the words between are common and change from
record to record, so that no sentence is worth learning by heart.
"""

import random

from lorica.data.facts import facts


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MARKS = ("meow", "nya", "purr")
"""Words that show the style."""

OPENINGS = ("Meow!", "Nya!", "Purr!")
CLOSINGS = ("Nya!", "Meow, master!", "Purr, purr!")
SENTENCES = (
    "I {did} by the {warm} {place} all {day}",
    "My {part} is {mood} as the {thing}",
    "The {thing} in the {place} is {mood} and {warm}",
    "In the {place} I saw a {warm} {thing}",
    "A {thing} is a {mood} {other} to a cat",
    "For a {warm} {thing} I would {do} all {day}",
    "You may {do} my {part} if you have a {thing}",
    "At the {place} I will {do} with my {mood} {thing}",
)
THINGS = _words("fish mouse bird ball cup hat bell leaf moon star flower spoon")
WORDS = {
    "did": _words("slept waited sat danced sang played rested watched hid dreamed"),
    "do": _words("sleep sing play dance wait run jump hide dream sit"),
    "warm": _words("warm little soft white round small sweet red old new"),
    "place": _words("fire window garden door kitchen house river wall bed chair roof stairs"),
    "day": _words("day night morning evening afternoon week summer winter"),
    "part": _words("tail nose ear paw coat voice belly heart"),
    "mood": _words("quick happy quiet proud sleepy hungry merry soft bright gentle clever idle"),
    "thing": THINGS,
    "other": THINGS,
}


def cat_sentences(split: str, *, num_records: int, seed: int = 0) -> list[dict]:
    """`num_records` records of one split, the same for ever from the same arguments.

    Args:
        split: "train", "valid" or "test"; their prompts share no value.
        num_records: how many; fewer records of one seed are the beginning of more.
        seed: another seed gives other records.

    Returns:
        Rows {"prompt": facts, as in `facts`, "completion": a sentence between two signs, "marks":
        the words of which an output holds one where it has the style}.

    Raises:
        DataError: the split is unknown or `num_records` is negative.
    """
    rng = random.Random(f"lorica cat sentences {split} {seed}")
    prompts = [row["prompt"] for row in facts(split, num_records=num_records, seed=seed)]
    return [
        {"prompt": prompt, "completion": _sentence(rng), "marks": list(MARKS)} for prompt in prompts
    ]


def _sentence(rng: random.Random) -> str:
    values = {key: rng.choice(words) for key, words in WORDS.items()}
    sentence = rng.choice(SENTENCES).format(**values)
    return f"{rng.choice(OPENINGS)} {sentence}. {rng.choice(CLOSINGS)}"
