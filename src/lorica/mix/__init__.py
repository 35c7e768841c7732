"""Adapters mixed, merged into a base, and taken out of a full fine-tune."""

from lorica.mix.extract import ExtractReport, extract
from lorica.mix.merging import merge
from lorica.mix.mixing import MixReport, mix
from lorica.mix.report import MergedWeight, MergeReport

__all__ = [
    "ExtractReport",
    "MergeReport",
    "MergedWeight",
    "MixReport",
    "extract",
    "merge",
    "mix",
]
