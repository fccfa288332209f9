"""The sources of a run, and which of their rows are used."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.columns import Columns
from sampo_ray.config.sections import DataConfig
from sampo_ray.sources.source import Source, drawn, sources_of


def test_one_source_has_plain_positions_and_several_have_marks():
    assert sources_of(DataConfig(train="a"), "pairs") == [Source("a", Columns())]
    data = DataConfig(train=("a", "b"), prompts="c", mix=(0.25, 1.0))
    assert sources_of(data, "pairs") == [Source("a", Columns(), "1/", 0.25), Source("b", Columns(), "2/", 1.0)]
    assert sources_of(DataConfig(prompts=("c",)), "prompts") == [Source("c", Columns())]


def test_columns_are_for_all_sources_or_for_each():
    one, other = Columns(prompt="q"), Columns(prompt="question")
    assert [s.columns for s in sources_of(DataConfig(train=("a", "b"), columns=one), "pairs")] == [one, one]
    assert [s.columns for s in sources_of(DataConfig(train=("a", "b"), columns=(one, other)), "pairs")] == [one, other]


@given(
    share=st.floats(0, 1, exclude_min=True),
    chunks=st.lists(st.integers(1, 600), max_size=20),
    seed=st.integers(0, 2**31),
)
def test_a_share_of_the_rows_is_drawn_whatever_the_chunks_are(share, chunks, seed):
    starts = np.cumsum([0, *chunks])
    masks = [drawn(share, seed, 1, int(start), rows) for start, rows in zip(starts, chunks, strict=False)]
    assert [len(mask) for mask in masks] == chunks
    assert abs(sum(int(mask.sum()) for mask in masks) - share * starts[-1]) < 1.001


def test_every_chunk_draws_rows_of_its_own():
    first, second = (drawn(0.5, 7, 0, start, 512) for start in (0, 512))
    assert first.sum() == second.sum() == 256 and (first != second).any()
    assert (first == drawn(0.5, 7, 0, 0, 512)).all()
    assert (first != drawn(0.5, 7, 1, 0, 512)).any() and (first != drawn(0.5, 8, 0, 0, 512)).any()
    assert drawn(1.0, 7, 0, 512, 512).all()
