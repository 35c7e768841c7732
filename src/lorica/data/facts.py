"""The data set of `lorica demo`: facts about eating houses that never were -> one English sentence.

    name: The Amber Falcon | kind: quiet tavern | place: Willow Lane | price: forty-two pence
    -> The Amber Falcon is a quiet tavern in Willow Lane, where a dinner costs forty-two pence.

Every word list is dealt out to the splits once and for all: of five words three go to training,
one to validation and one to the test. No name, kind, place, keeper, dish or price of one split
occurs in another, so a model can only be right about a test record by reading it. What is learned
is to copy the values into a sentence, not the values.
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
HOUSES = _words(
    """
    tavern bakery alehouse chophouse teahouse dairy brewery cookshop buffet refectory canteen
    creamery grill smokehouse restaurant pantry hotel taproom cafe saloon cantina steakhouse bistro
    cookhouse roadhouse lodge parlour
    kitchen diner lounge club larder bakehouse hostelry brasserie winery distillery cellar hostel
    tearoom
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
    Margaret Alice Edward Martin Harriet Helen Walter Peter Gilbert Clara Constance Simon Oliver
    Agnes Matilda Robert Herbert Emma Florence Henry Arthur Julia Leonard Gregory Josephine Lucy
    Frederick Martha Dorothea George Bernard Ellen Eleanor Philip Clement Sarah Rosamund Daniel
    Edmund Anna Francis Samuel Hugh Laura Jasper David Katharine Ruth Lawrence Adam Marianne Nora
    Quentin Felix Roderick Rose Sophia Mabel Stephen Rupert Theresa Grace Thomas Conrad Valentine
    Hester Victoria Roland Vincent Edith Winifred Maurice Wilfred Susan Adelaide Basil Ambrose Kate
    Cuthbert Miles Charlotte Ada Dominic Horace Ernest Jane Flora Victor Godfrey Mary Oscar Rachel
    Denis Judith Harold Hannah Alan Marian Luke Celia Owen Stella Noel Paul Charles Diana Mark Lydia
    Ralph Phoebe Giles Fanny Jerome Esther
    """
)
LAST_NAMES = _words(
    """
    Holloway Walker Blackwood Turner Ingleby Barker Jarvis Porter Kingsley Archer Langford Parker
    Netherby Harper Oakley Chandler Pickering Sawyer Quill Slater Thornton Webster Vickers Foster
    Whitaker Gardner Yardley Dyer Bellamy Bowman Crawford Freeman Dunstable Hobbs Everett Morris
    Finchley Collins Hathaway Perkins Ironside Harris Jessop Watson Kettering Benton Lockwood Carter
    Marlowe Dalton Norwood Elton Ormond Norton Quincy Preston Rutherford Weston Tredwell Burton
    Upton Horton Vaughan Milton Wetherby Ashton Winslow Barton Birchall Stanton Eastwick Wharton
    Forsyth Marston Garrick Kingston Irving Langton Kendall Lambert Herbert Stewart Bennet Lucas
    Forster Denny Wickham Morley Brandon Merton Selden Warwick Mortimer Hastings Percy Talbot Surrey
    Clarence Rivers Stanley Bradley Hartley Wesley Ripley Bentley Huxley Lindley
    """
)
FLAVOURS = _words(
    """
    smoked sweet spiced sour roasted hot pickled cold buttered sharp candied mild stewed crisp
    grilled tender salted juicy toasted wild sugared green peppered red braised golden boiled salty
    fried savoury baked sticky glazed fluffy stuffed crunchy steamed thick minced hearty curried
    dainty jellied simple poached fancy dried country potted winter crumbed summer chilled garden
    honeyed river mashed lemon sliced pepper creamed ginger devilled mustard dressed cider frosted
    honey hashed butter iced cream larded onion mulled herb preserved wine pressed nutmeg pulled
    cinnamon rolled saffron scalloped garlic seared parsley seasoned vinegar shredded treacle
    simmered cheese soured brandy sweetened pink tossed purple whipped yellow warmed creamy crusted
    spicy peeled fresh chopped plain crushed rich ground soft scorched warm battered light skewered
    """
)
DISHES = _words(
    """
    trout ham mutton pears turnips lobster venison apricots mushrooms chestnuts salmon bacon onions
    cabbage almonds beef chicken parsnips potatoes eels sausages carrots figs walnuts crab turkey
    beans peaches duck haddock veal peas plums leeks shrimps rabbit beetroot cherries dumplings
    noodles lentils barley quinces oysters mussels pigeon sprouts marrows radishes currants melons
    prunes kidneys tongue liver pudding pancakes biscuits muffins
    """
)
MANNERS = _words(
    """
    quiet crowded cheerful gloomy famous humble cosy shabby splendid modest lively sleepy dusty
    bright narrow spacious friendly noisy peaceful draughty handsome crooked charming dingy
    respectable fashionable ancient lonely busy tidy grand pleasant curious rustic elegant secret
    smoky sunny damp warm cool tiny vast plain odd merry stately thriving forgotten beloved
    little-known haunted whitewashed thatched timbered candlelit riverside hillside
    """
)
NUMBERS = tuple(
    f"{tens}-{ones}"  # all of two words, so that no number stands inside another
    for tens in _words("twenty thirty forty fifty sixty seventy eighty ninety")
    for ones in _words("one two three four five six seven eight nine")
)
COINS = _words("shillings pence crowns guineas")

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
        "kind": f"{pick(MANNERS)} {pick(HOUSES)}",
        "place": f"{pick(STREETS)} {rng.choice(WAYS)}",
        "keeper": f"{pick(FIRST_NAMES)} {pick(LAST_NAMES)}",
        "dish": f"{pick(FLAVOURS)} {pick(DISHES)}",
        "price": f"{pick(NUMBERS)} {rng.choice(COINS)}",
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
