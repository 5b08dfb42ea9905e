"""The cache with room, against transformers' own."""

import pytest
import torch
from transformers import DynamicCache, Qwen2Config

from qreason.inference.drawing import staying
from qreason.model.compat.cache import RoomyLayer, keep_rows, roomy_cache

CONFIG = Qwen2Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)


def add(caches: list[DynamicCache], rows: int, tokens: int) -> None:
    for layer in range(2):
        keys, values = torch.rand(2, rows, 2, tokens, 8)
        for cache in caches:
            cache.update(keys, values, layer)


def assert_equal(ours: DynamicCache, theirs: DynamicCache) -> None:
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("room", [1, 3, 20])
def test_it_holds_what_transformers_own_cache_holds(room: int, by_rows: bool) -> None:
    ours, theirs = roomy_cache(CONFIG, room), DynamicCache(config=CONFIG)
    add([ours, theirs], rows=2, tokens=5)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(3)
    rows = 6
    for chosen in ([0, 1, 2, 3, 4, 5], [0, 5, 2, 3, 4], [4, 1, 2], [2, 0], [0]):
        index = torch.tensor(chosen)
        theirs.batch_select_indices(index)
        if by_rows:
            keep_rows(ours, chosen, index.device)
        else:
            ours.batch_select_indices(index)
        rows = len(chosen)
        for _ in range(2):
            add([ours, theirs], rows, tokens=1)
            assert_equal(ours, theirs)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    add([ours, theirs], rows=2, tokens=4)
    assert_equal(ours, theirs)


def test_new_tokens_and_rows_that_leave_move_nothing_else() -> None:
    cache = roomy_cache(CONFIG, room=8)
    add([cache], rows=4, tokens=5)
    add([cache], rows=4, tokens=1)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(6):
        add([cache], rows=4, tokens=1)
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    add([cache], rows=3, tokens=1)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places


def test_layers_that_forget_stay_as_transformers_made_them() -> None:
    config = Qwen2Config(
        num_hidden_layers=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )
    full, sliding = roomy_cache(config, room=8).layers
    assert isinstance(full, RoomyLayer)
    assert type(sliding) is type(DynamicCache(config=config).layers[1])


@pytest.mark.parametrize(
    ("alive", "rows"),
    [("1111", [0, 1, 2, 3]), ("0111", [3, 1, 2]), ("1010", [0, 2]), ("0001", [3]), ("0000", []), ("01101", [4, 1, 2])],
)
def test_the_last_rows_take_the_places_of_those_that_end(alive: str, rows: list[int]) -> None:
    assert staying([mark == "1" for mark in alive]) == rows
