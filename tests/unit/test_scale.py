from __future__ import annotations

from tests.benchmarks import scale


def test_its_transformer_is_as_large_as_that_of_flux_dev() -> None:
    """Black Forest Labs give 12 B parameters; counted over the published configuration, 11.90 B."""
    pipeline = scale.build(scale.ALL_BLOCKS, "meta")
    count = sum(p.numel() for p in pipeline.transformer.parameters())
    assert count == 11_901_408_320
    assert {str(p.dtype) for p in pipeline.transformer.parameters()} == {"torch.bfloat16"}


def test_three_blocks_stand_for_all_in_the_same_proportion() -> None:
    double, single = scale.SHARE
    assert double * scale.ALL_BLOCKS[1] == single * scale.ALL_BLOCKS[0]


def test_the_table_names_what_was_run() -> None:
    row = {"seconds": 2.5, "ratio": [1.01, 0.99, 1.03]}
    document = {"model": "DiT(...)", "blocks": [1, 2], "side": 1024, "text": 512, "steps": 2, "rounds": 3, "record": 75.2}
    shown = scale.table({**document, "rows": {"plain generation": row}, "versions": {"torch": "2.13"}})
    assert "1 double and 2 single" in shown and "| plain generation | 2.50 | 1.010 [0.990, 1.030] |" in shown
