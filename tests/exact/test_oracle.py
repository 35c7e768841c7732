"""A network with LoRA in NumPy, float64: forward, loss, gradients and AdamW by their equations.

It shares no line with the package. Lorica's training of the same network has to agree to 1e-12.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import lorica
from lorica.config import TrainSettings
from lorica.train.optim import learning_rate, make_optimizer

SIZES, RANK, ALPHA, CLASSES = (7, 11, 5), 3, 12.0, 5
SETTINGS = TrainSettings(
    learning_rate=0.05,
    max_steps=200,
    warmup_steps=20,
    lr_scheduler_type="cosine",
    weight_decay=0.1,
    max_grad_norm=0.5,
)


class Oracle:
    """x -> W2' tanh(W1' x + c1) + c2 with W' = W + s B A, cross-entropy, AdamW on A and B."""

    def __init__(self, layers: list[tuple[np.ndarray, ...]]) -> None:
        self.layers = layers  # (W, c, A, B) of each
        self.scale = ALPHA / RANK
        self.trained = [t for _, _, A, B in layers for t in (A, B)]
        self.first = [np.zeros_like(t) for t in self.trained]
        self.second = [np.zeros_like(t) for t in self.trained]
        self.step = 0

    def gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
        (W1, c1, A1, B1), (W2, c2, A2, B2) = self.layers
        s = self.scale
        hidden = np.tanh(x @ (W1 + s * B1 @ A1).T + c1)
        logits = hidden @ (W2 + s * B2 @ A2).T + c2
        shifted = logits - logits.max(1, keepdims=True)
        chances = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
        loss = -np.log(chances[np.arange(len(y)), y]).mean()
        d_logits = chances.copy()
        d_logits[np.arange(len(y)), y] -= 1
        d_logits /= len(y)
        d_W2 = d_logits.T @ hidden
        d_hidden = d_logits @ (W2 + s * B2 @ A2) * (1 - hidden**2)
        d_W1 = d_hidden.T @ x
        return loss, [s * B1.T @ d_W1, s * d_W1 @ A1.T, s * B2.T @ d_W2, s * d_W2 @ A2.T]

    def train(self, x: np.ndarray, y: np.ndarray, rate: float) -> float:
        loss, gradients = self.gradients(x, y)
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        factor = min(1.0, SETTINGS.max_grad_norm / (norm + 1e-6))
        self.step += 1
        b1, b2, t = SETTINGS.adam_beta1, SETTINGS.adam_beta2, self.step
        for i, (tensor, g) in enumerate(zip(self.trained, gradients, strict=True)):
            self.first[i] = b1 * self.first[i] + (1 - b1) * g * factor
            self.second[i] = b2 * self.second[i] + (1 - b2) * (g * factor) ** 2
            m, v = self.first[i] / (1 - b1**t), self.second[i] / (1 - b2**t)
            tensor *= 1 - rate * SETTINGS.weight_decay
            tensor -= rate * m / (np.sqrt(v) + SETTINGS.adam_epsilon)
        return loss


def schedule(step: int) -> float:
    """Warm-up over 20 steps, then half a cosine to 0 at step 200."""
    if step < 20:
        return 0.05 * (step + 1) / 20
    return 0.05 * 0.5 * (1 + np.cos(np.pi * (step - 20) / 180))


@pytest.fixture
def both():
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(SIZES)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()
    method = lorica.LoRA(r=RANK, lora_alpha=ALPHA, target_modules=("0", "2"))
    adapter = lorica.attach(model, method, name="a")
    for slot in adapter.slots.values():
        for tensor in slot.tensors.values():
            tensor.data = torch.randn_like(tensor).double() * 0.3
    numbers = []
    for path, layer in (("0", layers[0]), ("2", layers[1])):
        own = [layer.weight, layer.bias, *(adapter.slots[path].tensors[n] for n in ("A", "B"))]
        numbers.append(tuple(t.detach().numpy().copy() for t in own))
    return model, adapter, Oracle(numbers)


def test_training_agrees_with_the_equations(both):
    model, adapter, oracle = both
    rng = np.random.default_rng(1)
    parameters = [adapter.slots[path].tensors[name] for path in ("0", "2") for name in ("A", "B")]
    optimizer = make_optimizer(adapter.named_parameters(), SETTINGS)
    with lorica.activate(model, adapter):
        for step in range(200):
            x, y = rng.normal(size=(9, SIZES[0])), rng.integers(0, CLASSES, 9)
            loss = nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(y))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.max_grad_norm)
            rate = learning_rate(step, 200, SETTINGS)
            assert rate == pytest.approx(schedule(step), abs=1e-15)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            assert loss.item() == pytest.approx(oracle.train(x, y, rate), abs=1e-12)
    for ours, theirs in zip(parameters, oracle.trained, strict=True):
        assert np.abs(ours.detach().numpy() - theirs).max() < 1e-12


def test_the_oracle_is_right_about_its_own_gradients(both):
    """Against differences of its own loss: the judge must not be wrong in the same way."""
    _, _, oracle = both
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, SIZES[0])), rng.integers(0, CLASSES, 6)
    _, gradients = oracle.gradients(x, y)
    for tensor, gradient in zip(oracle.trained, gradients, strict=True):
        for place in [(0, 0), (tensor.shape[0] - 1, tensor.shape[1] - 1)]:
            kept = tensor[place]
            tensor[place] = kept + 1e-6
            above = oracle.gradients(x, y)[0]
            tensor[place] = kept - 1e-6
            below = oracle.gradients(x, y)[0]
            tensor[place] = kept
            assert gradient[place] == pytest.approx((above - below) / 2e-6, abs=1e-8)
