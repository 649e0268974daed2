from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from malib import Disrupt, DiT, EnergyMatched, Renoised, TopK
from malib.analysis import correspondence as corr
from malib.cache import Store
from malib.miniflux import rendering, scenes
from malib.rules import Channels

from .. import architectures
from ..closeness import assert_close


def coded(grid: tuple[int, int]) -> np.ndarray:
    """Features by which every place of a picture is known: smooth waves of the relative place."""
    rows, columns = np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid), indexing="ij")
    waves = [f(np.pi * k * x) for k in (1, 2, 3) for x in (rows, columns) for f in (np.sin, np.cos)]
    return np.stack(waves, axis=-1).astype(np.float32)


def test_a_place_is_found_again_in_a_picture_of_another_size() -> None:
    """The same smooth code on two grids of two picture sizes: each point leads to its relative place."""
    points = np.array([(8.0, 9.0), (30.5, 12.0), (50.0, 40.0)])
    found = corr.match(coded((12, 16)), coded((24, 16)), points, (48, 64), (96, 64))
    assert np.abs(found - points * (1, 2)).max() <= 2.0


def test_similarity_is_the_cosine_of_upsampled_features() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.standard_normal((4, 6, 5)).astype(np.float32) for _ in range(2))
    points = np.array([(0.5, 0.5), (7.5, 3.5)])
    maps = corr.similarity(one, two, points, (8, 12), (8, 12))
    large = [
        torch.nn.functional.interpolate(torch.from_numpy(f).permute(2, 0, 1)[None], size=(8, 12), mode="bilinear")[0]
        for f in (one, two)
    ]
    for (x, y), found in zip(points.astype(int), maps, strict=True):
        expected = torch.nn.functional.cosine_similarity(large[0][:, y, x, None, None], large[1], dim=0)
        assert_close(found, expected)


def test_hits_count_by_the_longer_side_of_the_box() -> None:
    truth = np.zeros((3, 2))
    found = np.array([(3.0, 4.0), (0.0, 5.1), (0.0, 0.0)])
    assert corr.hits(found, truth, (20, 50), 0.1).tolist() == [True, False, True]
    assert corr.hits(found, truth, (20, 40), 0.1).tolist() == [False, False, True]


def test_pck_per_image_and_per_point() -> None:
    """Two pairs that match themselves, one with a shifted truth: 3 of 3 and 0 of 1 points."""
    code = coded((16, 16))
    picture = np.zeros((32, 32, 3), np.uint8)
    three, one = np.array([(5.5, 6.5), (20.5, 11.5), (9.5, 25.5)]), np.array([(16.5, 16.5)])
    pairs = [
        corr.Pair(picture, picture, three, three, (20.0, 20.0), "a"),
        corr.Pair(picture, picture, one, one + 9, (20.0, 20.0), "b"),
    ]
    found = corr.pck(((pair, code, code) for pair in pairs), alpha=(0.1, 1.0))
    assert found.hits.values.tolist() == [[3, 3], [0, 1]] and found.points.values.tolist() == [3, 1]
    assert float((found.hits / found.points).mean("pair").sel(alpha=0.1)) == 0.5
    assert float(found.hits.sum("pair").sel(alpha=0.1) / found.points.sum()) == 0.75


def test_key_points_lie_on_the_outline_that_is_drawn() -> None:
    """Within a pixel of a corner there are pixels of the subject and of the background, by the exact label map."""
    seen = set()
    for one, two in scenes.correspondences(24):
        assert one.subjects[0].shape == two.subjects[0].shape and one.subjects[0].colour != two.subjects[0].colour
        for scene in (one, two):
            labels, (points,) = rendering.render(scene).labels, rendering.key_points(scene)
            seen.add((scene.subjects[0].shape, len(points)))
            for x, y in points:
                near = labels[max(0, round(y) - 2) : round(y) + 2, max(0, round(x) - 2) : round(x) + 2]
                assert near.any() and not near.all(), scene
    assert seen == {("circle", 4), ("square", 4), ("triangle", 3), ("star", 10), ("ring", 8), ("cross", 12)}
    assert scenes.correspondences(3) == scenes.correspondences(5)[:3]


@pytest.mark.parametrize(("name", "layer"), [("flux", 1), ("flux", 2), ("sd3", 1), ("sana", 1), ("pixart", 1)])
def test_features_are_what_the_blocks_norm_gives(name: str, layer: int) -> None:
    """AdaLN on the recorded tokens equals the modulated LayerNorm inside the block; with channels discarded, that of the
    block whose input was disrupted. Layer 2 of FLUX is a single block, as the paper's is: both streams in one tensor."""
    dit, rule = DiT(architectures.build(name), name=name), Channels((2, 7))
    images = np.random.default_rng(0).integers(0, 255, (1, dit.size, dit.size, 3), dtype=np.uint8)
    states = corr.read(dit, images, "a red star", layers=(layer,), sigma=0.3, ensemble=1)
    block, seen = dit.blocks[layer].module, []

    def normed(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    def inside(edits: list) -> np.ndarray:
        seen.clear()
        handle = (block.norm if hasattr(block, "norm") else block.norm1).register_forward_hook(normed)
        call = {"steps": 1, "cfg": 1.0, "start": Renoised(images, 0.3), "edits": edits}
        dit.generate("a red star", 0, **call)
        handle.remove()
        rows, columns = dit.grid()
        x = seen[0][:, -rows * columns :]  # a single block norms text and image in one tensor, the text first
        if name in ("sana", "pixart"):  # there the block itself applies the modulation, after its norm
            shift, scale = (torch.from_numpy(states[k].sel(layer=layer).values)[:, None] for k in ("shift", "scale"))
            x = x * (1 + scale) + shift
        return x.unflatten(1, dit.grid()).numpy()

    assert_close(corr.features(states, layer), inside([]))
    cut = Disrupt(rule, layers=layer, point="input")
    assert_close(corr.features(states, layer, discard=rule), inside([cut]))
    raw = corr.features(states, layer, "raw")
    np.testing.assert_array_equal(raw.reshape(-1), states.tokens.sel(layer=layer).values.reshape(-1))


def test_both_ends_lose_the_same_channels() -> None:
    """Channel 3 is large with either sign, so that its mean over all tokens is 0 and its score is not; 5 is large in one."""
    tokens = np.random.default_rng(0).normal(size=(4, 2, 16, 8)).astype(np.float32)
    tokens[..., 3] += np.array([40, -40, 40, -40])[:, None, None]
    tokens[0, ..., 5] += 60
    axes = {"tokens": (("picture", "layer", "token", "channel"), tokens)}
    states = xr.Dataset(axes, coords={"layer": [4, 6]}, attrs={"grid": (4, 4)})
    assert corr.selected(states, 6, TopK(1)).nonzero()[0].tolist() == [3]
    assert corr.selected(states, 6, TopK(2)).nonzero()[0].tolist() == [3, 5]
    seen = corr.features(states, 6, "raw", TopK(2))
    assert (seen[..., [3, 5]] == 0).all() and (seen[..., [0, 1, 2, 4, 6, 7]] != 0).all()
    energy, found = np.square(tokens[:, 0]).sum((0, 1)), corr.selected(states, 4, EnergyMatched(1))
    assert not found[3] and (found.sum() == 7 or energy[found].sum() >= energy[3])
    with pytest.raises(ValueError, match="Layer 5 was not read; choose among 4, 6"):
        corr.features(states, 5)


def test_what_cannot_be_read_is_refused(flux_dit: DiT) -> None:
    images = np.zeros((1, flux_dit.size, flux_dit.size, 3), np.uint8)
    for bad, words in (({"ensemble": 0}, "ensemble=0"), ({"layers": []}, "layers is empty")):
        with pytest.raises(ValueError, match=words):
            corr.read(flux_dit, images, **bad)
    assert corr.read(flux_dit, images, layers=2, ensemble=1).layer.values.tolist() == [2]


def test_an_ensemble_is_the_mean_over_its_noises(flux_dit: DiT) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, flux_dit.size, flux_dit.size, 3), dtype=np.uint8)
    prompts = ["a star", "a ring", "a cross"]
    together = corr.read(flux_dit, images, prompts, layers=(2,), ensemble=3)
    for i in range(3):
        alone = [
            flux_dit.generate(
                prompts[i],
                3 * i + number,
                steps=1,
                cfg=1.0,
                start=Renoised(images[i : i + 1], 0.26),
                record=[corr.HiddenStates(point="input", layers=2)],
            ).records.hidden_states.value.values.squeeze()
            for number in range(3)
        ]
        assert_close(together.tokens[i, 0], np.mean(alone, axis=0))


def test_a_reading_is_kept_as_its_mean_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = DiT(architectures.build("flux"), cache=Store(tmp_path))
    images = np.random.default_rng(0).integers(0, 255, (2, dit.size, dit.size, 3), dtype=np.uint8)
    fresh = corr.read(dit, images, "a star", layers=(1,), ensemble=3)
    assert len(list(tmp_path.rglob("meta.json"))) == 1
    monkeypatch.setattr(DiT, "generate", None)
    stored = corr.read(dit, images, "a star", layers=(1,), ensemble=3)
    assert stored.identical(fresh)


def test_blocks_keep_their_own_tokens_in_any_order(flux_dit: DiT) -> None:
    images = np.random.default_rng(0).integers(0, 255, (1, flux_dit.size, flux_dit.size, 3), dtype=np.uint8)
    one, two = (corr.read(flux_dit, images, "a star", layers=layers, ensemble=1) for layers in ((1, 3), (3, 1, 1)))
    assert one.identical(two) and not np.array_equal(one.tokens.sel(layer=1), one.tokens.sel(layer=3))


def test_an_architecture_without_known_modulation_says_so() -> None:
    dit = DiT(architectures.build("auraflow"), name="auraflow")
    images = np.zeros((1, dit.size, dit.size, 3), np.uint8)
    states = corr.read(dit, images, "a star", layers=(0,), ensemble=1)
    assert corr.features(states, 0, "norm", TopK(2)).shape == (1, *dit.grid(), dit.width)
    with pytest.raises(ValueError, match="'raw' or 'norm'"):
        corr.features(states, 0)
    with pytest.raises(ValueError, match="raw, norm, adaln"):
        corr.features(states, 0, "cooked")


def written(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        path.write_text(json.dumps(content))
    else:
        Image.fromarray(content).save(path)


def test_spair_is_read_from_its_own_layout(tmp_path) -> None:
    grey = np.full((30, 40, 3), 128, np.uint8)
    for name in ("one", "two"):
        written(tmp_path / "JPEGImages/cat" / f"{name}.jpg", grey)
    about = {
        "category": "cat",
        "src_imname": "one.jpg",
        "trg_imname": "two.jpg",
        "src_kps": [[3, 4]],
        "trg_kps": [[10, 20]],
        "trg_bndbox": [5, 10, 35, 28],
    }
    written(tmp_path / "PairAnnotation/test/000001-one-two:cat.json", about)
    (pair,) = corr.spair(tmp_path)
    assert pair.source.shape == (30, 40, 3) and pair.category == "cat" and pair.box == (18, 30)
    assert pair.source_points.tolist() == [[3.5, 4.5]] and pair.target_points.tolist() == [[10.5, 20.5]]
    assert [p.category for p in corr.spair(tmp_path, category="cat")] == ["cat"]
    with pytest.raises(FileNotFoundError, match="one of its splits"):
        next(corr.spair(tmp_path, "val"))


def test_ap10k_keeps_the_points_that_both_show(tmp_path) -> None:
    grey = np.full((30, 40, 3), 128, np.uint8)
    for name, points in (("1", [3, 4, 2, 9, 9, 0]), ("2", [10, 20, 1, 7, 7, 2])):
        written(tmp_path / f"JPEGImages/Felidae/cat/{name}.jpg", grey)
        end = {"keypoints": points, "bbox": [1, 2, 25, 15]}
        written(tmp_path / f"ImageAnnotation/Felidae/cat/{name}.json", end)
    places = {f"{end}_json_path": f"data/ap-10k/ImageAnnotation/Felidae/cat/{n}.json" for end, n in (("src", 1), ("trg", 2))}
    written(tmp_path / "PairAnnotation/test/1-2:cat.json", places)
    (pair,) = corr.ap10k(tmp_path)
    assert pair.source_points.tolist() == [[3.5, 4.5]] and pair.target_points.tolist() == [[10.5, 20.5]]
    assert pair.box == (15, 25) and pair.category == "cat"
