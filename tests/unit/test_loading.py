"""How a model is opened, and what is said when it cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError

import malib
from malib import DiT, figures
from malib.presets import data_folder, preset_of

from .. import architectures

SOURCES = {"paper", "third party", "diffusers", "ours"}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of ``DiffusionPipeline.from_pretrained``, which gives a tiny FLUX with embedded guidance."""
    import diffusers

    calls: list[tuple] = []

    def from_pretrained(source, **asked):
        calls.append((source, asked))
        return architectures.build("flux-guided")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    return calls


def test_every_preset_names_its_source() -> None:
    rows = yaml.safe_load((data_folder() / "models.yaml").read_text())
    assert len({row["id"] for row in rows.values()}) == len(rows)
    for name, row in rows.items():
        assert preset_of(name) == preset_of(row["id"]) and preset_of(name)["id"] == row["id"]
        values = {key: value for key, value in row.items() if key != "id"}
        assert {"size", "steps", "cfg", "k"} <= set(values) and all(v["source"] in SOURCES for v in values.values())
    assert preset_of("mini-flux") == {}


def test_the_runner_takes_the_preset_and_keeps_k_among_ks() -> None:
    for notebook in figures.NOTEBOOKS:
        for name in ("flux-dev", "black-forest-labs/FLUX.1-dev"):
            wanted = figures.parameters_for(notebook, "full", {"model": name})
            assert "ks" not in wanted or (12 in wanted["ks"] and wanted["ks"] == sorted(wanted["ks"]))
            assert wanted.get("steps", 28) == 28 and wanted.get("guidance", 3.5) == 3.5
        given = figures.parameters_for(notebook, "preview", {"model": "flux-dev", "steps": 3} if "steps" in wanted else {})
        assert given.get("steps", 3) == 3


def test_a_short_name_opens_its_checkpoint_with_its_settings(opened: list[tuple]) -> None:
    dit = malib.load("flux-dev", revision="v1", dtype="bfloat16", device="cpu", cache=False)
    assert opened == [("black-forest-labs/FLUX.1-dev", {"use_safetensors": True, "dtype": torch.bfloat16, "revision": "v1"})]
    assert (dit.size, dit.default_cfg, dit.preset["k"]) == (1024, 1.0, 12)
    preset, named, other = (dit.generate("a red star", steps=1, size=(32, 32), guidance=g).latents for g in (None, 3.5, 1.0))
    assert np.array_equal(preset, named) and not np.array_equal(preset, other)


def test_an_open_pipeline_is_taken_as_it_is() -> None:
    pipeline = architectures.build("sd3")
    assert malib.load(pipeline, cache=False).pipeline is pipeline
    with pytest.raises(ValueError, match="dtype, offload cannot be set"):
        malib.load(pipeline, offload="model", dtype="bfloat16")


def test_pickled_weights_are_not_read(tmp_path) -> None:
    architectures.build("flux").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        malib.load(tmp_path)


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (GatedRepoError("403", response=SimpleNamespace(headers={}, request=None)), PermissionError, "hf auth login"),
        (OSError("We couldn't connect to the hub"), FileNotFoundError, "the network"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, raised, kind, words: str) -> None:
    import diffusers

    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(kind, match=words) as error:
        malib.load("black-forest-labs/FLUX.1-dev")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: malib.load(dtype="float8"), "float32, bfloat16, float16"),
        (lambda: malib.load(quantize="2bit"), "8bit, 4bit"),
        (lambda: malib.load(offload="disk"), "model, sequential"),
        (lambda: malib.load(SimpleNamespace(components={}, unet=1)), "no transformer"),
        (lambda: malib.load(SimpleNamespace(components={}, transformer=torch.nn.Linear(1, 1))), "malib/families.py"),
    ],
)
def test_bad_arguments_are_one_sentence(call, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("argument", [{"offload": "model"}, {"quantize": "4bit"}])
def test_what_needs_a_gpu_says_so(argument: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        malib.load(**argument)


def test_a_full_gpu_is_one_sentence_and_nothing_is_lost(flux_dit: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    before = flux_dit.generate("a red star", steps=1).latents

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match=r"batch_size.*quantize='4bit'"):
        patch.setattr(flux_dit.blocks[2].module, "forward", full)
        flux_dit.generate("a red star", steps=1, record=[malib.ChannelStats()])
    assert np.array_equal(before, flux_dit.generate("a red star", steps=1).latents)


def test_offloading_keeps_the_fingerprint_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate moves weights to and fro and hides them; the fingerprint stays what it was before."""
    pipeline = architectures.build("flux")
    dit, called = DiT(pipeline), []
    before = dit.fingerprint
    monkeypatch.setattr(pipeline, "enable_model_cpu_offload", lambda: called.append("model"), raising=False)
    dit.offload("model")
    pipeline.transformer.to("meta")
    assert dit.fingerprint == before and called == ["model"]
