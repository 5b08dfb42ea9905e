"""transformers' cache with room for further tokens.

DynamicCache copies everything for every new token; on a CPU that takes up to half of the time of a reply. Read in
transformers 5.10.0 and 5.24.0: attention calls cache.update, which calls update of the layer in cache.layers;
batch_repeat_interleave and batch_select_indices go to every layer; a layer's length is that of its `keys`. The classes
are not in transformers.py because their base classes are transformers' and must be imported first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose keys and values, (rows, heads, tokens, width), are the filled part of larger tensors.

    The prompts are kept as they come; room is made with the next tokens.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self.room = room
        self.spacious: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' interface; writes in place, so only for passes without gradients."""
        past = self.get_seq_length()
        if past == 0:
            kept: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return kept
        end = past + key_states.shape[-2]
        if not self.spacious or end > self.spacious[0].shape[-2]:
            self.spacious = [with_room(self.keys, end + self.room), with_room(self.values, end + self.room)]
        for whole, new in zip(self.spacious, (key_states, value_states), strict=True):
            whole[:, :, past:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.spacious)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.spacious = []

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; cheap where most of them keep their place."""
        if not self.spacious:
            super().batch_select_indices(indices)
            return
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        self.move(len(indices), moved, indices[moved])

    def move(self, count: int, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep the first `count` rows, with `rows` of the old ones in these `places`."""
        end = self.get_seq_length()
        self.spacious = [whole[:count] for whole in self.spacious]
        for whole, part in zip(self.spacious, (self.keys, self.values), strict=True):
            whole[places, :, :end] = part[rows]
        self.keys, self.values = (whole[:, :, :end] for whole in self.spacious)


def keep_rows(cache: DynamicCache, rows: list[int], device: torch.device) -> None:
    """Keep these rows of all layers, in this order, without reading anything from the device."""
    moves = [(place, row) for place, row in enumerate(rows) if place != row]
    places, moved = torch.tensor(moves, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    index = torch.tensor(rows, device=device)
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer) and layer.spacious:
            layer.move(len(rows), places, moved)
        else:
            layer.batch_select_indices(index)


def with_room(part: torch.Tensor, tokens: int) -> torch.Tensor:
    """A tensor for so many tokens that begins with those of `part`."""
    rows, heads, filled, width = part.shape
    whole = part.new_empty(rows, heads, tokens, width)
    whole[:, :, :filled] = part
    return whole


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """transformers' cache for a model, with room for so many tokens beyond the prompts in layers that keep all."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
