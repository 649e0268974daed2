from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from malib.miniflux import architecture, probe, text, train
from malib.miniflux.architecture import PRESETS
from malib.miniflux.probe import load_probe

from ..closeness import assert_apart, assert_close

pytestmark = pytest.mark.slow

SMALL = replace(
    PRESETS["tiny"], single_blocks=2, steps=6, batch=2, warmup=2, scenes=16, vae_steps=2, vae_batch=4, card_captions=2
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A training of six steps, straight through."""
    out = tmp_path_factory.mktemp("train") / "straight"
    train.train(SMALL, 3, out, compiled=False)
    return out


def test_a_stopped_training_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch) -> None:
    out, real, calls = tmp_path / "stopped", train.draw_batch, []

    def stop_at_four(*args):
        calls.append(args[3])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train, "draw_batch", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        train.train(SMALL, 3, out, compiled=False)
    monkeypatch.setattr(train, "draw_batch", real)
    train.train(SMALL, 3, out, compiled=False)
    name = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    one, two = load_file(finished / name), load_file(out / name)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_the_exported_pipeline_opens_and_runs_without_malib(finished) -> None:
    from diffusers import DiffusionPipeline, FluxPipeline

    pipeline = DiffusionPipeline.from_pretrained(finished / "pipeline")
    assert type(pipeline) is FluxPipeline and pipeline.tokenizer_2.model_max_length == text.TEXT_LENGTH
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 32, "output_type": "np"}
    images = pipeline("a red star", negative_prompt="", true_cfg_scale=2.0, **call).images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()


def test_training_feeds_the_transformer_what_the_pipeline_feeds_it(finished) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(finished / "pipeline")
    captions = ["a red star", "a small blue ring on the left, on a plain green background"]
    with torch.no_grad():
        states, pooled = text.encode_text(pipeline, captions)
        theirs, their_pooled, text_ids = pipeline.encode_prompt(captions, None, max_sequence_length=text.TEXT_LENGTH)
    assert torch.equal(states, theirs) and torch.equal(pooled, their_pooled)
    ours_text, ours_image = architecture.position_ids("cpu")
    latents = torch.randn(1, 4, 32, 32)
    assert torch.equal(ours_text, text_ids)
    assert torch.equal(ours_image, pipeline._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32))
    assert torch.equal(architecture.pack(latents), pipeline._pack_latents(latents, 1, 4, 32, 32))


def test_the_end_of_the_caption_is_where_clip_pools(finished) -> None:
    """Two captions that differ only in their last word have different pooled vectors."""
    pipeline = architecture.build_pipeline(SMALL, 0)
    _, pooled = text.encode_text(pipeline, ["a red star", "a red ring", "a red star"])
    assert_close(pooled[0], pooled[2])
    assert_apart(pooled[0], pooled[1])


def test_probe_is_written_and_read_and_leaves_the_weights(finished, tmp_path) -> None:
    data = load_probe(finished / "probe.safetensors")
    assert list(data.train_step.values) == probe.probe_steps(SMALL.steps)
    assert data.score.dims == ("train_step", "sigma", "layer", "channel") and data.sizes["channel"] == 128
    assert list(data.block.values) == ["double 0", "single 0", "single 1"]
    again = tmp_path / "again.safetensors"
    probe.save_probe(data, again)
    assert load_probe(again).identical(data)


def test_nothing_is_planted_at_the_start() -> None:
    """Before training all gates are closed: every block passes its input through."""
    pipeline = architecture.build_pipeline(SMALL, 0)
    block = pipeline.transformer.transformer_blocks[0].eval()
    x, c, temb = torch.randn(1, 9, 128), torch.randn(1, 5, 128), torch.randn(1, 128)
    context, image = block(hidden_states=x, encoder_hidden_states=c, temb=temb)
    assert torch.equal(image, x) and torch.equal(context, c)


def test_another_training_in_the_same_folder_is_refused(finished) -> None:
    for changed, seed in ((SMALL, 4), (replace(SMALL, learning_rate=1.0), 3), (replace(SMALL, steps=3), 3)):
        with pytest.raises(ValueError, match="has another training"):
            train.train(changed, seed, finished, compiled=False)


def test_probe_steps_and_schedule() -> None:
    steps = probe.probe_steps(4000)
    assert steps[0] == 0 and steps[-1] == 4000 and 38 <= len(steps) <= 40 and np.diff(steps).min() > 0
    preset = replace(PRESETS["mini"], steps=1000, warmup=100, decay_share=0.25)
    assert train._schedule(0, preset) == 0.01 and train._schedule(500, preset) == 1.0
    assert train._schedule(875, preset) == pytest.approx(0.5)


def test_install_copies_what_the_notebooks_read_and_refuses_half_a_training(finished, tmp_path) -> None:
    train.install(finished, tmp_path)
    assert (tmp_path / "tiny-flux" / "model_index.json").exists() and (tmp_path / "probes" / "tiny-3.safetensors").exists()
    log = json.loads((tmp_path / "probes" / "tiny-3.json").read_text())
    assert log["seed"] == 3 and log["flow"][-1]["step"] == 6
    card = (tmp_path / "tiny-flux" / "README.md").read_text()
    assert "dB PSNR" in card and "| n | 2 | 2 |" in card and "--preset tiny --seed 3 --steps 6" in card
    train.install(finished, tmp_path / "bare", model=False)
    assert sorted(p.name for p in (tmp_path / "bare").rglob("*")) == ["probes", "tiny-3.json", "tiny-3.safetensors"]
    with pytest.raises(FileNotFoundError, match="no finished training"):
        train.install(tmp_path / "nowhere", tmp_path)


def test_loss_curves_are_held_to_each_other_over_their_common_steps() -> None:
    then = [{"step": s, "loss": 1.0, "held_out": 2.0} for s in (250, 500, 750)]
    now = [{"step": 500, "loss": 1.02, "held_out": 1.94}, {"step": 1000, "loss": 9.0, "held_out": 9.0}]
    assert train.loss_deviation(now, then) == pytest.approx(0.03)
    with pytest.raises(ValueError, match="share no step"):
        train.loss_deviation(now, then[:1])
    assert train.loss_deviation([*now, {"step": 750, "loss": float("nan"), "held_out": 2.0}], then) == float("inf")


def test_the_command_says_when_a_loss_curve_has_left_its_band(finished, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    train.install(finished, tmp_path, model=False)
    log = tmp_path / "probes" / "tiny-3.json"
    call = [
        "--preset",
        "tiny",
        "--seed",
        "3",
        "--out",
        str(finished),
        "--eager",
        "--device",
        "cpu",
        "--compare",
        str(tmp_path),
    ]
    train.main(call)
    assert "deviation" in capsys.readouterr().out
    about = json.loads(log.read_text())
    about["flow"][-1]["loss"] *= 1.2
    log.write_text(json.dumps(about))
    with pytest.raises(SystemExit):
        train.main(call)
    assert "left its band" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*call[:-1], str(tmp_path / "nothing")])
    assert "no loss curve" in capsys.readouterr().err


def test_an_installed_training_goes_on_where_its_folder_is_lost(finished, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    data, out = tmp_path / "data", tmp_path / "again"
    train.install(finished, data)
    longer = replace(SMALL, steps=10, shift=1.0)
    train.revive(data, longer, 3, out)
    state, shipped = torch.load(out / "checkpoint.pt"), load_file(finished / "pipeline/text_encoder_2/model.safetensors")
    assert torch.equal(state["weights"]["text_encoder_2.shared.weight"], shipped["shared.weight"]) and state["step"] == 6
    train.train(longer, 3, out, compiled=False)
    rows = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows == [6, 8, 10]
    steps = load_probe(out / "probe.safetensors").train_step.values
    assert steps[0] == 0 and steps[-1] == 10 and (np.diff(steps) > 0).all()
    plans = json.loads((out / "preset.json").read_text())["plans"]
    assert [(p["from"], p["steps"], p["shift"]) for p in plans] == [(0, 6, 3.0), (6, 10, 1.0)]
    with pytest.raises(FileExistsError, match="contains a training"):
        train.revive(data, longer, 3, out)
    with pytest.raises(FileNotFoundError, match="seed 4"):
        train.revive(data, longer, 4, tmp_path / "other")


def test_the_noise_shift_moves_levels_as_stated() -> None:
    """Equal draws with and without shift: sigma / (1 - sigma) is multiplied by the shift."""
    latents = torch.zeros(4, 4, 32, 32)
    plain, shifted = (train.draw_batch(latents, replace(SMALL, shift=s, batch=64), 0, 0, "cpu")[2] for s in (1.0, 3.0))
    assert_close(shifted / (1 - shifted), 3 * plain / (1 - plain))


def test_the_help_names_every_option_and_the_band(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--install-probe" in shown and f"{100 * train.LOSS_BAND:g} %" in shown
