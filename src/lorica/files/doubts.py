"""What is no fault of an adapter's file, and yet seldom meant."""

from collections.abc import Iterator

from lorica.attach.handle import Adapter

LARGE = 1e4
"""Training hardly ever leaves a number above a hundredth of this."""


def doubts(adapter: Adapter) -> Iterator[str]:
    """A sentence for each thing that a user would want to hear of before wondering at answers."""
    places = [slot.tensors for slot in adapter.slots.values()]
    thin = [own["B"] for own in places if own.keys() == {"A", "B"}]
    if thin and len(thin) == len(places) and not any(B.any() for B in thin):
        yield "every B of this adapter is zero: it changes nothing, as if it was never trained"
    for path, slot in adapter.slots.items():
        for name, tensor in slot.tensors.items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            largest = float(tensor.detach().abs().max())
            if largest > LARGE:
                yield f"{path}: {name} holds numbers up to {largest:.3g}; was its training stable?"
                return
