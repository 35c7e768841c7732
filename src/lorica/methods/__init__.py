"""Methods: settings, tensors, arithmetic and merged form of one way to adapt a layer each."""

from lorica.methods.lora import LoRA

METHODS = {method.kind: method for method in (LoRA,)}
"""The word in YAML and on the command line -> the settings class, which is the method."""

__all__ = ["METHODS", "LoRA"]
