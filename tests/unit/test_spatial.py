from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.cluster import KMeans

from malib import analysis, spatial
from malib.miniflux import rendering, scenes
from malib.spatial import on_grid, token_grid


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (16, 16)), ((32, 128), (8, 32)), ((1024, 768), (64, 48))])
def test_grids_of_square_and_oblong_pictures(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert token_grid(grid[0] * grid[1], *size) == grid


def test_tokens_run_row_by_row() -> None:
    values = xr.DataArray(np.arange(24.0).reshape(2, 12), dims=("channel", "token"))
    assert np.array_equal(on_grid(values, 30, 40).values, np.arange(24.0).reshape(2, 3, 4))


def test_a_number_that_fills_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        token_grid(17, 64, 64)


def planted(sets: int = 8, noise: float = 0.05) -> tuple[torch.Tensor, np.ndarray]:
    """Activations (sets, 256, 6) with a square of other values in the middle of the grid, and the mask of the square."""
    generator = torch.Generator().manual_seed(0)
    mask = np.zeros((16, 16), dtype=bool)
    mask[5:11, 6:12] = True
    pattern = torch.from_numpy(mask.ravel()).float()[:, None] * torch.tensor([3.0, -2.0, 1.0, 2.0, -1.0, 1.5])
    return pattern + noise * torch.randn(sets, 256, 6, generator=generator), mask.ravel()


def test_a_planted_region_is_found_whatever_the_sign_of_its_channels() -> None:
    for sign in (1, -1):
        x, truth = planted()
        scaled = spatial.min_max(sign * x)
        labels = spatial.kmeans(scaled).numpy()
        found = analysis.foreground(labels, scaled.sum(2).numpy(), (16, 16), "border")
        assert (analysis.iou(found, truth) == 1).all()


def test_the_published_rule_follows_the_sign() -> None:
    """Higher heat is the foreground only while most channels are positive there."""
    x, truth = planted()
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        scaled = spatial.min_max(sign * x)
        labels, heat = spatial.kmeans(scaled).numpy(), scaled.sum(2).numpy()
        assert analysis.iou(analysis.foreground(labels, heat, (16, 16), "heat"), truth).mean() == pytest.approx(expected)
    with pytest.raises(ValueError, match="'size' is unknown"):
        analysis.foreground(labels, heat, (16, 16), "size")


def test_a_constant_map_gives_labels_and_no_error() -> None:
    x = torch.full((3, 256, 4), 2.0)
    scaled = spatial.min_max(x)
    labels = spatial.kmeans(scaled).numpy()
    assert not scaled.any() and set(np.unique(labels)) <= {0, 1}
    for rule in analysis.FOREGROUND:
        assert analysis.foreground(labels, scaled.sum(2).numpy(), (16, 16), rule).shape == (3, 256)


@pytest.mark.parametrize("clusters", [2, 3])
def test_kmeans_agrees_with_scikit_learn(clusters: int) -> None:
    """On overlapping groups the inertia is nearly always that of scikit-learn's best of ten, within a part in a thousand."""
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(40, clusters, 5)) * 1.5
    x = np.stack([m[rng.integers(clusters, size=200)] for m in middles]) + rng.normal(size=(40, 200, 5))
    labels = spatial.kmeans(torch.from_numpy(x), clusters).numpy()
    good = 0
    for points, found in zip(x, labels, strict=True):
        theirs = KMeans(clusters, n_init=10, random_state=0).fit(points)
        ours = sum(np.square(p - p.mean(0)).sum() for p in (points[found == c] for c in range(clusters)) if len(p))
        good += ours <= theirs.inertia_ * 1.001
    assert good >= 38


def test_kmeans_refuses_too_few_and_too_many_clusters() -> None:
    for bad in (1, 9):
        with pytest.raises(ValueError, match="out of range"):
            spatial.kmeans(torch.zeros(1, 8, 2), bad)


def test_iou_and_matching_against_hand_counts() -> None:
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert analysis.iou(a, b) == pytest.approx(1 / 3) and analysis.iou(a & False, b & False) == 1
    truth = np.array([[0, 0, 0, 1, 1, 2, 2, 2]])
    assert analysis.matched_iou(np.array([[2, 2, 2, 0, 0, 1, 1, 1]]), truth) == pytest.approx(1)
    assert analysis.matched_iou(np.array([[2, 2, 2, 0, 0, 1, 1, 2]]), truth) == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="without any region"):
        analysis.matched_iou(np.array([[0, 1]]), np.array([[0, 0]]))


def test_masks_go_to_tokens_and_back() -> None:
    mask = np.zeros((1, 64, 64), dtype=np.uint8)
    mask[0, 8:24, 4:12] = 2
    tokens = analysis.to_tokens(mask, (16, 16))
    assert np.array_equal(analysis.to_pixels(tokens, 64, 64), mask)
    drawn = rendering.render(scenes.sample_scene(3)).labels
    majority = [np.bincount(drawn[r : r + 4, c : c + 4].ravel()).argmax() for r in range(0, 64, 4) for c in range(0, 64, 4)]
    assert np.array_equal(analysis.to_tokens(drawn, (16, 16)), majority)
    with pytest.raises(ValueError, match="whole patches"):
        analysis.to_tokens(mask, (15, 16))


def test_clusters_do_not_depend_on_the_place_among_the_sets() -> None:
    """Points without any structure, where every start leads elsewhere."""
    x = torch.randn(7, 40, 5, generator=torch.Generator().manual_seed(1))
    together = spatial.kmeans(x, 3, restarts=2, iterations=5)
    assert all(torch.equal(spatial.kmeans(x[i : i + 1], 3, restarts=2, iterations=5)[0], together[i]) for i in range(7))
    assert not torch.equal(
        spatial.kmeans(x, 3, restarts=1, iterations=1, seed=9), spatial.kmeans(x, 3, restarts=1, iterations=1)
    )


def test_the_ground_is_cluster_0_whatever_k_means_named_it() -> None:
    """Two figures of three and one tokens on a ground that fills the border but for one token."""
    labels = np.array([[2, 2, 2, 2], [2, 1, 1, 2], [2, 0, 1, 2], [2, 2, 2, 1]])
    found = analysis.relabel_by_border(labels.ravel(), (4, 4)).reshape(4, 4)
    assert (found == np.array([2, 1, 0])[labels]).all()
    swapped = analysis.relabel_by_border(np.array([1, 0, 2])[labels].ravel(), (4, 4)).reshape(4, 4)
    assert (swapped == found).all()
