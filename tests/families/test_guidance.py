"""Detail Guidance and skip-layer guidance, on every architecture."""

from __future__ import annotations

import numpy as np
import pytest

from malib import (
    Channels,
    ChannelStats,
    DetailGuidance,
    Disrupt,
    DiT,
    HiddenStates,
    Interpolate,
    RandomK,
    SkipLayerGuidance,
    TopK,
    Transport,
)
from malib.edits import _InterpolateListener, _TransportListener
from malib.guidance import _GuidanceListener

from .. import architectures
from ..closeness import assert_apart, assert_close
from .test_contract import PROMPTS


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_step_moves_by_w_times_what_the_disruption_moves(any_dit: DiT, cfg: float) -> None:
    """A first-order solver's step is linear in the velocity, so the formula can be read off the latents of one step."""
    if any_dit.family.rescales and cfg > 1:
        pytest.skip("rescaled after guidance: test_a_rescaled_guidance_is_the_term_rescaled")
    w, rule, m = 1.5, TopK(3), 1
    plain, guided = (
        any_dit.generate(PROMPTS, steps=1, cfg=cfg, guide=guide).latents for guide in (None, DetailGuidance(w, m, rule))
    )
    own, degraded = (
        any_dit.generate(PROMPTS, steps=1, cfg=1.0, edits=edits).latents for edits in ([], [Disrupt(rule, layers=m)])
    )
    assert_close(guided - plain, w * (own - degraded), 2e-3)
    assert np.abs(own - degraded).max() > 1e-3


def test_a_rescaled_guidance_is_the_term_rescaled() -> None:
    """Qwen-Image gives the combined velocity the length, token by token, that the cond branch has: the guided one, too."""
    w, s, m, rule, dit = 1.5, 3.0, 1, TopK(3), DiT(architectures.build("qwen-image"))
    noise, seen = [], []
    with (
        dit.pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: noise.append(kwargs["hidden_states"][:2].clone()), with_kwargs=True
        ),
        dit.pipeline.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0][:2].clone())),
    ):
        dit.generate(PROMPTS, steps=1, cfg=s)
        cond, uncond = seen
        seen.clear()
        dit.generate(PROMPTS, steps=1, cfg=1.0, edits=[Disrupt(rule, layers=m)])
    pushed = cond + w / s * (cond - seen[0])
    mixed = uncond + s * (pushed - uncond)
    velocity = mixed * pushed.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
    found = dit.generate(PROMPTS, steps=1, cfg=s, guide=DetailGuidance(w, m, rule)).latents
    assert_close(found, noise[0] - velocity)


@pytest.mark.parametrize(("name", "guidance"), [("flux-guided", 2.5), ("flux2-dev", 4.0)])
def test_models_with_embedded_guidance_are_guided_in_their_one_branch(name: str, guidance: float) -> None:
    w, m, rule, dit = 1.5, 1, TopK(3), DiT(architectures.build(name))
    call = {"steps": 2, "guidance": guidance}
    plain = dit.generate(PROMPTS, **call).latents
    late = dit.generate(PROMPTS, **call, guide=DetailGuidance(w, m, rule, steps=1))
    assert late.records.detail_guidance.step.values.tolist() == [1] and not np.allclose(late.latents, plain, atol=1e-3)
    call["steps"] = 1
    guided, own, degraded = (
        dit.generate(PROMPTS, **call, **more).latents
        for more in ({"guide": DetailGuidance(w, m, rule)}, {}, {"edits": [Disrupt(rule, layers=m)]})
    )
    assert_close(guided - own, w * (own - degraded), 2e-3)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_push_is_the_mean_square_of_the_term(flux_dit: DiT, cfg: float) -> None:
    w, m, rule = 1.5, 1, TopK(3)
    for guide, edit in ((DetailGuidance(w, m, rule), "detail_guidance"), (SkipLayerGuidance(w, m), "skip_layer_guidance")):
        run = flux_dit.generate(PROMPTS, steps=1, cfg=cfg, guide=guide)
        plain = flux_dit.generate(PROMPTS, steps=1, cfg=cfg).latents  # one step of length 1: latents move by the velocity
        push = getattr(run.records, edit).push
        assert push.dims == ("sample", "step", "branch", "layer") and push.layer.values.tolist() == [m]
        moved = np.square(run.latents - plain).reshape(2, -1).mean(1)
        assert_close(push.values.ravel(), moved, 1e-3)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_many_steps_equal_a_loop_written_by_hand(name: str) -> None:
    w, s, m, steps, ids = 0.7, 3.0, 1, 4, [1, 4, 9]
    dit = DiT(architectures.build(name), name=name)
    found = dit.generate(PROMPTS, steps=steps, cfg=s, guide=DetailGuidance(w, m, Channels(tuple(ids)))).latents
    pipeline, model = dit.pipeline, dit.pipeline.transformer
    forward = model.forward

    def zeroed(module, args, output):
        output[1][..., ids] = 0

    def combined(*args, **kwargs):
        """In the place of the transformer: its outputs with the term of the paper added, by three plain calls."""
        output = forward(*args, **kwargs)
        handle = dit.blocks[m].module.register_forward_hook(zeroed)
        degraded = forward(*args, **kwargs)[0]
        handle.remove()
        x, half = output[0], len(output[0]) // 2
        cond = slice(half, None) if name == "sd3" else slice(None)
        if name == "sd3" or called["count"] % 2 == 0:
            x[cond] += w / s * (x[cond] - degraded[cond])
        called["count"] += 1
        return output

    def keep(pipeline, index, timestep, tensors):
        last.update(tensors)
        return {}

    called, last = {"count": 0}, {}
    model.forward = combined
    pipeline(**dit.arguments(PROMPTS, [0, 1], steps, s), callback_on_step_end=keep)
    del model.forward
    assert_close(found, last["latents"])


def test_no_weight_is_plain_generation_bit_for_bit(any_dit: DiT) -> None:
    plain = any_dit.generate(PROMPTS, steps=2).latents
    for guide in (DetailGuidance(0.0, 1), SkipLayerGuidance(0.0, 1)):
        assert np.array_equal(any_dit.generate(PROMPTS, steps=2, guide=guide).latents, plain)


def test_a_skipped_layer_is_the_model_without_it(any_dit: DiT) -> None:
    """D_m by hand: the block returns what it was given, in both streams."""
    known, m, w = architectures.KNOWN[any_dit.name], 1, 1.0
    block = any_dit.blocks[m]
    guided = any_dit.generate(PROMPTS, steps=1, cfg=1.0, guide=SkipLayerGuidance(w, m)).latents
    own = any_dit.generate(PROMPTS, steps=1, cfg=1.0).latents

    def passed(module, args, kwargs, output):
        entering = {name: kwargs.get(name) for name in block.stack.arguments.values()}
        for name, x in zip(dict.fromkeys(block.stack.arguments.values()), args, strict=False):
            entering[name] = x
        image = entering[block.stack.arguments["image"]]
        if not isinstance(output, tuple):
            return image
        text = entering["encoder_hidden_states"]
        return (image, text) if known.image[block.name.split()[0]](output) is output[0] else (text, image)

    handle = block.module.register_forward_hook(passed, with_kwargs=True)
    without = any_dit.generate(PROMPTS, steps=1, cfg=1.0).latents
    handle.remove()
    assert_close(guided - own, w * (own - without), 2e-3)


def test_the_selection_is_recorded_and_readers_see_the_guided_alone(any_dit: DiT) -> None:
    record = [ChannelStats(branches="cond", layers=1), HiddenStates(layers=1, branches="cond")]
    run = any_dit.generate(PROMPTS, steps=1, guide=DetailGuidance(1.0, 1, TopK(3)), record=record).records
    mask, stats = run.detail_guidance.mask, run.channel_stats
    assert mask.sizes["sample"] == stats.sizes["sample"] == run.hidden_states.sizes["sample"] == 2
    top = np.sort(stats.top_channel.values.reshape(2, -1)[:, :3], axis=1)
    assert np.array_equal(np.sort(np.stack([row.nonzero()[0] for row in mask.values.reshape(2, -1)]), axis=1), top)
    assert (run.hidden_states.value != 0).all()


def test_steps_outside_the_window_are_plain(any_dit: DiT) -> None:
    guide = DetailGuidance(2.0, 1, RandomK(3), steps=(1,))
    first = HiddenStates(layers=0, point="input", branches="cond", steps=(0, 1))
    plain, guided = (
        any_dit.generate(PROMPTS, steps=3, guide=g, record=[first]).records.hidden_states.value for g in (None, guide)
    )
    assert_close(plain, guided)
    assert_apart(any_dit.generate(PROMPTS, steps=3).latents, any_dit.generate(PROMPTS, steps=3, guide=guide).latents)


@pytest.mark.parametrize(
    ("guide", "edits", "kind", "words"),
    [
        (DetailGuidance(1.0, 99), [], ValueError, "layers 0 to"),
        (SkipLayerGuidance(1.0, 99), [], ValueError, "layers 0 to"),
        (DetailGuidance(1.0, 0), [Disrupt(TopK(1))], ValueError, "one of the two"),
        (TopK(1), [], TypeError, "DetailGuidance"),
    ],
)
def test_bad_guides_get_one_sentence(flux_dit: DiT, guide, edits, kind, words: str) -> None:
    with pytest.raises(kind, match=words):
        flux_dit.generate(PROMPTS, steps=1, guide=guide, edits=edits)


SOURCE = "a blue ring"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"guide": DetailGuidance(1.0, 1, TopK(3))}, [3, 3]),  # the uncond branch does without the degraded model
        ({"guide": SkipLayerGuidance(1.0, 1, steps=1)}, [2, 3]),
        ({"edits": [Interpolate(source=SOURCE, strength=0.5)]}, [2, 2]),  # of the source only the prompt is read
        ({"edits": [Transport(TopK(3), SOURCE, steps=0)]}, [4, 2]),
        ({"edits": [Transport(TopK(3), SOURCE, branches="cond")]}, [4, 4]),  # the source draws a picture of its own
    ],
)
def test_auxiliary_samples_are_batched_only_where_they_are_read(
    any_dit: DiT, wanted: dict, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that reach the first block in each step, over those asked for; and the same latents as if all were batched."""
    edited = wanted.get("edits", [None])[0]
    if (edited and any_dit.family.classes) or (isinstance(edited, Interpolate) and not any_dit.family.conditioning):
        pytest.skip("takes no prompts, or none that could be mixed")
    if not any_dit.family.cfg_argument:
        pytest.skip("has no true guidance")
    seen: list[int] = []

    def count(module, args, kwargs):
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    with any_dit.blocks[0].module.register_forward_pre_hook(count, with_kwargs=True):
        found = any_dit.generate(PROMPTS, steps=2, cfg=3.0, **wanted)
    assert (np.array(seen).reshape(2, -1).sum(1) / len(PROMPTS)).tolist() == expected
    for listener in (_GuidanceListener, _InterpolateListener, _TransportListener):
        monkeypatch.setattr(listener, "needs", lambda self, step, branch: True)
    whole = any_dit.generate(PROMPTS, steps=2, cfg=3.0, **wanted)
    assert_close(found.latents, whole.latents)


def test_a_guide_needs_one_block() -> None:
    for kind in (DetailGuidance, SkipLayerGuidance):
        with pytest.raises(TypeError, match="number of one block"):
            kind(1.0, None)
        assert kind(1.0, np.int64(1)) == kind(1.0, 1)
