"""Methods: settings, tensors, arithmetic and merged form of one way to adapt a layer each."""

from lorica.config.settings import Preset, Union
from lorica.methods.adalora import AdaLoRA
from lorica.methods.bottleneck import Bottleneck, Compacter
from lorica.methods.dora import DoRA
from lorica.methods.gated import GatedBottleneck, GatedLoRA, GatedPrefixTuning
from lorica.methods.hira import HiRA
from lorica.methods.ia3 import IA3
from lorica.methods.lisa import LISA
from lorica.methods.loha import LoHa
from lorica.methods.lokr import LoKr
from lorica.methods.lora import LoRA, LoRAFA
from lorica.methods.loreft import LoReFT
from lorica.methods.p_tuning import PTuning
from lorica.methods.prefix_tuning import PrefixTuning
from lorica.methods.prompt_tuning import PromptTuning
from lorica.methods.road import RoAd
from lorica.methods.selective import Selective
from lorica.methods.sparse import Sparse
from lorica.methods.vera import VeRA

METHODS = {
    method.kind: method
    for method in (
        LoRA,
        LoRAFA,
        DoRA,
        AdaLoRA,
        VeRA,
        LoHa,
        LoKr,
        HiRA,
        IA3,
        RoAd,
        Bottleneck,
        Compacter,
        Selective,
        LISA,
        Sparse,
        PromptTuning,
        PTuning,
        PrefixTuning,
        LoReFT,
        GatedLoRA,
        GatedBottleneck,
        GatedPrefixTuning,
    )
}
"""Kind -> the settings class, which is the method."""

PRESETS = {
    "rslora": Preset(
        LoRA, {"use_rslora": True}, "LoRA scaled by the root of the rank (arXiv 2312.03732)"
    ),
    "lora-plus": Preset(
        LoRA, {"loraplus_lr_ratio": 16.0}, "LoRA, B learns 16 times as fast (arXiv 2402.12354)"
    ),
    "pissa": Preset(
        LoRA,
        {"init_lora_weights": "pissa"},
        "LoRA from the weight's first singular vectors (arXiv 2404.02948)",
    ),
    "olora": Preset(
        LoRA,
        {"init_lora_weights": "olora"},
        "LoRA from the weight's QR decomposition (arXiv 2406.01775)",
    ),
    "loftq": Preset(
        LoRA,
        {"init_lora_weights": "loftq"},
        "LoRA from what rounding to NF4 loses (arXiv 2310.08659)",
    ),
    "eva": Preset(
        LoRA,
        {"init_lora_weights": "eva"},
        "LoRA from the directions of the inputs (arXiv 2410.07170)",
    ),
    "lora-ga": Preset(
        LoRA,
        {"init_lora_weights": "lora_ga"},
        "LoRA from the full gradient's directions (arXiv 2407.05000)",
    ),
    "houlsby": Preset(
        Bottleneck, {"layout": "houlsby"}, "bottlenecks behind both parts (arXiv 1902.00751)"
    ),
    "pfeiffer": Preset(
        Bottleneck, {"layout": "pfeiffer"}, "bottlenecks behind feed-forward (arXiv 2005.00052)"
    ),
    "parallel": Preset(
        Bottleneck,
        {"layout": "parallel", "adapter_scaling": 4.0},
        "bottlenecks beside feed-forward (arXiv 2110.04366)",
    ),
    "full": Preset(
        Selective, {"parameters": "all"}, "every parameter, kept as a difference (arXiv 1801.06146)"
    ),
    "bitfit": Preset(Selective, {"parameters": "bias"}, "the biases alone (arXiv 2106.10199)"),
    "head": Preset(
        Selective, {"parameters": "head"}, "the classifier or output layer (arXiv 1610.01644)"
    ),
    "few-sample": Preset(
        Selective,
        {"parameters": "all"},
        "full tuning for few records, top layers anew (arXiv 2006.05987)",
        proposes={
            "reinit_top_layers": (0, 1, 2),
            "learning_rate": 2e-5,
            "epochs": 20.0,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "batch_size": 16,
        },
    ),
    "norms": Preset(
        Selective, {"parameters": "norm"}, "normalisation layers alone (arXiv 2312.11420)"
    ),
    "p-tuning-v2": Preset(
        PrefixTuning,
        {"prefix_projection": False},
        "prefix tuning without a network (arXiv 2110.07602)",
    ),
}
"""A method's own name -> the settings of another one that it is."""

UNIONS = {
    "mam": Union(
        (
            ("prefix-tuning", {"num_virtual_tokens": 30}),
            ("parallel", {"reduction_factor": 2}),
        ),
        "a prefix and bottlenecks beside feed-forward (arXiv 2110.04366)",
    ),
    "unipelt": Union(
        (
            ("gated-prefix", {"num_virtual_tokens": 10}),
            ("gated-adapter", {}),
            ("gated-lora", {}),
        ),
        "a prefix, bottlenecks and LoRA behind gates (arXiv 2110.07577)",
    ),
}
"""A name for methods that train together as one adapter."""

WORDS: dict[str, type | Preset | Union] = {**METHODS, **PRESETS, **UNIONS}
"""Every word that `method` takes in YAML and on the command line."""

__all__ = [
    "IA3",
    "LISA",
    "METHODS",
    "PRESETS",
    "UNIONS",
    "WORDS",
    "AdaLoRA",
    "Bottleneck",
    "Compacter",
    "DoRA",
    "GatedBottleneck",
    "GatedLoRA",
    "GatedPrefixTuning",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoReFT",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "RoAd",
    "Selective",
    "Sparse",
    "VeRA",
]
