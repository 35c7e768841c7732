"""What a base was made for, as its config says. No weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorica.base.hub import hub_options
from lorica.base.image_pipeline import is_pipeline
from lorica.base.locate import EMBEDDED
from lorica.base.request import AUTO_CLASSES, IMAGES
from lorica.errors import BaseModelError, ConfigError, nearest


def kind_of(model: str) -> str:
    """The task that a base suggests: "causal-lm", "seq2seq", "text-classification"; for a pipeline
    of diffusers "text-to-image".

    An encoder without a head is taken for a classification, which is what one adapts it to.
    """
    if is_pipeline(model):
        return IMAGES
    config = config_of(model)
    made = [str(name) for name in config.get("architectures") or ()]
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    if any(name.endswith("ForSequenceClassification") for name in made):
        return "text-classification"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in made):
        return "causal-lm"
    encoders = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForQuestionAnswering")
    if any(name.endswith(encoders) for name in made):
        return "text-classification"
    return "text-classification" if "bert" in str(config.get("model_type")) else "causal-lm"


def checked_kind(wanted: str, model: str) -> str:
    """The task as set on the command line, or as the base suggests where that is auto.

    Raises:
        ConfigError: there is no such task.
    """
    if wanted == "auto":
        return kind_of(model)
    known = (*AUTO_CLASSES, IMAGES)
    if wanted not in known:
        near = nearest(wanted, known)
        raise ConfigError(
            f"there is no task {wanted!r}",
            expected=f"auto, {', '.join(known)}",
            mend=f"did you mean {near}?" if near else None,
        )
    return wanted


def refuse_pictures(task: str, model: str) -> None:
    """Raises ConfigError where a command that knows texts alone is given what draws pictures."""
    if task == IMAGES or (task == "auto" and is_pipeline(model)):
        raise ConfigError(
            f"{model} draws pictures, which this command does not know",
            expected="one of: lorica train, lorica grid, lorica inspect",
        )


def is_encoder(model: str) -> bool:
    """Whether a base reads a text as a whole (BERT), so that it cannot continue one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = config_of(model)
    made = " ".join(map(str, config.get("architectures") or ()))
    continues = config.get("is_decoder") or "CausalLM" in made or "LMHead" in made
    masked = config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not continues and not config.get("is_encoder_decoder")


def is_encoder_decoder(model: str) -> bool:
    """Whether the config of a base says that it is an encoder-decoder model."""
    return bool(config_of(model).get("is_encoder_decoder"))


def names_classes(model: str) -> bool:
    """Whether the config of a base has names for its classes, other than LABEL_0, LABEL_1 ..."""
    names = config_of(model).get("id2label") or {}
    return any(not str(name).startswith("LABEL_") for name in names.values())


def config_of(model: str) -> dict[str, Any]:
    """The config of a base; empty for a folder without one, which loading the base will explain.

    Raises:
        BaseModelError: there is no such folder, and no such base on the hub.
    """
    folder = EMBEDDED if model == "embedded" else Path(model)
    if folder.exists() or model.startswith((".", "/", "~")):
        try:
            found = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        kinds = {"architectures": list, "id2label": dict}
        return {
            key: value
            for key, value in (found if isinstance(found, dict) else {}).items()
            if isinstance(value, kinds.get(key, object))
        }
    from transformers import PretrainedConfig

    local = hub_options(model)
    try:
        return PretrainedConfig.get_config_dict(model, **local)[0]
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{model} is no folder here, and the hub gave none: {str(error).splitlines()[0]}",
            expected="a folder with config.json and *.safetensors, or a hub id",
            mend="check the path; for a hub id also the network and HF_HUB_OFFLINE",
        ) from error
