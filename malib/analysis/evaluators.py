"""Models that evaluate images, and the effects of edits that they measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .image_metrics import DETAILS, detail, harmonic_mean, image_distance, share_of_path

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Evaluators:
    """The models that evaluate images: the bundled evaluator for mini-flux, models of the user's choice for large models.

    Every member takes uint8 images (B, H, W, 3).

    Attributes:
        features: images -> float (B, d), for ``frechet_distance`` and ``kernel_distance``.
        adherence: images and their prompts (scenes for the bundled evaluator) -> float (B,), more is better.
        masks: images -> boolean (B, H, W), True on the foreground.
        attributes: like ``adherence``, but one array for each kind of attribute.
        quality: images -> float (B,), how good they look whatever they show, more is better.
    """

    features: Callable[[np.ndarray], np.ndarray] | None = None
    adherence: Callable[[np.ndarray, Sequence[Any]], np.ndarray] | None = None
    masks: Callable[[np.ndarray], np.ndarray] | None = None
    attributes: Callable[[np.ndarray, Sequence[Any]], dict[str, np.ndarray]] | None = None
    quality: Callable[[np.ndarray], np.ndarray] | None = None


def bundled_evaluators() -> Evaluators:
    """Return the bundled evaluator in every member; its adherence is the share of a scene's attributes that it predicts."""
    from ..miniflux.evaluator import predict, prompt_adherence

    def attributes(images: np.ndarray, prompted: Sequence[Any]) -> dict[str, np.ndarray]:
        return {name: hit for name, hit in prompt_adherence(predict(images), prompted).items() if name != "all"}

    def adherence(images: np.ndarray, prompted: Sequence[Any]) -> np.ndarray:
        return np.mean(list(attributes(images, prompted).values()), axis=0)

    return Evaluators(lambda images: predict(images).features, adherence, lambda images: predict(images).masks, attributes)


def colour_masks(images: np.ndarray) -> np.ndarray:
    """Segment images by two-means on the pixels' colours: a rough substitute for a segmenter.

    The foreground is the cluster that fills less of the border.

    Args:
        images: uint8 (B, H, W, 3).

    Returns:
        Boolean (B, H, W).
    """
    import torch

    from ..spatial import kmeans
    from .masks import foreground

    count, height, width = images.shape[:3]
    pixels = torch.from_numpy(images).float().view(count, height * width, 3)
    labels = kmeans(pixels, restarts=2, iterations=10).numpy()
    return foreground(labels, labels * 0.0, (height, width)).reshape(count, height, width)


def edit_effects(images: np.ndarray, base: np.ndarray, evaluators: Evaluators, prompts: Sequence[Any]) -> xr.DataArray:
    """Measure the effects of an edit on images: distance, local detail and meaning.

    Args:
        images: uint8 (B, H, W, 3), edited.
        base: the same images unedited.
        evaluators: what they lack is omitted from the result.
        prompts: prompts (or scenes) of the images, for the evaluators.

    Returns:
        (sample, measure): ``distance`` to the base; the kinds of ``detail`` as the log of their ratio to the base's
        (each at least 1e-4, or one flat image would outweigh all others); with evaluators ``layout`` (IoU of the
        foreground masks), ``adherence`` and its attributes, and ``quality``.
    """
    import xarray as xr

    measures = {"distance": image_distance(images, base)}
    before, after = detail(base), detail(images)
    measures |= {name: np.log(np.maximum(after[name], 1e-4) / np.maximum(before[name], 1e-4)) for name in DETAILS}
    if evaluators.masks:
        a, b = evaluators.masks(images), evaluators.masks(base)
        union = (a | b).sum((1, 2))
        measures["layout"] = np.where(union > 0, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0)
    if evaluators.adherence:
        measures["adherence"] = evaluators.adherence(images, prompts)
    if evaluators.attributes:
        measures |= evaluators.attributes(images, prompts)
    if evaluators.quality:
        measures["quality"] = evaluators.quality(images)
    values = np.stack([np.asarray(v, dtype=np.float64) for v in measures.values()], axis=1)
    return xr.DataArray(values, dims=("sample", "measure"), coords={"measure": list(measures)})


ATTRIBUTES = ("shape", "colour", "size", "position", "background", "pattern")


def attribute_transfer(images: np.ndarray, pairs: Sequence[tuple[Any, Any]]) -> xr.Dataset:
    """Measure how far images have changed from one scene to another, attribute by attribute, with the bundled evaluator.

    Args:
        images: uint8 (B, 64, 64, 3).
        pairs: for each image the one-subject scenes (target, source) between which it is.

    Returns:
        ``toward`` (sample, attribute): 1 where the image shows the source's word and not the target's, 0 the other way
        round, NaN for neither or both; where the two have the same word, 0 if it is shown, else NaN. ``subjects``
        (sample): number of positions with a subject.
    """
    import xarray as xr

    from ..miniflux.evaluator import predict
    from ..miniflux.scenes import POSITIONS, attributes

    prediction = predict(images)
    toward, subjects = np.full((len(images), len(ATTRIBUTES)), np.nan), np.zeros(len(images), dtype=int)
    for i, (target, source) in enumerate(pairs):
        there = [p for p in range(len(POSITIONS)) if prediction.words["shape"][i, p] != "none"]
        subjects[i] = len(there)
        seen = [{str(prediction.words[a][i, p]) for p in there} for a in ATTRIBUTES[:3]]
        seen += [{POSITIONS[p] for p in there}, *({str(prediction.words[a][i])} for a in ATTRIBUTES[4:])]
        for number, (words, old, new) in enumerate(zip(seen, attributes(target), attributes(source), strict=True)):
            if old == new and old in words:
                toward[i, number] = 0
            elif (old in words) != (new in words):
                toward[i, number] = float(new in words)
    dims = ("sample", "attribute")
    return xr.Dataset({"toward": (dims, toward), "subjects": ("sample", subjects)}, coords={"attribute": list(ATTRIBUTES)})


def transport_scores(
    images: np.ndarray,
    target: np.ndarray,
    source: np.ndarray,
    foregrounds: tuple[np.ndarray, np.ndarray],
    pairs: Sequence[tuple[Any, Any]] | None = None,
    transferred: Sequence[str] = ATTRIBUTES[:4],
) -> xr.DataArray:
    """Measure a transport: likeness to the source, preservation of the target, and their harmonic mean, the composite.

    MAs-DiT names a composite without defining it; this one is ours.

    Args:
        images: uint8 (B, H, W, 3), transported.
        target: the unedited targets.
        source: the unedited sources.
        foregrounds: boolean (B, H, W), the foregrounds of target and source, as from ``Evaluators.masks``.
        pairs: the scenes, for images that the bundled evaluator can evaluate.
        transferred: the attributes that are to become the source's; all others are to stay the target's.

    Returns:
        (sample, measure): in pixels ``near_source``, the share of the path from target to source inside of the source's
        subject, and ``near_target``, that from source to target outside of both subjects. With ``pairs`` ``likeness`` is
        the share of the transferred attributes that are the source's, ``preservation`` that of the others that are the
        target's, and there are each attribute (1 where it is the source's) and ``clean`` (exactly one subject); without
        ``pairs`` the two are the measures in pixels.
    """
    import xarray as xr

    near = share_of_path(images, target, source, foregrounds[1])
    preserved = share_of_path(images, source, target, ~(foregrounds[0] | foregrounds[1]))
    measures = {"likeness": near, "preservation": preserved}
    if pairs is not None:
        transfer = attribute_transfer(images, pairs)
        toward, chosen = transfer.toward.values, np.isin(ATTRIBUTES, transferred)
        measures = {"likeness": (toward[:, chosen] == 1).mean(1), "preservation": (toward[:, ~chosen] == 0).mean(1)}
        measures |= {name: (toward[:, i] == 1).astype(float) for i, name in enumerate(ATTRIBUTES)}
        measures["clean"] = (transfer.subjects.values == 1).astype(float)
    measures |= {
        "composite": harmonic_mean(measures["likeness"], measures["preservation"]),
        "near_source": near,
        "near_target": preserved,
    }
    values = np.stack([np.asarray(v, dtype=np.float64) for v in measures.values()], axis=1)
    return xr.DataArray(values, dims=("sample", "measure"), coords={"measure": list(measures)})


def vision_features(model: Any, processor: Any, batch_size: int = 16) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that computes features with a transformers vision model (DINOv2, CLIP's vision tower, ...).

    Args:
        model: returns ``pooler_output``, or ``last_hidden_state`` (then its mean over the tokens is used).
        processor: the model's image processor.
        batch_size: images at once.

    Returns:
        images -> float (B, d), for ``Evaluators.features``.
    """

    def features(batch: np.ndarray) -> Any:
        out = model(**processor(images=list(batch), return_tensors="pt").to(model.device))
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state.mean(1) if pooled is None else pooled

    return _in_batches(features, batch_size)


def clip_score(model: Any, processor: Any, batch_size: int = 16) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """Return a function that computes the CLIP score, 100 max(cos, 0) (arXiv 2104.08718, without its factor 2.5).

    Args:
        model: a transformers ``CLIPModel`` or a relative that returns ``image_embeds`` and ``text_embeds``; HPSv2.1 and
            PickScore are CLIP models with other weights.
        processor: its ``CLIPProcessor``; prompts are truncated at the model's length.
        batch_size: images at once.

    Returns:
        images and prompts -> float (B,), for ``Evaluators.adherence``.
    """

    def scores(batch: np.ndarray, prompts: Sequence[str]) -> Any:
        words = {"text": list(prompts), "padding": True, "truncation": True}
        out = model(**processor(images=list(batch), **words, return_tensors="pt").to(model.device))
        cosine = (_unit(out.image_embeds) * _unit(out.text_embeds)).sum(-1)
        return 100 * cosine.clamp(min=0)

    return _in_batches(scores, batch_size)


def blip_score(model: Any, processor: Any, batch_size: int = 8) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """Return a function that computes the match probability of BLIP's matching head (Li et al., arXiv 2201.12086).

    Args:
        model: a transformers ``BlipForImageTextRetrieval``.
        processor: its ``BlipProcessor``; prompts are truncated at the model's length.
        batch_size: images at once.

    Returns:
        images and prompts -> float (B,) in [0, 1], for ``Evaluators.adherence``.
    """

    def scores(batch: np.ndarray, prompts: Sequence[str]) -> Any:
        words = {"text": list(prompts), "padding": True, "truncation": True}
        inputs = processor(images=list(batch), **words, return_tensors="pt").to(model.device)
        return model(**inputs, use_itm_head=True).itm_score.softmax(-1)[:, 1]

    return _in_batches(scores, batch_size)


def aesthetic_quality(model: Any, processor: Any, head: Any, batch_size: int = 16) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that computes an aesthetic score from CLIP's image embeddings, like LAION's predictor.

    Args:
        model: a transformers ``CLIPVisionModelWithProjection``.
        processor: its image processor.
        head: the predictor, a module from normalised embeddings (B, d) to (B, 1).
        batch_size: images at once.

    Returns:
        images -> float (B,), for ``Evaluators.quality``.
    """

    def scores(batch: np.ndarray) -> Any:
        inputs = processor(images=list(batch), return_tensors="pt").to(model.device)
        return head(_unit(model(**inputs).image_embeds))[:, 0]

    return _in_batches(scores, batch_size)


def segmenter_masks(model: Any, processor: Any, batch_size: int = 8) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that computes foreground masks with a transformers segmentation model.

    Args:
        model: returns ``logits`` (B, classes, h, w); with one class a positive logit is foreground, with more every
            class but class 0.
        processor: its image processor.
        batch_size: images at once.

    Returns:
        images -> boolean (B, H, W), for ``Evaluators.masks``.
    """

    def masks(batch: np.ndarray) -> Any:
        from torch.nn.functional import interpolate

        logits = model(**processor(images=list(batch), return_tensors="pt").to(model.device)).logits
        logits = interpolate(logits.float(), batch.shape[1:3], mode="bilinear", align_corners=False)
        return logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1) > 0

    return _in_batches(masks, batch_size)


def _unit(x: Any) -> Any:
    return x / x.norm(dim=-1, keepdim=True)


def _in_batches(function: Callable, batch_size: int) -> Callable:
    """Return the same function over batches, without gradients, its results concatenated on the host."""

    def whole(*arguments: Any) -> np.ndarray:
        import torch

        with torch.no_grad():
            parts = [
                function(*(a[start : start + batch_size] for a in arguments)).cpu().numpy()
                for start in range(0, len(arguments[0]), batch_size)
            ]
        return np.concatenate(parts)

    return whole
