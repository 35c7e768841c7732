"""The study of a search as it would be read, made up: eight candidates, two of them to the end."""

import math

import torch

from lorica.search.entry import Entry
from lorica.search.result import CutTo, OfSpectrum, answer_of, as_dict
from lorica.search.spectra import Spectrum

TOKENS = tuple(5 + record % 4 for record in range(60))
RANKS, RATES = (4, 8, 16, 32), (1e-4, 1e-3)


def entries():
    """Ranks by two rates; the low rate is cut at step 10, small ranks at step 20."""
    found = []
    for number, (rank, rate) in enumerate((r, lr) for r in RANKS for lr in RATES):
        slow = rate < 5e-4
        last = 10 if slow else 20 if rank < 16 else 80
        level = 1.6 + (0.6 if slow else 0.0) - 0.012 * math.log2(rank)
        curve = {step: level + 1.5 * math.exp(-step / 15) for step in range(5, last + 1, 5)}
        losses = tuple(
            curve[last] * n + 0.8 * math.sin(7 * record + rank) for record, n in enumerate(TOKENS)
        )
        found.append(
            Entry(
                number=number,
                point={"r": rank, "learning_rate": rate},
                outcome="finished" if last == 80 else "cut",
                reason="" if last == 80 else f"not among the best 50% of 8 at step {last}",
                run="/runs/x",
                parameters=1000 * rank,
                rank=rank,
                curve=curve,
                best_step=last,
                losses=losses,
            )
        )
    failed = {"r": 4096, "learning_rate": 1e-3}
    found.append(Entry(8, failed, "failed", reason="r=4096 is more than the layer's own rank"))
    return found


def spectrum():
    """Of two layers with four kinds of modules."""
    layers = []
    for layer in range(6):
        for place, kind in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")):
            values = torch.tensor([math.exp(-i / (1 + layer + place)) for i in range(32)])
            layers.append(
                Spectrum(
                    path=f"model.layers.{layer}.self_attn.{kind}",
                    rank=32,
                    values=tuple(values.tolist()),
                    effective=2.0 + layer + place,
                    energy_90=2 + layer,
                    energy_99=6 + layer,
                )
            )
    cuts = [
        CutTo(rank, 1000 * rank, tuple((1.46 + 0.8 / rank) * n for n in TOKENS))
        for rank in (1, 2, 4, 8, 16)
    ]
    pattern = CutTo(7, 4300, tuple(1.53 * n for n in TOKENS), is_pattern=True)
    return OfSpectrum(7, layers, [*cuts, pattern])


def findings():
    """search.json of it."""
    own = entries()
    answer = answer_of(own, TOKENS, 1.0)
    about = {"model": "stories260k", "data": "e2e.jsonl", "sampler": "grid"}
    resources = {
        "seconds": 81.2,
        "total_seconds": 99.0,
        "peak_memory_bytes": 812_000_000,
        "at_once": 8,
        "steps": 240,
        "share_of_steps": 0.375,
    }
    found = as_dict(own, TOKENS, answer, spectrum())
    return {**found, "about": about, "resources": resources}
