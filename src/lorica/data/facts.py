"""The data set of `lorica demo`: facts about eating houses that never were -> one English sentence.

    name: The Amber Falcon | kind: tavern | place: Willow Lane | price: six shillings
    -> The Amber Falcon is a tavern in Willow Lane, where a dinner costs six shillings.

Every word list is dealt out to the splits once and for all: of five words three go to training, one
to validation and one to the test. No name, kind, place, keeper, dish or coin of one split occurs in
another, so a model can only be right about a test record by reading it. What is learned is to copy
the values into a sentence, not the values.
"""

import random
from functools import cache

from lorica.errors import DataError, nearest

# a word's place in its list, modulo 5 -> its split
SPLITS = {"train": (0, 1, 2), "valid": (3,), "test": (4,)}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words(
    """
    Amber Crimson Silver Golden Scarlet Copper Ivory Purple Black White Green Blue Brown Grey Merry
    Silent Jolly Lonely Weary Hungry Sleepy Dancing Laughing Singing Wandering Painted Broken
    Crooked Little Noble Humble Gentle Gallant Honest Lucky Faithful Proud Clever Drowsy Frozen
    Burning Flying Running Leaping Hidden Ancient Rusty Velvet Marble Gilded Twisted Wooden Stony
    Frosty Sunny Stormy Speckled Striped Tattered Polished
    """
)
EMBLEMS = _words(
    """
    Falcon Lantern Anchor Dragon Raven Thistle Badger Otter Heron Sparrow Swan Stag Lion Bear Wolf
    Fox Hare Hound Horse Pheasant Kettle Barrel Candle Hammer Anvil Plough Wheel Bell Crown Sceptre
    Shield Dagger Arrow Ship Sail Compass Mermaid Sailor Miller Shepherd Weaver Baker Tinker Soldier
    Monk Bishop Maiden Giant Star Moon Comet Rainbow Thunder Acorn Oak Rose Lily Tulip Poppy Ivy
    Apple Cherry Plum Walnut Goose Rooster Pigeon Owl Trumpet Fiddle Drum Harp Mirror Basket Button
    Slipper Feather Pearl Garnet Spindle
    """
)
KINDS = _words(
    """
    tavern bakery alehouse roadhouse chophouse teahouse dairy brewery cookshop pie-shop oyster-house
    coffee-room restaurant cellar supper-club buffet refectory canteen creamery public-house grill
    smokehouse eating-house wine-shop lunch-room distillery pantry confectionery hostel cake-shop
    milk-bar fish-house soup-kitchen hotel cider-press beer-garden dining-hall sweet-shop taproom
    cafe
    """
)
STREETS = _words(
    """
    Willow Mill Orchard Chapel Abbey Castle Market Bridge River Harbour Garden Meadow Forest Church
    Tower Station Temple College Priory Cloister Fountain Quarry Barley Clover Hazel Maple Cedar
    Laurel Juniper Bramble Heather Lavender Primrose Saffron Pepper Ginger Butcher Cooper Potter
    Tanner Fisher Hunter Glover Carpenter Mason Saddler Nightingale Swallow Cuckoo Magpie Partridge
    Salmon Herring Beaver Squirrel Hedgehog Winter Summer Autumn Midnight
    """
)
WAYS = _words(
    """
    Lane Street Road Row Square Court Yard Close Gardens Alley
    """
)
FIRST_NAMES = _words(
    """
    Margaret Edward Harriet Walter Beatrice Gilbert Constance Oliver Matilda Herbert Florence Arthur
    Isabella Leonard Josephine Frederick Cecilia Augustus Dorothea Bernard Eleanor Clement Rosamund
    Edmund Lavinia Francis Georgiana Hugh Henrietta Jasper Katharine Lawrence Marianne Nathaniel
    Octavia Percival Philippa Quentin Rebecca Roderick Sophia Stephen Theresa Thomas Ursula
    Valentine Victoria Vincent Winifred Wilfred Adelaide Ambrose Blanche Cuthbert Charlotte Dominic
    Emmeline Ernest Flora Godfrey
    """
)
LAST_NAMES = _words(
    """
    Holloway Pemberton Ashworth Blackwood Carmichael Davenport Ellsworth Fairfax Greenwood
    Hargreaves Ingleby Jarvis Kingsley Langford Merriweather Netherby Oakley Pickering Quill
    Radcliffe Shackleton Thornton Underhill Vickers Whitaker Yardley Applegate Bellamy Crawford
    Dunstable Everett Finchley Goodfellow Hathaway Ironside Jessop Kettering Lockwood Marlowe
    Norwood Ormond Prescott Quincy Rutherford Stanhope Tredwell Upton Vaughan Wetherby Winslow
    Aldridge Birchall Cobbett Drummond Eastwick Forsyth Garrick Hawthorne Irving Kendall
    """
)
WAYS_TO_COOK = _words(
    """
    smoked spiced roasted pickled buttered candied stewed grilled salted toasted sugared peppered
    braised boiled fried baked glazed stuffed steamed minced curried jellied poached dried potted
    crumbed chilled honeyed mashed sliced
    """
)
DISHES = _words(
    """
    trout ham mutton pears turnips lobster venison apricots mushrooms chestnuts salmon bacon onions
    cabbage almonds beef chicken parsnips raspberries potatoes eels sausages carrots figs walnuts
    crab turkey beans peaches duck haddock veal peas plums leeks shrimps rabbit beetroot cherries
    dumplings
    """
)
NUMBERS = _words(
    """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    """
)
COINS = _words(
    """
    shillings pence crowns florins ducats guineas farthings pounds groats sovereigns pennies thalers
    nobles dollars doubloons
    """
)

TEMPLATES = {  # the fields of a record -> the sentences that say them
    ("name", "kind", "place", "price"): (
        "{name} is {a} {kind} in {place}, where a dinner costs {price}.",
        "A dinner at {name}, {a} {kind} in {place}, costs {price}.",
        "For {price} you can dine at {name}, {a} {kind} in {place}.",
    ),
    ("name", "kind", "place", "keeper"): (
        "{name} is {a} {kind} in {place}, and it belongs to {keeper}.",
        "{keeper} is the keeper of {name}, {a} {kind} in {place}.",
        "In {place} there is {a} {kind} called {name}, which is kept by {keeper}.",
    ),
    ("name", "kind", "place", "dish"): (
        "{name} is {a} {kind} in {place}, known to all for its {dish}.",
        "You will find the best {dish} at {name}, {a} {kind} in {place}.",
        "In {place} there is {a} {kind} called {name}, which serves {dish}.",
    ),
    ("name", "kind", "dish", "price"): (
        "{name} is {a} {kind} that serves {dish} for {price}.",
        "At {name}, {a} {kind}, you can eat {dish} for {price}.",
        "For {price} you can eat {dish} at {name}, which is {a} {kind}.",
    ),
    ("name", "kind", "place", "keeper", "dish"): (
        "{name} is {a} {kind} in {place}, where {keeper} serves {dish}.",
        "{keeper} serves {dish} at {name}, {a} {kind} in {place}.",
        "In {place} you will find {name}, {a} {kind} where {keeper} serves {dish}.",
    ),
    ("name", "kind", "place", "keeper", "price"): (
        "{name} is {a} {kind} in {place}, where {keeper} asks {price} for a dinner.",
        "{keeper} keeps {name}, {a} {kind} in {place}, and asks {price} for a dinner.",
        "A dinner costs {price} at {name}, {a} {kind} in {place} that belongs to {keeper}.",
    ),
}


@cache
def _dealt(words: tuple[str, ...], split: str) -> tuple[str, ...]:
    return tuple(word for i, word in enumerate(words) if i % 5 in SPLITS[split])


def _record(split: str, rng: random.Random) -> dict[str, str]:
    """A value for every field, from the words that the split may use."""

    def pick(words: tuple[str, ...]) -> str:
        return rng.choice(_dealt(words, split))

    return {
        "name": f"The {pick(COLOURS)} {pick(EMBLEMS)}",
        "kind": pick(KINDS),
        "place": f"{pick(STREETS)} {rng.choice(WAYS)}",
        "keeper": f"{pick(FIRST_NAMES)} {pick(LAST_NAMES)}",
        "dish": f"{pick(WAYS_TO_COOK)} {pick(DISHES)}",
        "price": f"{rng.choice(NUMBERS)} {pick(COINS)}",
    }


def facts(split: str, *, num_records: int, seed: int = 0) -> list[dict]:
    """`num_records` different records of one split, the same for ever from the same arguments.

    Args:
        split: "train", "valid" or "test". The splits share no value.
        num_records: how many; fewer records of one seed are the beginning of more.
        seed: another seed gives other records of the same split.

    Returns:
        Rows {"prompt": "name: ... | kind: ...\\n", "completion": the sentence, "slots": the values
        that an output must contain, "references": every sentence that the templates know for these
        facts, the completion first}. The slot accuracy of some outputs is the share of the slot
        values that occur in them letter by letter.

    Raises:
        DataError: the split is unknown or `num_records` is negative.
    """
    if split not in SPLITS:
        guess = nearest(split, SPLITS)
        raise DataError(
            f"the facts have no split {split!r}",
            expected=f"one of {', '.join(SPLITS)}",
            mend=f"did you mean {guess!r}?" if guess else None,
        )
    if num_records < 0:
        raise DataError(f"num_records is {num_records}", expected="0 or more")
    rng = random.Random(f"lorica facts {split} {seed}")
    rows: dict[str, dict] = {}
    while len(rows) < num_records:
        row = _row(_record(split, rng), rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _row(record: dict[str, str], rng: random.Random) -> dict:
    fields = rng.choice(list(TEMPLATES))
    values = {field: record[field] for field in fields}
    article = "an" if values["kind"][0] in "aeiou" else "a"
    sentences = [template.format(a=article, **values) for template in TEMPLATES[fields]]
    completion = rng.choice(sentences)
    return {
        "prompt": " | ".join(f"{field}: {value}" for field, value in values.items()) + "\n",
        "completion": completion,
        "slots": list(values.values()),
        "references": [completion, *(s for s in sentences if s != completion)],
    }
