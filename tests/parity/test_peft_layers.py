"""Methods on all kinds of layers that PEFT has them on: outputs, gradients, files both ways."""

from contextlib import nullcontext

import peft
import pytest

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.errors import AdapterFileError, TargetError
from lorica.files.adapter import load_adapter
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


@pytest.mark.parametrize(
    ("word", "kind", "ours"),
    [
        ("hira", "embedding", True),
        ("hira", "conv2d", True),
        ("ia3", "conv2d", True),
        ("dora", "grouped conv2d", False),
    ],
)
def test_what_is_not_exchanged_is_refused_by_name(word, kind, ours, tmp_path):
    """PEFT has it there, and Lorica has it with files of its own, or not."""
    name, targets = PLACES[kind]
    theirs = peft.get_peft_model(ARCHITECTURES[name].build(), PAIRS[word].theirs(targets))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match=targets[0]):
        load_adapter(ARCHITECTURES[name].build(), tmp_path)
    with nullcontext() if ours else pytest.raises(TargetError):
        attach(ARCHITECTURES[name].build(), PAIRS[word].ours(targets))
