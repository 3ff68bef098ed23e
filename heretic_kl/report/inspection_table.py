"""A model's layers, sites and their check as sections of lines. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from heretic_kl.report.details import DetailSection

if TYPE_CHECKING:
    from heretic_kl.model import ModelInspection, SiteGroup

STREAMS = {
    "one": "one",
    "first": "several, counted by the first of four dimensions",
    "third": "several, counted by the third of four dimensions",
    "side by side": "several, side by side in the last dimension",
}


def inspection_sections(
    inspection: ModelInspection, name: str, components: Sequence[str], cache_memory_mb: int
) -> tuple[DetailSection, ...]:
    """Model, layers, sites, what an edit of the components reaches and what it needs.

    `name` is the model as the user gave it.
    """
    return (
        DetailSection("Model", tuple(_model_rows(inspection, name))),
        DetailSection("Layers", tuple(_layer_rows(inspection))),
        DetailSection("Sites: what writes to the residual stream", tuple(_site_rows(inspection))),
        DetailSection("Edit", tuple(_edit_rows(inspection, components))),
        DetailSection("Memory", tuple(_memory_rows(inspection, cache_memory_mb))),
    )


def _model_rows(inspection: ModelInspection, name: str) -> Iterator[tuple[str, ...]]:
    yield "name", name
    yield "class", f"{inspection.model} ({inspection.model_type})"
    yield "parameters", f"{inspection.parameters:,}"
    yield "dtype", f"{inspection.dtype} on {inspection.device}, stored as {inspection.stored_dtype}"
    yield "vocabulary", f"{inspection.vocabulary:,}"
    yield "chat template", "yes" if inspection.chat_template else "none: plain text"


def _layer_rows(inspection: ModelInspection) -> Iterator[tuple[str, ...]]:
    yield "path", inspection.layers_path
    yield "layers", f"{inspection.layers}, residual stream {inspection.width} wide"
    if inspection.streams != "one":
        yield "streams", STREAMS[inspection.streams]
    if inspection.constant_layers:
        yield "constants", f"in layers {ranges(inspection.constant_layers)}; no edit reaches them"


def _site_rows(inspection: ModelInspection) -> Iterator[tuple[str, ...]]:
    yield "place", "component", "layers", "sites", "weights (the axis that writes)", "behind"
    for group in inspection.sites:
        yield (
            group.place,
            group.component,
            ranges(group.layers),
            str(group.sites),
            _tensors(group),
            _behind(group),
        )


def _tensors(group: SiteGroup) -> str:
    shown = [
        f"{tensor.name} {' x '.join(map(str, tensor.shape))} ({tensor.axis})"
        for tensor in group.tensors
    ]
    return ", ".join([*([f"quantized ({group.module})"] if group.quantized else []), *shown])


def _behind(group: SiteGroup) -> str:
    if group.gains > 1:
        return f"a convolution of {group.gains} taps"
    if group.centred:
        return "a LayerNorm"
    return "a norm or scale" if group.gains else "nothing"


def _edit_rows(inspection: ModelInspection, components: Sequence[str]) -> Iterator[tuple[str, ...]]:
    chosen = [g for g in inspection.sites if g.component in components]
    count = sum(group.sites for group in chosen)
    yield "all writers found", "yes: with the sites zero-ablated, no layer adds anything"
    yield (
        "a direction removed",
        f"but for {inspection.residue:.1e} (layer {inspection.residue_layer})",
    )
    yield "would be edited", f"{count} sites ({', '.join(components)})"
    share = inspection.edited_parameters / inspection.parameters
    yield "weights of all sites", f"{inspection.edited_parameters:,} ({share:.0%} of all)"
    problem = inspection.norm_problem
    yield "norm modes", f"none ({problem})" if problem else "none, row, normalized_row"
    rows = all(group.by_rows for group in inspection.sites)
    yield "candidates at once", "possible" if rows else "no: rows of a batch are mixed"
    if any(group.quantized for group in inspection.sites):
        yield "saving", "an adapter; merged only where --quantization did it"
    elif any(len(tensor.shape) > 2 for group in inspection.sites for tensor in group.tensors):
        yield "saving", "merged; no adapter (experts in one tensor)"
    else:
        yield "saving", "merged or as an adapter"
    for remark in inspection.remarks:
        yield "note", remark


def _memory_rows(inspection: ModelInspection, cache_memory_mb: int) -> Iterator[tuple[str, ...]]:
    yield "weights", megabytes(inspection.weight_bytes)
    if inspection.cache_bytes_per_token is not None:
        per_token = inspection.cache_bytes_per_token
        yield "cache", f"{per_token / 1000:,.1f} kB a token of each sequence in a batch"
    yield "unedited states", f"at most {cache_memory_mb:,} MB (cache_memory_mb)"
    yield (
        "to read a saved model back",
        f"{megabytes(inspection.weight_bytes)} more (weights, once more)",
    )


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.0f} MB"


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as runs and steps: `0-29`, `3, 7, 11`, `0-58 by 2`."""
    if len(numbers) > 2:
        step = numbers[1] - numbers[0]
        if all(b - a == step for a, b in zip(numbers, numbers[1:], strict=False)):
            return f"{numbers[0]}-{numbers[-1]}" + (f" by {step}" if step > 1 else "")
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
