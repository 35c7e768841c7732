"""Attention in half precision on a CPU: what it computes, how exactly, and what it keeps."""

import pytest
import torch
from torch.nn import functional as F

from architectures import ARCHITECTURES
from lorica.ops import attention
from lorica.ops.attention import is_narrow, is_short, narrow_attention, short_attention
from lorica.tasks import documents
from lorica.tasks.causal_lm import CausalLM
from train.words import WordTokenizer, examples

CASES = {
    "causal": {},
    "one token": {"queries": 1, "keys": 1},
    "fewer heads of keys": {"heads_of_keys": 2},
    "a window": {"mask": "window"},
    "a prefix that all see": {"keys": 14, "mask": "prefix"},
    "padding": {"mask": "padding"},
    "a window and fewer heads of keys": {"mask": "window", "heads_of_keys": 2},
}


def tensors(*, queries=9, keys=9, heads_of_keys=4, mask=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, queries, 8), (3, heads_of_keys, keys, 8), (3, heads_of_keys, keys, 8)]
    # transposed, as models hand them
    made = [
        torch.randn(n, t, h, d, generator=generator).transpose(1, 2).bfloat16()
        for n, h, t, d in (*shapes, shapes[0])
    ]
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    masks = {
        "window": (distance >= 0) & (distance < 4),
        "prefix": distance >= 0,
        "padding": (torch.arange(keys) < torch.tensor([9, 5, 1])[:, None])[:, None, None],
        None: None,
    }
    return made, masks[mask]


def outputs_and_gradients(attend, parts, g, dtype):
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in parts)
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), g.to(dtype))]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_and_errs_no_more_than_torch(case, half):
    (*parts, g), mask = tensors(**CASES[case])
    how = {"attn_mask": mask, "is_causal": mask is None, "scale": 0.3, "enable_gqa": True}

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **how)

    def narrow(q, k, v):
        return narrow_attention(q, k, v, mask, 0.3, causal=mask is None)

    wanted = outputs_and_gradients(plain, parts, g, torch.float64)
    torchs = outputs_and_gradients(plain, parts, g, half)
    ours = outputs_and_gradients(narrow, parts, g, half)
    for right, its, own in zip(wanted, torchs, ours, strict=True):
        assert own.dtype == half
        assert torch.isfinite(own).all()
        error = (own.double() - right).norm()
        assert error <= 1.5 * (its.double() - right).norm() + 1e-12
        assert error <= 4e-3 * right.norm() + 1e-12


def test_short_texts_in_half_precision_err_no_more_than_torch():
    (*parts, g), mask = tensors(mask="padding")
    assert is_short(*parts)

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    def short(q, k, v):
        return short_attention(q, k, v, mask, 0.3)

    wanted = outputs_and_gradients(plain, parts, g, torch.float64)
    torchs = outputs_and_gradients(plain, parts, g, torch.bfloat16)
    ours = outputs_and_gradients(short, parts, g, torch.bfloat16)
    for right, its, own in zip(wanted, torchs, ours, strict=True):
        assert own.dtype == torch.bfloat16
        error = (own.double() - right).norm()
        assert error <= 1.5 * (its.double() - right).norm() + 1e-12


@pytest.mark.parametrize("kind", [None, "padding"])
def test_nothing_wide_is_kept_but_a_number_per_query(kind):
    parts, mask = tensors(mask=kind)
    q, k, v = (t.requires_grad_() for t in parts[:3])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        narrow_attention(q, k, v, mask, None, causal=mask is None)
    wide = [t for t in kept if t.element_size() > 2]
    assert sum(t.numel() for t in wide) == q.shape[0] * q.shape[1] * q.shape[2]


def test_it_is_the_way_of_half_precision_alone(monkeypatch):
    parts, _ = tensors()
    q, k, v = parts[:3]
    monkeypatch.setattr(attention, "_AMX", False)
    assert is_narrow(q, k, v)
    assert is_narrow(q.half(), k.half(), v.half())
    assert is_narrow(q, k[:, :2], v[:, :2])
    monkeypatch.setattr(attention, "_AMX", True)
    assert not is_narrow(q, k, v)


def test_what_its_kernel_does_not_check_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(attention, "_AMX", False)
    parts, _ = tensors()
    q, k, v = parts[:3]
    assert not is_narrow(q.float(), k.float(), v.float())
    assert not is_narrow(q, k, v[..., :4])  # another width
    assert not is_narrow(q, k, v[:, :, :4])  # fewer values than keys
    assert not is_narrow(q, k[:1], v[:1])  # fewer texts
    assert not is_narrow(q, k[:, :3], v[:, :3])  # four heads on three
    assert not is_narrow(q, k[:, :, :0], v[:, :, :0])
    assert not is_narrow(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)
    assert not is_narrow(q[0], k[0], v[0])
    assert not is_short(q, k, v[..., :4])


@pytest.mark.parametrize("attend", ["narrow", "short"])
def test_autocast_does_not_narrow_what_is_inside(attend):
    (*parts, g), mask = tensors(mask="padding")

    def own(q, k, v):
        if attend == "short":
            return short_attention(q, k, v, mask, 0.3)
        return narrow_attention(q, k, v, mask, 0.3, causal=False)

    def under(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return own(q, k, v)

    plain = outputs_and_gradients(own, parts, g, torch.bfloat16)
    cast = outputs_and_gradients(under, parts, g, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_masks_of_any_number_of_dimensions(dims):
    (*parts, _), mask = tensors(mask="window")
    shaped = mask.view((1,) * (dims - 2) + mask.shape)
    wanted = F.scaled_dot_product_attention(*(t.float() for t in parts), attn_mask=mask)
    made = narrow_attention(*parts, shaped, None, causal=False)
    torch.testing.assert_close(made.float(), wanted, rtol=1e-2, atol=1e-2)


def test_models_in_half_precision_take_it(monkeypatch):
    taken = []

    def counted(*given, **how):
        taken.append(how["causal"])
        return narrow_attention(*given, **how)

    monkeypatch.setattr(documents, "narrow_attention", counted)
    monkeypatch.setattr(attention, "_AMX", False)
    model = ARCHITECTURES["llama"].build().bfloat16()
    task = CausalLM.of(WordTokenizer())
    with torch.no_grad():
        task.losses(model, task.collate([examples(2, 4)], model))
    assert taken
    assert all(taken)
