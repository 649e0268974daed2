from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch

from malib import Channels, ChannelStats, Disrupt, DiT, Gates, Store, TopK, cache, sampling

from .. import architectures

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture
def dit(store: Store) -> DiT:
    return DiT(architectures.build("flux"), cache=store)


def entries(store: Store) -> list[str]:
    return sorted(p.name for p in store.folder.glob("objects/*/*"))


def test_the_same_call_twice_is_one_entry_and_equal(dit: DiT, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"steps": 2, "record": [ChannelStats(), Gates()], "edits": [Disrupt(TopK(2), layers=(1, 2))]}
    first = dit.generate(PROMPTS, **call)
    monkeypatch.setattr(sampling.Sampler, "run", lambda *a: pytest.fail("computed again"))
    second = dit.generate(PROMPTS, **call)
    assert len(entries(store)) == 1
    assert np.array_equal(first.images, second.images) and np.array_equal(first.latents, second.latents)
    assert first.provenance == second.provenance
    assert first.records.channel_stats.identical(second.records.channel_stats)
    assert first.records.gates.identical(second.records.gates) and first.records.disrupt.identical(second.records.disrupt)


def test_what_changes_the_result_changes_the_key(dit: DiT, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"steps": 1, "edits": [Disrupt(TopK(2))], "record": [ChannelStats()]}
    changes = [
        {},
        {"edits": [Disrupt(TopK(3))]},
        {"edits": [Disrupt(Channels((1, 2)))]},
        {"edits": [Disrupt(TopK(2), layers=1)]},
        {"seeds": 1},
        {"cfg": 1.0},
        {"steps": 2},
        {"record": [ChannelStats(top=3)]},
    ]
    for change in changes:
        dit.generate(PROMPTS, **{**base, **change})
    assert len(entries(store)) == len(changes)
    monkeypatch.setattr(ChannelStats, "version", 99)
    dit.generate(PROMPTS, **base)
    assert len(entries(store)) == len(changes) + 1


def test_one_changed_weight_changes_the_fingerprint(dit: DiT) -> None:
    before = dit.fingerprint
    parameter = next(dit.pipeline.transformer.parameters())
    with torch.no_grad():
        kept = parameter.view(-1)[3].clone()
        parameter.view(-1)[3] += 1e-3
    assert dit.fingerprint != before
    with torch.no_grad():
        parameter.view(-1)[3] = kept
    assert dit.fingerprint == before
    with torch.no_grad():  # a swap keeps every plain sum
        a, b = parameter.view(-1)[0].clone(), parameter.view(-1)[1].clone()
        parameter.view(-1)[0], parameter.view(-1)[1] = b, a
    assert dit.fingerprint != before


def test_settings_that_change_images_change_the_fingerprint(dit: DiT) -> None:
    before = dit.fingerprint
    dit.pipeline.vae.register_to_config(scaling_factor=0.5)
    changed = dit.fingerprint
    dit.pipeline.tokenizer_2.model_max_length = 20
    assert len({before, changed, dit.fingerprint}) == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "no meta", "bad meta"])
def test_a_damaged_entry_is_reported_and_computed_again(dit: DiT, store: Store, caplog, damage: str) -> None:
    first = dit.generate(PROMPTS, steps=1, record=[ChannelStats()])
    entry = store.path(first.provenance["key"])
    data = entry / "data.safetensors"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-7])
    elif damage == "flip":
        raw = bytearray(data.read_bytes())
        raw[-100] ^= 1
        data.write_bytes(raw)
    elif damage == "no meta":
        (entry / "meta.json").unlink()
    else:
        (entry / "meta.json").write_text("{")
    with caplog.at_level(logging.WARNING, "malib"):
        again = dit.generate(PROMPTS, steps=1, record=[ChannelStats()])
    assert "damaged" in caplog.text and np.array_equal(first.images, again.images)
    assert store.get(first.provenance["key"]) is not None


def test_a_full_disk_loses_the_entry_not_the_result(dit: DiT, store: Store, caplog, monkeypatch) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with caplog.at_level(logging.WARNING, "malib"):
        assert len(dit.generate(PROMPTS, steps=1)) == 2
    assert "not cached" in caplog.text and entries(store) == [] and not list(store.folder.glob("objects/*/.new*"))


def test_the_budget_drops_what_was_used_longest_ago(tmp_path) -> None:
    store = Store(tmp_path, budget=4000)
    for i, key in enumerate(["a" * 64, "b" * 64, "c" * 64]):
        store.put(key, {"x": np.zeros(250, np.float32)}, {"i": i})
        os.utime(store.path(key) / "meta.json", (i, i))
    assert store.get("a" * 64)[1] == {"i": 0}  # now the most recently used
    store.put("d" * 64, {"x": np.zeros(250, np.float32)}, {})
    assert store.get("a" * 64) is not None and store.get("d" * 64) is not None and store.get("b" * 64) is None


def test_descriptions_are_canonical() -> None:
    a = cache.key_of({"edits": [Disrupt(TopK(2), layers=[1, 2])], "x": np.float64(1.0)})
    b = cache.key_of({"x": 1.0, "edits": (Disrupt(TopK(2), layers=(1, 2)),)})
    assert a == b
    assert cache.key_of(np.arange(3)) == cache.key_of(torch.arange(3)) != cache.key_of(np.arange(3.0))
    with pytest.raises(TypeError, match="cannot be part"):
        cache.key_of(object())
