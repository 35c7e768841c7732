"""The spectra of what a full fine-tune changed, as a picture for docs/mix.md; a part of mix.py."""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "spectra.svg"


def spectra(steps: int = 120) -> dict[str, Any]:
    """What a full fine-tune of the embedded base on the facts changed, drawn as `lorica extract`
    draws it.
    """
    from lorica.base.empty import empty_model
    from lorica.base.load import load_model
    from lorica.base.locate import EMBEDDED, weight_files
    from lorica.mix.extract import extract
    from lorica.records.spectra import spectra_figure

    model = load_model("embedded", task="causal-lm", dtype="float32")
    with tempfile.TemporaryDirectory() as name:
        _tune_whole(model, steps)
        model.save_pretrained(name)
        tuned = sorted(Path(name).glob("*.safetensors"))
        report = extract(empty_model("embedded"), tuned, weight_files(EMBEDDED), energy=0.9)
    facts = report.facts()
    PICTURE.write_text(standalone(spectra_figure(facts["places"])) + "\n", encoding="utf-8")
    ranks = [place["rank"] for place in facts["places"]]
    return {"steps": steps, "lowest_rank": min(ranks), "highest_rank": max(ranks)}


def _tune_whole(model: Any, steps: int) -> None:
    """Plain training of all weights on the demo's facts."""
    from lorica.base.known import base_of
    from lorica.data.facts import facts

    tokenizer = base_of(model).tokenizer
    rows = facts("train", num_records=16 * steps)
    texts = [f"{row['prompt']}{row['completion']}{tokenizer.eos_token}" for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        part = texts[16 * step : 16 * step + 16]
        ids = tokenizer(part, return_tensors="pt", padding=True).input_ids
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def standalone(figure: str) -> str:
    """A figure of a page as a file of its own, in the page's colours by day."""
    from lorica.records.sections import HERE

    sheet = (HERE / "report.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", sheet.partition("@media")[0]))
    for name, colour in colours.items():
        figure = figure.replace(f"var(--{name})", colour)
    figure = re.sub(r'class="figure" ', "", figure, count=1)
    return figure.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
