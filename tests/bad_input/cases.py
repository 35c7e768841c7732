"""All bad inputs, in the order of the tables, and the rows that no test here can hold."""

from __future__ import annotations

from bad_input import adapter_cases, base_cases, data_cases, settings_cases

TABLES = {
    "D": ("Files of records", data_cases.CASES),
    "C": ("Settings and the command line", settings_cases.CASES),
    "A": ("Adapter folders", adapter_cases.CASES),
    "M": ("Base models, tokenizers, chat templates", base_cases.CASES),
}
CASES = tuple(case for _, cases in TABLES.values() for case in cases)

ROWS = {"D": 25, "C": 12, "A": 20, "M": 9}
"""How many rows each table has."""

NOT_HELD = {  # row -> what is not there, and why
    "A-18": "an adapter uploaded again while it serves: there is no server yet",
    "A-20": "a backdoored adapter: cannot be told from its bytes; what it was made of stands in "
    "lorica.json",
}
PARTLY = {
    "D-14": "rows of more than 16 MiB are refused; a JSON, CSV or text file of up to 2 GiB is read "
    "in one piece, so that memory is not bounded by the longest row there",
    "D-18": "a leak is a warning, and refused where all of the evaluation leaks; no option refuses "
    "less of it",
    "C-03": "ranks up to 65,536 are taken as settings, and refused where a layer has less",
    "C-08": "bfloat16 on a processor without it is slow: that is said, and not refused",
    "A-09": "names are held for loading; there are no endpoints of a server yet",
    "A-12": "there is a limit for each adapter, none for all of a server",
    "M-02": "checked for folders; what the hub sends is left to its library",
    "M-03": "an output layer that says it is tied and is stored with other values is tied silently",
    "M-06": "files are bounded by size, patterns by the library's own limit of steps",
    "M-09": "digests of templates are not compared with known ones",
}
