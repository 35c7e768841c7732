"""The rows of `methods.py` that PEFT's side is run for. It says so without importing PEFT."""

PEFT_WORDS = (
    "lora",
    "rslora",
    "dora",
    "adalora",
    "pissa",
    "olora",
    "vera",
    "loha",
    "lokr",
    "hira",
    "ia3",
    "road",
    "prompt-tuning",
    "p-tuning",
    "prefix-tuning",
    "norms",
)
