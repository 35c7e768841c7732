"""Which class of a base is which class of the data: by name, never by place against the names."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorica.errors import BaseModelError

_PLACEHOLDER = re.compile(r"(label[ _-]?)?\d+", re.IGNORECASE)
"""What configs call classes that nobody named."""


@dataclass(frozen=True)
class Classes:
    """The classes that a model will have.

    Attributes:
        names: in order of their index, spelled as the data spells them.
        contradict: the base has as many classes, but of other names: its output says nothing of
            them and must start anew.
        note: what the user should be told; empty where there is nothing.
    """

    names: tuple[str, ...]
    contradict: bool = False
    note: str = ""


def set_labels(config: Any, labels: tuple[str, ...]) -> Classes:
    """Write the classes that are wanted into the config of a classification.

    Args:
        labels: those of the data; empty: those of the config.

    Raises:
        BaseModelError: no labels, and a base that has a single output.
    """
    own = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    if not labels:
        if len(own) < 2:
            raise BaseModelError(
                "the model has a single output: a regression, not a classification",
                mend="name the classes with labels=",
            )
        return Classes(own)
    found = match_labels(own, tuple(labels))
    config.id2label = dict(enumerate(found.names))
    config.label2id = {label: i for i, label in enumerate(found.names)}
    return found


def match_labels(own: tuple[str, ...], labels: tuple[str, ...]) -> Classes:
    """Bring the classes of the data into the order of those of the base.

    Equal names, in any case, are the same class. Classes that nobody named, and numbers from 0 on,
    go by their place. Other names are other classes.
    """
    if own == labels or len(own) != len(labels):
        return Classes(labels)
    folded = {label.strip().casefold(): label for label in labels}
    names = [name.strip().casefold() for name in own]
    if len(folded) == len(labels) and set(names) == set(folded):
        found = tuple(folded[name] for name in names)
        return Classes(found, note=f"the classes keep the order of the model: {', '.join(found)}")
    if all(_PLACEHOLDER.fullmatch(name) for name in own):
        return Classes(labels)
    if set(labels) == {str(i) for i in range(len(own))}:
        pairs = ", ".join(f"{own[int(label)]} -> {label}" for label in labels)
        note = f"the classes of the model are taken for those of the data, by number: {pairs}"
        return Classes(tuple(str(i) for i in range(len(own))), note=note)
    note = (
        f"the model knows other classes ({', '.join(own)}) than the data ({', '.join(labels)}): its"
        " output layer starts anew; to use it as it is, name the data's classes as the model does"
    )
    return Classes(labels, contradict=True, note=note)


def output_tensors(config: Any, auto_class: Any) -> set[str]:
    """The names of the tensors whose shape is that of the number of classes."""
    wider = copy.deepcopy(config)
    wider.num_labels = config.num_labels + 1
    with torch.device("meta"):
        shapes = [
            {key: tensor.shape for key, tensor in auto_class.from_config(one).state_dict().items()}
            for one in (copy.deepcopy(config), wider)
        ]
    return {key for key, shape in shapes[0].items() if shapes[1][key] != shape}


def restart(model: Any, tensors: set[str]) -> None:
    """Fill the modules that own these tensors as their library fills new ones."""
    owners: dict[str, nn.Module] = {k.rpartition(".")[0]: model for k in tensors}
    for path in owners:
        module = model.get_submodule(path)
        for one in (module, *module.parameters(recurse=False)):
            one._is_hf_initialized = False  # else they would be passed by
        model._init_weights(module)
