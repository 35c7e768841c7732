"""Methods: settings, tensors, arithmetic and merged form of one way to adapt a layer each."""

from lorica.methods.dora import DoRA
from lorica.methods.hira import HiRA
from lorica.methods.ia3 import IA3
from lorica.methods.loha import LoHa
from lorica.methods.lokr import LoKr
from lorica.methods.lora import LoRA, LoRAFA
from lorica.methods.vera import VeRA

METHODS = {method.kind: method for method in (LoRA, LoRAFA, DoRA, VeRA, LoHa, LoKr, HiRA, IA3)}
"""The word in YAML and on the command line -> the settings class, which is the method."""

__all__ = ["IA3", "METHODS", "DoRA", "HiRA", "LoHa", "LoKr", "LoRA", "LoRAFA", "VeRA"]
