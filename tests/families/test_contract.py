"""One contract that every architecture keeps: exact events, exact edits, and a model that comes back as it was."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
import torch
import xarray as xr

import malib
from malib import (
    BottomK,
    Channels,
    ChannelStats,
    Clusters,
    Disrupt,
    DiT,
    DoseMatched,
    EnergyMatched,
    Gates,
    HiddenStates,
    Images,
    Interpolate,
    RandomK,
    Renoised,
    TopK,
    Transport,
)
from malib.latents import interpolated
from malib.spatial import kmeans, min_max
from malib.window import Window

from .. import architectures
from ..closeness import assert_apart, assert_close

PROMPTS = ["a red star", "a small blue ring on the left"]
STEPS = 3


def naive(dit: DiT, cfg: float | None) -> dict[tuple[int, str, int], torch.Tensor]:
    """Image-stream output of every block by (step, branch, layer): hooks by hand, and what is known of the pipeline."""
    known, seen = architectures.KNOWN[dit.name], []
    handles = []
    for block in dit.blocks:
        pick = known.image[block.name.split()[0]]
        handles.append(block.module.register_forward_hook(lambda m, a, output, pick=pick: seen.append(pick(output).clone())))
    dit.generate(PROMPTS, steps=STEPS, cfg=cfg)
    for handle in handles:
        handle.remove()
    calls = (("cond",),) if cfg == 1 else known.calls
    found, layers = {}, len(dit.blocks)
    for index, x in enumerate(seen):
        call, layer = divmod(index, layers)
        names = calls[call % len(calls)]
        for branch, part in zip(names, x.chunk(len(names)), strict=True):
            found[call // len(calls), branch, layer] = part
    return found


def check_records(dit: DiT, cfg: float | None) -> None:
    generation = dit.generate(PROMPTS, steps=STEPS, cfg=cfg, record=[ChannelStats(), HiddenStates()])
    stats, full = generation.records.channel_stats, generation.records.hidden_states
    known = architectures.KNOWN[dit.name]
    branches = ["cond"] if cfg == 1 or dit.name == "flux2-dev" else ["cond", "uncond"]
    assert list(stats.branch.values) == branches
    assert stats.sizes["step"] == STEPS and stats.sizes["layer"] == len(dit.blocks)
    assert full.sizes["token"] == known.tokens == np.prod(dit.grid())
    seen = naive(dit, cfg)
    assert len(seen) == STEPS * len(branches) * len(dit.blocks)
    for (step, branch, layer), x in seen.items():
        at, x = {"step": step, "branch": branch, "layer": layer}, x.float()
        assert np.array_equal(stats.score.sel(at), x.mean(1).abs())
        assert np.array_equal(stats.magnitude.sel(at), x.abs().mean(1))
        assert np.array_equal(stats.maximum.sel(at), x.abs().amax(1))
        assert np.array_equal(stats.energy.sel(at), x.square().mean(1))
        assert np.array_equal(full.value.sel(at), x)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_records_equal_a_naive_hook_bit_for_bit(any_dit: DiT, cfg: float) -> None:
    check_records(any_dit, cfg)


@pytest.mark.parametrize("name", list(architectures.KNOWN))
def test_records_in_bf16_equal_a_naive_hook(name: str) -> None:
    dit = DiT(architectures.build(name).to(torch.bfloat16), name=name)
    check_records(dit, None)


@pytest.mark.parametrize("name", list(architectures.KNOWN))
def test_a_changed_patch_is_one_token_in_its_row_and_column(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One patch of the initial noise, found by pixels; pictures twice as wide as high where the model draws such."""
    dit = DiT(architectures.build(name), name=name)
    height, width = (32, 32) if name == "dit-xl" else (32, 64)
    rows, columns = dit.grid((height, width))
    module, row, column = sys.modules[type(dit.pipeline).__module__], 2, columns - 3
    draw, record = module.randn_tensor, HiddenStates(layers=0, point="input", branches="cond")

    def poked(*args, **kwargs):
        noise = draw(*args, **kwargs)
        side = noise.shape[-2] // rows
        noise[..., row * side : (row + 1) * side, column * side : (column + 1) * side] += 1
        return noise

    plain = dit.generate(PROMPTS[0], steps=1, size=(height, width), record=[record])
    monkeypatch.setattr(module, "randn_tensor", poked)
    other = dit.generate(PROMPTS[0], steps=1, size=(height, width), record=[record])
    one, two = (run.records.hidden_states.value.squeeze().values for run in (plain, other))
    assert (one != two).any(-1).nonzero()[0].tolist() == [row * columns + column]
    assert plain.images.shape[1:3] == (height, width)


def test_branches_see_their_own_prompt(any_dit: DiT) -> None:
    """At the first step, cond with guidance equals the only branch without; uncond does not know the prompt."""
    guided = any_dit.generate(PROMPTS, steps=1, cfg=3.0, record=[ChannelStats()]).records.channel_stats
    plain = any_dit.generate(PROMPTS, steps=1, cfg=1.0, record=[ChannelStats()]).records.channel_stats
    assert_close(guided.score.sel(branch="cond"), plain.score.sel(branch="cond"))
    other = any_dit.generate(PROMPTS[::-1], seeds=0, steps=1, cfg=3.0, record=[ChannelStats()]).records.channel_stats
    assert_close(guided.score.sel(branch="uncond"), other.score.sel(branch="uncond"))
    assert_apart(guided.score.sel(branch="cond"), other.score.sel(branch="cond"))


def test_steps_and_sigmas_on_the_second_call_too(any_dit: DiT) -> None:
    for steps in (2, 4):
        stats = any_dit.generate(PROMPTS, steps=steps, record=[ChannelStats(top=0)]).records.channel_stats
        assert list(stats.step.values) == list(range(steps))
        sigmas, scheduler = stats.sigma.values, any_dit.pipeline.scheduler
        assert (np.diff(sigmas) < 0).all()
        if any_dit.name in ("pixart", "dit-xl"):  # trained as DDPM: the variance of the noise that was added
            known = (1 - scheduler.alphas_cumprod[scheduler.timesteps.long()]).sqrt()
        else:
            known = scheduler.sigmas[:steps]
        assert_close(sigmas, known.numpy())


@pytest.mark.parametrize("name", ["flux-guided", "flux2-dev"])
def test_embedded_guidance_is_one_branch_and_changes_the_image(name: str) -> None:
    dit = DiT(architectures.build(name), cache=False)
    low = dit.generate(PROMPTS, steps=2, guidance=1.0, record=[ChannelStats()])
    high = dit.generate(PROMPTS, steps=2, guidance=8.0)
    assert list(low.records.channel_stats.branch.values) == ["cond"]
    assert not np.array_equal(low.latents, high.latents)


def test_recording_and_no_edits_leave_images_bit_identical(any_dit: DiT) -> None:
    plain = any_dit.generate(PROMPTS, steps=STEPS)
    watched = any_dit.generate(PROMPTS, steps=STEPS, record=[ChannelStats(), HiddenStates(layers=1), Gates()])
    assert np.array_equal(plain.images, watched.images) and np.array_equal(plain.latents, watched.latents)


def test_an_image_does_not_depend_on_its_place_in_the_batch(any_dit: DiT) -> None:
    """Tolerance: 1e-3 of the latents' standard deviation, for matrix products may sum in another order."""
    together = any_dit.generate([*PROMPTS, "a cross"], seeds=[5, 6, 7], steps=STEPS)
    alone = any_dit.generate(PROMPTS[1], seeds=6, steps=STEPS)
    moved = any_dit.generate([PROMPTS[1], "a cross", *PROMPTS, "a star", "a ring"], seeds=[6, 1, 2, 3, 4, 5], steps=STEPS)
    tolerance = 1e-3 * together.latents.std()
    assert np.abs(together.latents[1] - alone.latents[0]).max() < tolerance
    assert np.abs(moved.latents[0] - alone.latents[0]).max() < tolerance
    assert_apart(together.latents[0], together.latents[1])


@pytest.mark.parametrize("rule", [TopK(3), BottomK(3), RandomK(3, seed=1), EnergyMatched(2), Channels((0, 5))])
def test_disrupt_changes_the_named_entries_alone(any_dit: DiT, rule: malib.rules.Rule) -> None:
    """Only layer 1, step 0, branch cond: there the selected channels are zero and all others as they were."""
    window = {"layers": 1, "steps": 0, "branches": "cond"}
    before = any_dit.generate(PROMPTS, steps=2, record=[HiddenStates()]).records.hidden_states.value
    run = any_dit.generate(PROMPTS, steps=2, edits=[Disrupt(rule, **window)], record=[HiddenStates()])
    after, mask = run.records.hidden_states.value, run.records.disrupt.mask
    assert mask.sizes["step"] == mask.sizes["branch"] == mask.sizes["layer"] == 1
    chosen = mask.isel(step=0, branch=0, layer=0).values[:, None, :]
    site = {"step": 0, "branch": "cond", "layer": 1}
    assert (after.sel(site).values[np.broadcast_to(chosen, after.sel(site).shape)] == 0).all()
    assert np.array_equal(np.where(chosen, 0, before.sel(site)), after.sel(site))
    untouched = [{"step": 0, "branch": "uncond"}, {"step": 0, "branch": "cond", "layer": 0}]
    for at in untouched:
        assert np.array_equal(before.sel(at), after.sel(at))
    assert not np.array_equal(before.sel(step=1), after.sel(step=1))


def test_every_mode_of_disrupt_keeps_to_its_tokens(any_dit: DiT) -> None:
    before = any_dit.generate(PROMPTS, steps=1, record=[HiddenStates()]).records.hidden_states.value
    for mode in ("zero", "mean", "scale", "rotate"):
        edit = Disrupt(TopK(3), mode=mode, layers=1, tokens=(0, 3))
        after = any_dit.generate(PROMPTS, steps=1, edits=[edit], record=[HiddenStates()]).records.hidden_states.value
        moved = (before.sel(layer=1).values != after.sel(layer=1).values).any((0, 1, 2, 4))
        assert moved.nonzero()[0].tolist() == [0, 3], mode


def test_disrupt_at_the_input_equals_disrupt_at_the_output_before(any_dit: DiT) -> None:
    rule = Channels((1, 4))
    out = any_dit.generate(PROMPTS, steps=2, edits=[Disrupt(rule, layers=0)])
    into = any_dit.generate(PROMPTS, steps=2, edits=[Disrupt(rule, layers=1, point="input")])
    assert np.array_equal(out.latents, into.latents)


def test_gates_are_what_the_blocks_multiply_with(any_dit: DiT) -> None:
    """A block's output is its input plus the gated outputs of its parts, seen by hooks written by hand."""
    known, seen, handles = architectures.KNOWN[any_dit.name], {}, []
    first = {block.name.split()[0]: block for block in reversed(any_dit.blocks)}
    for label, block in first.items():
        for gate, part, pick in known.terms[label]:

            def hook(module, args, output, at=(label, gate, part), pick=pick):
                seen.setdefault(at, pick(output).clone())  # CogView4's MLP reads the text after the image

            handles.append(block.module.get_submodule(part).register_forward_hook(hook))
    ends = [HiddenStates(point="input"), HiddenStates()]
    run = any_dit.generate(PROMPTS, steps=1, cfg=1.0, record=[*ends, Gates()]).records
    for handle in handles:
        handle.remove()
    for label, block in first.items():
        before, after, gates = (
            torch.tensor(x.isel(step=0, branch=0).sel(layer=block.layer).values)
            for x in (run.hidden_states.value, run.hidden_states_2.value, run.gates.value)
        )
        names = list(run.gates.gate.values)
        for (of, gate, _), x in seen.items():
            if of == label:
                before = before + (x if gate is None else gates[:, names.index(gate), None] * x)
        assert_close(after, before)


def test_gates_of_the_text_stop_where_its_stream_does(any_dit: DiT) -> None:
    run = any_dit.generate(PROMPTS, steps=1, cfg=1.0, record=[Gates(stream="text")]).records.gates
    known = any(gate.stream == "text" for stack in any_dit.family.stacks for gate in stack.gates)
    assert ("value" in run) == known
    if any_dit.name == "sd3":  # the last block has no text gates
        assert list(run.layer) == [0, 1] and run.value.notnull().all()


@pytest.mark.parametrize("where", ["block", "scheduler", "record", "edit"])
def test_after_an_exception_the_model_is_as_before(any_dit: DiT, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = any_dit.generate(PROMPTS, steps=STEPS)
    pipeline, modules = any_dit.pipeline, list(any_dit.pipeline.transformer.modules())
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "block":
            patch.setattr(any_dit.blocks[1].module, "forward", fail)
        elif where == "scheduler":
            patch.setattr(type(pipeline.scheduler), "step", fail)
        elif where == "record":
            patch.setattr(malib.records._ChannelStatsListener, "__call__", fail)
        else:
            patch.setattr(malib.edits._DisruptListener, "__call__", fail)
        any_dit.generate(PROMPTS, steps=STEPS, edits=[Disrupt(TopK(2))], record=[ChannelStats()])
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    assert "step" not in vars(pipeline.scheduler) and "cache_context" not in vars(pipeline.transformer)
    again = any_dit.generate(PROMPTS, steps=STEPS)
    assert np.array_equal(reference.latents, again.latents)


def test_text_stream_where_there_is_one(any_dit: DiT) -> None:
    """FLUX has text in every block, SD3 not after its last, Sana nowhere; it is another tensor than the image."""
    records = [HiddenStates(stream="text", branches="cond"), HiddenStates(branches="cond")]
    run = any_dit.generate(PROMPTS, steps=1, record=records).records
    count = architectures.KNOWN[any_dit.name].text
    assert run.hidden_states.sizes.get("layer", 0) == count
    if count:
        at = {"layer": 0, "step": 0, "branch": 0}
        text, image = run.hidden_states.value.isel(at).values, run.hidden_states_2.value.isel(at).values
        assert not {t.tobytes() for t in text.reshape(-1, text.shape[-1])} & {
            t.tobytes() for t in image.reshape(-1, text.shape[-1])
        }


def test_edits_of_a_joined_tensor_keep_to_their_stream(any_dit: DiT) -> None:
    """In the last block with text: disrupting one stream leaves the other's output as it was."""
    last = architectures.KNOWN[any_dit.name].text - 1
    if last < 0:
        pytest.skip("no block returns text")
    streams = [HiddenStates(stream=s, layers=last, branches="cond") for s in ("image", "text")]
    plain = any_dit.generate(PROMPTS, steps=1, record=streams).records
    for stream, kept in (("image", "hidden_states_2"), ("text", "hidden_states")):
        edit = Disrupt(Channels((1, 4)), layers=last, stream=stream)
        run = any_dit.generate(PROMPTS, steps=1, edits=[edit], record=streams).records
        moved = "hidden_states" if stream == "image" else "hidden_states_2"
        assert vars(run)[kept].value.equals(vars(plain)[kept].value)
        expected = vars(plain)[moved].value.values.copy()
        expected[..., [1, 4]] = 0
        assert np.array_equal(vars(run)[moved].value, expected)


def test_running_means_equal_the_means_of_what_is_kept(any_dit: DiT) -> None:
    """Averaging while running, over batches of uneven size, gives what keeping all and averaging gives."""
    prompts, window = [*PROMPTS, "a star", "a ring", "a cross"], {"steps": (0, 2)}
    kept = any_dit.generate(prompts, steps=STEPS, record=[ChannelStats(**window)]).records.channel_stats
    for keep in [("step", "branch", "layer"), ("layer",), ("sample", "layer")]:
        run = any_dit.generate(prompts, steps=STEPS, record=[ChannelStats(keep=keep, top=0, **window)])
        mean, dims = run.records.channel_stats, [a for a in malib.records.AXES if a not in keep]
        assert_close(mean.score, kept.score.mean(dims).transpose(*mean.score.dims))
        assert_close(mean.score_std, kept.score.std(dims).transpose(*mean.score.dims))
        assert np.array_equal(mean.maximum, kept.maximum.max(dims).transpose(*mean.maximum.dims))


def test_top_channels_are_the_highest_scores(any_dit: DiT) -> None:
    stats = any_dit.generate(PROMPTS, steps=2, record=[ChannelStats(top=5)]).records.channel_stats
    picked = np.take_along_axis(stats.score.values, stats.top_channel.values, axis=-1)
    assert np.array_equal(picked, stats.top_score)
    assert np.array_equal(np.sort(stats.score.values, axis=-1)[..., ::-1][..., :5], stats.top_score)


def test_hidden_states_of_a_rule_and_of_tokens(any_dit: DiT) -> None:
    full = any_dit.generate(PROMPTS, steps=1, record=[HiddenStates()]).records.hidden_states
    record = HiddenStates(channels=TopK(3), tokens=(0, 7))
    some = any_dit.generate(PROMPTS, steps=1, record=[record]).records.hidden_states
    ids = some.channel_id.values[..., None, :].astype(int)
    expected = np.take_along_axis(full.value.sel(token=[0, 7]).values, ids, axis=-1)
    assert np.array_equal(expected, some.value) and list(some.token) == [0, 7]


def test_clusters_are_those_of_the_recorded_states(any_dit: DiT) -> None:
    """The record's labels and heat equal k-means on the hidden states in full."""
    for rule in (TopK(4), EnergyMatched(2)):
        run = any_dit.generate(PROMPTS, steps=1, cfg=1.0, record=[Clusters(channels=rule), HiddenStates()])
        found, x = run.records.clusters, torch.tensor(run.records.hidden_states.value.values)[:, 0, 0, 1]
        scaled, mask = min_max(x), rule.mask(x, 1)
        for i in range(2):
            assert_close(found.heat[i, 0, 0, 1], scaled[i][:, mask[i]].mean(1))
        if isinstance(rule, TopK):
            points = scaled.gather(2, rule.ids(x, 1)[:, None].expand(-1, x.shape[1], -1))
            assert np.array_equal(found.label[:, 0, 0, 1], kmeans(points))
        else:
            assert np.array_equal(found.label[:, 0, 0, 1], kmeans(scaled * mask[:, None]))


SOURCES = ["a large yellow cross on the right", "a white square"]


def test_transport_of_a_sample_onto_itself_or_of_no_strength_changes_nothing(any_dit: DiT) -> None:
    plain = any_dit.generate(PROMPTS, steps=STEPS).latents
    for edit in (Transport(TopK(4), PROMPTS), Transport(TopK(4), SOURCES, strength=0.0)):
        assert_close(any_dit.generate(PROMPTS, steps=STEPS, edits=[edit]).latents, plain)
    moved = any_dit.generate(PROMPTS, steps=STEPS, edits=[Transport(TopK(4), SOURCES)]).latents
    assert_apart(moved, plain)


def test_all_channels_of_all_tokens_are_the_sources_states(any_dit: DiT) -> None:
    last = HiddenStates(layers=len(any_dit.blocks) - 1)
    every = Transport(TopK(any_dit.width), SOURCES)
    moved, source = (
        any_dit.generate(prompts, steps=STEPS, record=[last], edits=edits).records.hidden_states.value
        for prompts, edits in ((PROMPTS, [every]), (SOURCES, []))
    )
    first = {"step": 0}  # later steps start from other latents, but every step ends in the source's own states
    assert_close(moved.sel(first), source.sel(first))
    assert_close(moved, source)


def test_a_recorded_source_does_what_a_batched_one_does(any_dit: DiT) -> None:
    rule, window = TopK(4), {"layers": (0, 1), "branches": "cond"}
    once = any_dit.generate(SOURCES, steps=STEPS, record=[HiddenStates(channels=rule, **window)])
    for mask in (None, "source", "union"):
        paired, replayed = (
            any_dit.generate(PROMPTS, steps=STEPS, edits=[Transport(rule, source, mask=mask, **window)])
            for source in (SOURCES, once)
        )
        assert_close(replayed.latents, paired.latents)
        assert replayed.records.transport.mask.equals(paired.records.transport.mask)
    one = any_dit.generate(SOURCES[:1], [5], steps=STEPS, record=[HiddenStates(channels=rule, **window)])
    spread, each = (
        any_dit.generate(PROMPTS, steps=STEPS, edits=[Transport(rule, source, seeds=seeds, **window)]).latents
        for source, seeds in ((one, None), (SOURCES[:1], (5,)))
    )
    assert_close(spread, each)


def test_a_matched_transport_reads_each_samples_amount_in_any_batch(any_dit: DiT) -> None:
    top = any_dit.generate(PROMPTS, steps=STEPS, edits=[Transport(TopK(2), SOURCES)]).records.transport
    lopsided = top.dose * xr.DataArray([1.0, 0.0], dims="sample")  # the second sample is to stay as it is
    edit = Transport(DoseMatched(2, doses=lopsided), SOURCES)
    kept, any_dit.batch_size = any_dit.batch_size, 1
    try:
        parts = any_dit.generate(PROMPTS, steps=STEPS, edits=[edit]).records.transport
    finally:
        any_dit.batch_size = kept
    whole = any_dit.generate(PROMPTS, steps=STEPS, edits=[edit]).records.transport
    assert parts.mask.equals(whole.mask) and whole.mask[0].any() and not whole.mask[1].any()
    assert (whole.dose[1] == 0).all()


def test_an_edit_that_meets_no_site_is_refused(any_dit: DiT) -> None:
    both = any("text" in b.stack.returns for b in any_dit.blocks)
    if not both:
        with pytest.raises(ValueError, match="no block of its layers has"):
            any_dit.generate(PROMPTS, steps=1, edits=[Disrupt(TopK(1), stream="text")])
    else:
        changed = any_dit.generate(PROMPTS, steps=1, edits=[Disrupt(TopK(1), stream="text")]).records.disrupt
        assert changed.mask.any()


def test_a_source_recorded_at_other_noise_levels_is_refused(flux_dit: DiT) -> None:
    rule = TopK(2)
    once = flux_dit.generate(SOURCES, steps=2, record=[HiddenStates(channels=rule)])
    images = np.zeros((2, flux_dit.size, flux_dit.size, 3), np.uint8)
    with pytest.raises(ValueError, match="the same start"):
        flux_dit.generate(PROMPTS, steps=2, start=Renoised(images, 0.5), edits=[Transport(rule, once)])


def test_auxiliary_samples_are_seen_by_their_edit_alone_and_batches_do_not_matter(any_dit: DiT) -> None:
    """Two transports and a disruption in one call; readers and other writers see the targets alone."""
    edits = [
        Transport(TopK(3), SOURCES, mask="source"),
        Disrupt(TopK(2)),
        Transport(BottomK(2), "a ring", layers=1, select_on="union", mask="target"),
    ]
    whole = any_dit.generate(PROMPTS, steps=STEPS, edits=edits, record=[ChannelStats(top=0), Gates()])
    assert whole.records.channel_stats.sizes["sample"] == whole.records.disrupt.sizes["sample"] == 2
    assert whole.images.shape[0] == whole.records.gates.sizes["sample"] == 2
    kept, any_dit.batch_size = any_dit.batch_size, 1
    try:
        parts = any_dit.generate(PROMPTS, steps=STEPS, edits=edits, record=[ChannelStats(top=0)])
    finally:
        any_dit.batch_size = kept
    assert_close(parts.latents, whole.latents)
    assert parts.records.transport.mask.equals(whole.records.transport.mask)


def test_interpolated_prompts_lead_from_the_target_to_the_source(any_dit: DiT) -> None:
    if not any_dit.family.conditioning:
        with pytest.raises(ValueError, match="cannot mix"):
            any_dit.generate(PROMPTS, steps=1, edits=[Interpolate(source=SOURCES)])
        return
    target, source = any_dit.generate(PROMPTS, steps=STEPS), any_dit.generate(SOURCES, steps=STEPS)
    masked = any("mask" in name for name in any_dit.family.conditioning)  # then the target's own tokens stay visible
    start, full = (
        any_dit.generate(PROMPTS, steps=STEPS, edits=[Interpolate(source=SOURCES, strength=s)]).latents for s in (0.0, 1.0)
    )
    if masked:
        assert_apart(start, full)
    else:
        assert_close(start, target.latents)
        assert_close(full, source.latents)
    half = any_dit.generate(PROMPTS, steps=STEPS, edits=[Interpolate(source=SOURCES)]).latents
    assert_apart(half, target.latents)
    assert_apart(half, source.latents)
    again = any_dit.generate(PROMPTS, steps=STEPS, edits=[Interpolate(source=PROMPTS, strength=0.7)]).latents
    assert_close(again, target.latents)


def refused(dit: DiT, ways: tuple[str, ...] = ("flow", "ddpm")) -> bool:
    """Whether pictures cannot enter this architecture so; that it says so is checked here."""
    if dit.family.images in ways:
        return False
    with pytest.raises(ValueError, match="Images cannot enter"):
        if "ddpm" in ways:
            dit.encode(np.zeros((1, 32, 32, 3), np.uint8))
        else:
            source = Images(np.zeros((1, 32, 32, 3), np.uint8))
            dit.generate(PROMPTS, steps=1, edits=[Transport(TopK(1), source)])
    return True


def test_latents_decode_to_the_pictures_they_were(any_dit: DiT) -> None:
    if refused(any_dit):
        return
    run = any_dit.generate(PROMPTS, steps=STEPS)
    assert np.abs(any_dit.decode(run.latents).astype(int) - run.images).max() <= 1


@pytest.mark.parametrize("name", ["flux", "flux2-klein", "qwen-image"])
def test_latents_are_normalised_as_the_transformer_was_trained(name: str) -> None:
    """By the pipeline's own function, or by hand from the autoencoder's settings."""
    dit = DiT(architectures.build(name))
    images = np.random.default_rng(0).integers(0, 255, size=(2, dit.size, dit.size, 3), dtype=np.uint8)
    pixels, vae = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, dit.pipeline.vae
    with torch.no_grad():
        if name == "flux2-klein":
            expected = dit.pipeline._encode_vae_image(pixels, None)
        elif name == "qwen-image":
            mean, std = (torch.tensor(vae.config[n])[None, :, None, None] for n in ("latents_mean", "latents_std"))
            expected = (vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0] - mean) / std
        else:
            expected = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert_close(dit.encode(images), expected)


def test_a_picture_is_read_at_every_noise_level_with_the_targets_noise(any_dit: DiT) -> None:
    if refused(any_dit, ("flow",)):
        return
    side, prompt = any_dit.size, SOURCES[0]
    images = np.random.default_rng(0).integers(0, 255, size=(1, side, side, 3), dtype=np.uint8)
    first = HiddenStates(layers=0, branches="cond")
    edit = Transport(TopK(any_dit.width), Images(images, prompt), layers=0)
    moved = any_dit.generate(PROMPTS[0], 3, steps=STEPS, edits=[edit], record=[first]).records.hidden_states
    assert moved.value.notnull().all() and moved.sizes["step"] == STEPS
    if type(any_dit.pipeline).__name__ == "SanaPipeline":
        pytest.skip("Sana's own solver begins below sigma 1 and rounds its timesteps, so no single step is comparable")
    for step, sigma in enumerate(moved.sigma.values):
        start = Renoised(images, float(sigma))
        read = any_dit.generate(prompt, 3, steps=1, start=start, record=[first]).records.hidden_states
        assert_close(moved.value.isel(step=step), read.value.isel(step=0))


@pytest.mark.parametrize("name", ["flux", "flux2-klein", "qwen-image"])
def test_inversion_follows_the_flow_upwards(name: str) -> None:
    """Where the velocity is c everywhere, the path from a picture leads along c."""
    dit = DiT(architectures.build(name))
    dit.pipeline.transformer.proj_out.register_forward_hook(lambda module, args, output: torch.full_like(output, 0.7))
    images = np.random.default_rng(0).integers(0, 255, size=(2, dit.size, dit.size, 3), dtype=np.uint8)
    clean, path = dit.encode(images), dit.invert(images, ["", ""], 4)
    assert len(path) == 5
    for index, latents in enumerate(path):
        assert_close(latents, clean + 0.7 * index / 4)
    at = interpolated(path)
    assert_close(at(0.6), clean + 0.42)


def test_starting_from_pictures(any_dit: DiT) -> None:
    """At almost no noise nothing is left to do; the noise is that of the seed; the pipeline keeps its scheduler."""
    if refused(any_dit):
        return
    own, side = any_dit.pipeline.scheduler, any_dit.size
    images = np.random.default_rng(0).integers(0, 255, size=(2, side, side, 3), dtype=np.uint8)
    clean = any_dit.encode(images)
    still = any_dit.generate(PROMPTS, steps=1, cfg=1.0, start=Renoised(images, 1e-4))
    least = 2e-2 if any_dit.family.images == "flow" else 0.1  # the first timestep of a DDPM has noise of 0.01
    assert_close(still.latents, any_dit.latents.pack(clean), least)
    half = any_dit.generate(PROMPTS, steps=2, start=Renoised(images, 0.5), record=[ChannelStats(top=0)])
    if any_dit.family.images == "flow":
        assert half.records.channel_stats.sigma.values.tolist() == [0.5, 0.25]
    else:
        assert_close(half.records.channel_stats.sigma[0], 0.5, 0.02)
    other = any_dit.generate(PROMPTS, seeds=9, steps=2, start=Renoised(images, 0.5))
    assert_apart(half.latents, other.latents)
    if any_dit.name not in ("sana", "pixart"):  # their own schedulers are other solvers
        noise = any_dit.generate(PROMPTS, steps=1, start=Renoised(images, 1.0))
        assert_close(noise.latents, any_dit.generate(PROMPTS, steps=1).latents)
    assert any_dit.pipeline.scheduler is own


@pytest.mark.parametrize(
    "name", ["flux", "flux2-klein", "qwen-image", "sd3", "sana", "pixart", "auraflow", "chroma", "z-image"]
)
def test_pictures_enter_in_bf16_too(name: str) -> None:
    """Some pipelines draw their noise in fp32 whatever the weights are."""
    dit = DiT(architectures.build(name).to(torch.bfloat16), name=name)
    images = np.random.default_rng(0).integers(0, 255, size=(1, dit.size, dit.size, 3), dtype=np.uint8)
    run = dit.generate(PROMPTS[0], steps=1, cfg=1.0, start=Renoised(images, 0.5), record=[ChannelStats(top=0)])
    assert np.isfinite(run.latents).all() and run.records.channel_stats.score.notnull().all()


def test_classes_are_the_prompts_of_a_class_conditional_model() -> None:
    dit = DiT(architectures.build("dit-xl"), name="dit-xl")
    names = dit.prompts(3)
    by_name, by_number = (dit.generate(p, steps=1).latents for p in (names, [str(dit.pipeline.labels[n]) for n in names]))
    assert np.array_equal(by_name, by_number)
    with pytest.raises(ValueError, match="no class"):
        dit.generate("a purple cow", steps=1)
    with pytest.raises(ValueError, match="32 x 32 pixels alone"):
        dit.generate(names, steps=1, size=(32, 64))


def once(dit: DiT) -> malib.Generation:
    """A source recorded in one step."""
    return dit.generate(SOURCES, steps=1, record=[HiddenStates(channels=TopK(1))])


def test_a_source_recorded_with_other_weights_is_refused(flux_dit: DiT) -> None:
    edit, weight = Transport(TopK(1), once(flux_dit)), flux_dit.pipeline.transformer.proj_out.weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(ValueError, match="other weights"):
        flux_dit.generate(PROMPTS, steps=1, edits=[edit])
    with torch.no_grad():
        weight.sub_(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.generate([]), "list of prompts is empty"),
        (lambda d: d.generate(["a star", " "]), "Prompt 1"),
        (lambda d: d.generate(PROMPTS, seeds=[1]), "2 prompts but 1 seeds"),
        (lambda d: d.generate(PROMPTS, steps=0), "steps is 0"),
        (lambda d: d.generate(PROMPTS, edits=[Disrupt(TopK(10_000))]), "k=10000 exceeds"),
        (lambda d: d.generate(PROMPTS, edits=[Disrupt(Channels((99_999,)))]), "Channels 99999"),
        (lambda d: d.generate(PROMPTS, record=[ChannelStats(layers=99)]), "layers 0 to"),
        (lambda d: d.generate(PROMPTS, steps=2, edits=[Disrupt(TopK(1), steps=(2,))]), "steps 0 to 1"),
        (lambda d: d.generate(PROMPTS, record=[HiddenStates(max_bytes=10)]), "max_bytes"),
        (lambda d: d.generate(PROMPTS, record=[ChannelStats(max_bytes=10)]), "max_bytes"),
        (lambda d: d.generate(PROMPTS, edits=[Disrupt(TopK(1), point="gate")]), "Point 'gate'"),
        (lambda d: d.generate(PROMPTS, guidance=3.5), "no embedded guidance"),
        (lambda d: d.generate(PROMPTS, start=Renoised(np.zeros((1, 32, 32, 3), np.uint8), 0.5)), "1 images of 32 x 32"),
        (lambda d: Renoised(np.zeros((1, 32, 32, 3), np.uint8), 1.5), "sigma is 1.5"),
        (lambda d: Renoised(np.zeros((1, 32, 32, 3)), 0.5), "must be uint8"),
        (lambda d: d.generate(PROMPTS, edits=[Transport(TopK(1), ["a", "b", "c"])]), "3 sources were given for 2"),
        (lambda d: d.generate(PROMPTS, edits=[Transport(TopK(1), SOURCES, mask=np.ones((3, 3)))]), "mask has shape"),
        (
            lambda d: d.generate(PROMPTS, edits=[Transport(TopK(1), Images(np.zeros((1, 8, 8, 3), np.uint8)))]),
            "8 x 8 pixels",
        ),
        (lambda d: Transport(TopK(1), d.generate(PROMPTS, steps=1)), "has no hidden states"),
        (lambda d: d.generate(PROMPTS, steps=2, edits=[Transport(TopK(1), once(d))]), "recorded in 1 steps"),
        (lambda d: Transport(TopK(1), once(d), select_on="target"), "its own selection rule chose"),
        (lambda d: Transport(TopK(1), once(d), mask="source", mask_channels=TopK(2)), "its own selection rule chose"),
        (lambda d: Transport(TopK(1), once(d), seeds=3), "its own noise"),
        (lambda d: d.generate(PROMPTS, steps=1, cfg=1.0, edits=[Disrupt(TopK(1), branches="uncond")]), "cond alone"),
        (lambda d: Transport(TopK(1), "a", strength=2.0), "strength is 2.0"),
        (lambda d: Transport(TopK(1), "a", mask="here"), "mask='here'"),
        (lambda d: Transport(TopK(1), "a", mask="source", stream="text"), "text tokens have none"),
    ],
)
def test_bad_input_gets_one_sentence(any_dit: DiT, call, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call(any_dit)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_windows_refuse_unknown_words() -> None:
    for bad in ({"stream": "audio"}, {"point": "middle"}, {"branches": "both"}):
        with pytest.raises(ValueError, match="use"):
            Window(**bad)


def test_the_scheduler_keeps_its_signature_while_tapped(any_dit: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sana's pipeline asks the signature whether the scheduler takes the generator."""
    scheduler, seen = any_dit.pipeline.scheduler, []
    wanted = list(inspect.signature(scheduler.step).parameters)
    monkeypatch.setattr(
        malib.records._ChannelStatsListener,
        "__call__",
        lambda self, event, x: seen.append(list(inspect.signature(scheduler.step).parameters)),
    )
    any_dit.generate(PROMPTS, steps=1, record=[ChannelStats()])
    assert seen and all(found == wanted for found in seen)


def test_a_compiled_transformer_is_refused(flux_dit: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux_dit.blocks[0].module, "_compiled_call_impl", lambda *a: None)
    with pytest.raises(RuntimeError, match="compiled"):
        flux_dit.generate(PROMPTS, steps=1)
