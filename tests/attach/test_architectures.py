"""The small models themselves: they run, are repeatable, and keep the rows of a batch apart."""

import pytest
import torch

from architectures import ARCHITECTURES, CAUSAL, ENCODERS, PLAIN_MODULES, SEQ2SEQ, VISION_AND_SPEECH


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_runs_and_is_the_same_every_time(name):
    architecture = ARCHITECTURES[name]
    model, again = architecture.build(), architecture.build()
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    inputs = architecture.sample(model, 3, 7)
    with torch.no_grad():
        logits = architecture.logits(model(**inputs))
        row = architecture.logits(again(**{key: value[1:2] for key, value in inputs.items()}))
    assert logits.dtype == torch.float32 and logits.shape[0] == 3
    assert logits.std() > 0.02
    torch.testing.assert_close(logits[1:2], row, atol=1e-5, rtol=1e-5)


def test_every_model_is_in_one_list():
    lists = (CAUSAL, ENCODERS, SEQ2SEQ, VISION_AND_SPEECH, PLAIN_MODULES)
    assert sorted(name for names in lists for name in names) == sorted(ARCHITECTURES)
    assert len(ARCHITECTURES) >= 30


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    ARCHITECTURES["llama"].build()
    assert torch.equal(torch.rand(3), expected)
