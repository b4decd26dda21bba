"""The pattern of the bad elements, which is what people look for by hand: rows, columns, tiles, the last ones, all of them."""

import torch

from gaugeblock.conformance.engine.budget.error_budget import Budget, propagated_error, rounding_error

TILES = (128, 64, 32, 16)


def diagnose(wrong: torch.Tensor, signed_error: torch.Tensor | None) -> str:
    """Describes which elements are wrong.

    Args:
        wrong: Boolean, any shape.
        signed_error: Error times the oracle's sign, of the same shape; None where errors have no sign.
    """
    if not wrong.any():
        return "no single element is beyond its budget: the error is spread" + _bias(signed_error)
    if wrong.all():
        return "every element" + _bias(signed_error)
    places = []
    for axis in range(wrong.ndim):
        others = [other for other in range(wrong.ndim) if other != axis]
        touched = wrong.any(dim=others) if others else wrong
        if not touched.all():
            name = "rows" if axis == 0 else "columns" if axis == wrong.ndim - 1 else f"positions along axis {axis}"
            places.append(f"{name} {_runs(touched)}{_last(touched)}")
    share = f"{int(wrong.sum())} of {wrong.numel()} elements"
    return f"{share}: {'; '.join(places)}" if places else f"{share}, scattered over all rows and columns"


def describe_element(key: str, result: torch.Tensor, budget: Budget, units: torch.Tensor) -> str:
    """The worst element: where, what it is, what it should be, and what was allowed."""
    index = tuple(torch.unravel_index(units.argmax(), units.shape)) if units.ndim else ()
    place = ", ".join(str(int(each)) for each in index)
    allowed = (propagated_error(budget) + rounding_error(budget, result.dtype))[index].item()
    return (
        f"worst element {key}[{place}] = {result[index].item():.9g}, oracle {budget.value[index].item():.9g}, "
        f"error {abs(result[index].item() - budget.value[index].item()):.3g}, allowed {allowed:.3g}"
    )


def _bias(signed_error: torch.Tensor | None) -> str:
    if signed_error is None or signed_error.numel() < 8:
        return ""
    sign = float(signed_error.sign().mean())
    return f", {'too large' if sign > 0 else 'too small'} in magnitude" if abs(sign) > 0.5 else ""


def _runs(touched: torch.Tensor) -> str:
    """Indices as runs: `3, 16-31`; at most four of them."""
    runs: list[list[int]] = []
    for index in touched.nonzero().flatten().tolist():
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs[:4])
    return text + (f", ... ({int(touched.sum())} of {touched.numel()})" if len(runs) > 4 else "")


def _last(touched: torch.Tensor) -> str:
    """Says when the bad ones are the tail after the last whole tile, or just the last."""
    first, length = int(touched.nonzero()[0]), touched.numel()
    if not touched[first:].all():
        return ""
    if first == length - 1:
        return " (the last one)"
    tile = next((tile for tile in TILES if first % tile == 0 and first and length - first < tile), None)
    return f" (the last, partial tile of {tile})" if tile else f" (the last {length - first})"
