"""Twenty steps beside a plain loop over PEFT's model: the same losses, the same factors."""

import pytest
import torch

from exact.measured import TOLERANCES, difference
from exact.peft_loop import NAMES, both

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
]


@pytest.mark.parametrize("name", NAMES)
def test_training_agrees_with_peft(name, tmp_path):
    ours, theirs, our_factors, their_factors = both(name, tmp_path)
    assert ours == pytest.approx(theirs, rel=TOLERANCES["peft loss"], abs=0)
    assert difference(our_factors, their_factors) <= TOLERANCES["peft factors"]
    trained = [tensor for key, tensor in our_factors.items() if "lora_B" in key]
    assert all(tensor.abs().max() > 1e-3 for tensor in trained)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_differs_is_rounding(name, tmp_path):
    """In float64 nothing is left. The loss of causal models in transformers is float32 always."""
    ours, theirs, our_factors, their_factors = both(name, tmp_path, torch.float64)
    assert ours == pytest.approx(theirs, rel=TOLERANCES["peft, float64"], abs=0)
    assert difference(our_factors, their_factors) <= TOLERANCES["peft, float64"]
