"""Methods on all kinds of layers that PEFT has them on: outputs, gradients, files both ways."""

import json

import peft
import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.errors import AdapterFileError, TargetError
from lorica.files.adapter import load_adapter, save_adapter
from parity.kinds import PAIRS, PLACES
from parity.measured import TOLERANCE, ours_first, theirs_first

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # of LoRA on experts: it looks for them before it reaches target_parameters
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not"),
]
HELD = [(word, kind) for word, pair in PAIRS.items() for kind in pair.kinds]


@pytest.mark.parametrize(("word", "kind"), HELD)
def test_the_same_outputs_and_gradients_and_files_both_ways(word, kind, tmp_path):
    name, targets = PLACES[kind]
    found = theirs_first(name, PAIRS[word].theirs(targets), tmp_path)
    errors = found.outputs, found.gradients, found.returned
    assert max(errors) <= TOLERANCE, errors
    assert ours_first(name, PAIRS[word].ours(targets), tmp_path) <= TOLERANCE


def test_what_lorica_does_not_have_is_refused_by_name(tmp_path):
    name, targets = PLACES["grouped conv2d"]
    pair = PAIRS["dora"]
    theirs = peft.get_peft_model(ARCHITECTURES[name].build(), pair.theirs(targets))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="conv3: DoRA has no length per output"):
        load_adapter(ARCHITECTURES[name].build(), tmp_path)
    with pytest.raises(TargetError):
        attach(ARCHITECTURES[name].build(), pair.ours(targets))


@pytest.mark.parametrize("word", ["hira", "adalora"])
def test_what_peft_cannot_have_is_written_in_our_layout(word, tmp_path):
    """Neither of them works there in PEFT on a convolution in groups."""
    name, targets = PLACES["grouped conv2d"]
    adapter = attach(ARCHITECTURES[name].build(), PAIRS[word].ours(targets))
    save_adapter(adapter, tmp_path)
    assert "peft_type" not in json.loads((tmp_path / "adapter_config.json").read_text())
    again = load_adapter(ARCHITECTURES[name].build(), tmp_path)
    assert again.slots.keys() == adapter.slots.keys()


def test_the_embedding_that_peft_repeats_must_be_that_of_the_base(tmp_path):
    name, targets = PLACES["embedding"]
    theirs = peft.get_peft_model(ARCHITECTURES[name].build(), PAIRS["hira"].theirs(targets))
    theirs.save_pretrained(str(tmp_path))
    base = ARCHITECTURES[name].build()
    with torch.no_grad():
        base.get_input_embeddings().weight[5, 3] += 1
    with pytest.raises(AdapterFileError, match="had other weights there"):
        load_adapter(base, tmp_path)
