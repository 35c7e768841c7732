"""Tasks: what an example, a loss and a score are."""

from lorica.tasks.causal_lm import CausalLM
from lorica.tasks.seq2seq import Seq2Seq
from lorica.tasks.text_classification import TextClassification
from lorica.tasks.text_to_image import TextToImage

TASKS = {task.kind: task for task in (CausalLM, TextClassification, Seq2Seq, TextToImage)}
"""The word in YAML and on the command line -> the task."""

__all__ = ["TASKS", "CausalLM", "Seq2Seq", "TextClassification", "TextToImage"]
