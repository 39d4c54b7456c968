"""Random decoder layers over a paged cache amid NaN, and their truth in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.batch import ForwardBatch, SequenceLayout
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.ops.activation import ACTIVATIONS
from tests.cuda.amid_nan import amid_nan

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """What layers are like; by default GPT-2's in small."""

    width: int = 48
    heads: int = 6
    kv_heads: int = 6
    head_dim: int = 8
    inner: int = 72
    windows: tuple[int | None, ...] = (None, None)
    is_llama: bool = False
    has_bias: bool = True
    kind: str = "gelu_new"
    scale: float = 0.4
    block_size: int = 4
    dtype: torch.dtype = torch.float16

    def llama(self) -> Shape:
        return replace(self, is_llama=True, has_bias=False, kind="silu", kv_heads=2)


@dataclass(frozen=True)
class Layers:
    """Layers, the cache, and one row for each sequence; ``contexts`` count its own key."""

    shape: Shape
    blocks: list[Any]
    kv_cache: PagedKVCache
    hidden: Tensor
    batch: ForwardBatch
    contexts: list[int]
    truth: Truth = field(repr=False)

    def of(self, rows: list[int]) -> Layers:
        """The same of some rows, over a copy of the cache as it was."""
        layout = self.batch.layout
        contexts = [self.contexts[row] for row in rows]
        batch = batch_of(
            contexts, layout.block_tables[rows], self.shape.block_size,
            self.batch.slot_mapping[rows],
        )  # fmt: skip
        cache = copied(self.kv_cache)
        return replace(
            self, kv_cache=cache, hidden=amid_nan(self.hidden[rows]), batch=batch, contexts=contexts
        )

    def to(self, device: str) -> Layers:
        """The same on a device."""
        cache = copied(self.kv_cache)
        cache._blocks = cache._blocks.to(device)
        return replace(
            self, blocks=[_moved(block, device) for block in self.blocks], kv_cache=cache,
            hidden=self.hidden.to(device), batch=_moved(self.batch, device),
        )  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What comes out, and what is written: [layers, rows, kv_heads, head_dim]."""

    hidden: Tensor
    keys: Tensor
    values: Tensor


def layers(shape: Shape, contexts: list[int], seed: int = 0) -> Layers:
    torch.manual_seed(seed)
    num_blocks = sum(-(-c // shape.block_size) for c in contexts) + 3
    cache = PagedKVCache(
        len(shape.windows), num_blocks, shape.block_size, shape.kv_heads, shape.head_dim,
        shape.dtype, CPU,
    )  # fmt: skip
    cache._blocks = amid_nan(torch.full_like(cache._blocks, torch.nan))
    order = iter(torch.randperm(num_blocks).tolist())
    tables = torch.full((len(contexts), -(-max(contexts) // shape.block_size) + 1), -1)
    for row, context in enumerate(contexts):
        for place in range(-(-context // shape.block_size)):
            tables[row, place] = next(order)
    slots = []
    for row, context in enumerate(contexts):
        places = [
            int(tables[row, k // shape.block_size]) * shape.block_size + k % shape.block_size
            for k in range(context)
        ]
        for layer in range(len(shape.windows)):
            for part in (cache.key(layer), cache.value(layer)):
                flat = part.flatten(0, 1)
                flat[places[:-1]] = torch.randn(context - 1, *flat.shape[1:]).to(shape.dtype)
        slots.append(places[-1])
    rotary = None
    if shape.is_llama:
        angles = torch.randn(max(contexts), shape.head_dim // 2)
        rotary = SimpleNamespace(
            cos=amid_nan(angles.cos().to(shape.dtype)), sin=amid_nan(angles.sin().to(shape.dtype))
        )
    blocks = [_block(shape, layer, window, rotary) for layer, window in enumerate(shape.windows)]
    hidden = amid_nan(torch.randn(len(contexts), shape.width))
    batch = batch_of(contexts, tables, shape.block_size, torch.tensor(slots))
    truth = _truth(shape, blocks, cache, hidden, contexts, tables)
    return Layers(shape, blocks, cache, hidden, batch, contexts, truth)


def batch_of(contexts: list[int], tables: Tensor, block_size: int, slots: Tensor) -> ForwardBatch:
    rows = len(contexts)
    layout = SequenceLayout(
        (1,) * rows, tuple(contexts), torch.arange(rows + 1, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32), tables.int(),
    )  # fmt: skip
    positions = torch.tensor(contexts) - 1
    return ForwardBatch(torch.zeros(rows, dtype=torch.int64), positions, slots, layout)


def copied(cache: PagedKVCache) -> PagedKVCache:
    found = PagedKVCache.__new__(PagedKVCache)
    found._blocks, found.block_size = amid_nan(cache._blocks), cache.block_size
    return found


def _moved(found: Any, device: str) -> Any:
    """What holds tensors, with these on a device."""
    if isinstance(found, Tensor):
        return found.to(device)
    if isinstance(found, SimpleNamespace):
        return SimpleNamespace(**{name: _moved(each, device) for name, each in vars(found).items()})
    if isinstance(found, ForwardBatch | SequenceLayout):
        own = {f.name: _moved(getattr(found, f.name), device) for f in fields(found)}
        return replace(found, **own)
    return found


def _linear(shape: Shape, rows: int, columns: int) -> Any:
    weight = amid_nan((torch.randn(rows, columns) * columns**-0.5).to(shape.dtype))
    bias = amid_nan(torch.randn(rows).to(shape.dtype)) if shape.has_bias else None
    return SimpleNamespace(weight=weight, bias=bias)


def _norm(shape: Shape) -> Any:
    own = {"weight": amid_nan((1 + 0.3 * torch.randn(shape.width)).to(shape.dtype)), "eps": 1e-3}
    if not shape.is_llama:
        own["bias"] = amid_nan(torch.randn(shape.width).to(shape.dtype))
    return SimpleNamespace(**own)


def _block(shape: Shape, layer: int, window: int | None, rotary: Any) -> Any:
    widths = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    attention = SimpleNamespace(
        layer=layer, head_dim=shape.head_dim, widths=widths, window=window, rotary=rotary,
        scale=shape.scale / (layer + 1), query_norm=None, key_norm=None, bias=None,
        qkv=_linear(shape, sum(widths), shape.width),
        output=_linear(shape, shape.width, widths[0]),
    )  # fmt: skip
    first = {"gate_up" if shape.is_llama else "up":
             _linear(shape, shape.inner * (2 if shape.is_llama else 1), shape.width)}  # fmt: skip
    mlp = SimpleNamespace(kind=shape.kind, down=_linear(shape, shape.width, shape.inner), **first)
    return SimpleNamespace(
        attention_norm=_norm(shape), attention=attention, mlp_norm=_norm(shape), mlp=mlp,
        is_post_norm=False, cross_attention=None, cross_norm=None,
    )  # fmt: skip


def _truth(
    shape: Shape, blocks: list[Any], cache: PagedKVCache, hidden: Tensor, contexts: list[int],
    tables: Tensor,
) -> Truth:  # fmt: skip
    x = hidden.double()
    keys, values = [], []
    for layer, block in enumerate(blocks):
        attention, mlp = block.attention, block.mlp
        fused = _times(_normed(x, block.attention_norm), attention.qkv)
        query, key, value = (
            part.unflatten(1, (-1, shape.head_dim)) for part in fused.split(attention.widths, 1)
        )
        if attention.rotary is not None:
            places = torch.tensor(contexts) - 1
            query, key = (_turned(part, attention.rotary, places) for part in (query, key))
        keys.append(key)
        values.append(value)
        rows = []
        for row, context in enumerate(contexts):
            old = torch.arange(context - 1)
            block_of = tables[row, old // shape.block_size]
            past = [
                torch.cat([part(layer)[block_of, old % shape.block_size].double(), own[row, None]])
                for part, own in ((cache.key, key), (cache.value, value))
            ]
            first = max(0, context - attention.window) if attention.window else 0
            group = shape.heads // shape.kv_heads
            k, v = (part[first:].repeat_interleave(group, 1) for part in past)
            scores = torch.einsum("hd,khd->hk", query[row], k) * attention.scale
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v).flatten())
        x = x + _times(torch.stack(rows), attention.output)
        read, activation = _normed(x, block.mlp_norm), ACTIVATIONS[mlp.kind]
        if shape.is_llama:
            gate, up = _times(read, mlp.gate_up).chunk(2, 1)
            inner = activation(gate) * up
        else:
            inner = activation(_times(read, mlp.up))
        x = x + _times(inner, mlp.down)
    return Truth(x, torch.stack(keys), torch.stack(values))


def _times(x: Tensor, linear: Any) -> Tensor:
    y = x @ linear.weight.double().T
    return y if linear.bias is None else y + linear.bias.double()


def _normed(x: Tensor, norm: Any) -> Tensor:
    if hasattr(norm, "bias"):
        x = x - x.mean(1, keepdim=True)
    x = x * (x.square().mean(1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    return x + norm.bias.double() if hasattr(norm, "bias") else x


def _turned(x: Tensor, rotary: Any, positions: Tensor) -> Tensor:
    cos, sin = (table[positions].double()[:, None] for table in (rotary.cos, rotary.sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
