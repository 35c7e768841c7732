"""Adapters mixed, merged into a base, and taken out of a full fine-tune."""

from lorica.mix.merging import merge
from lorica.mix.mixing import MixReport, mix
from lorica.mix.report import MergedWeight, MergeReport

__all__ = ["MergeReport", "MergedWeight", "MixReport", "merge", "mix"]
