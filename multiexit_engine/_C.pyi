from typing import overload

class Matrix:
    @overload
    def __init__(self, data: int, dtype: int, rows: int, columns: int) -> None: ...
    @overload
    def __init__(
        self,
        codes: int,
        rows: int,
        columns: int,
        bits: int,
        scales: int,
        group_size: int,
        is_float: bool,
    ) -> None: ...

class Linear:
    def __init__(self, weight: Matrix, bias: int) -> None: ...

class Norm:
    def __init__(self, weight: int, bias: int, eps: float) -> None: ...

class Cache:
    def __init__(
        self, keys: int, values: int, dtype: int, block_size: int, kv_heads: int, head_dim: int
    ) -> None: ...

class Layout:
    def __init__(
        self,
        tokens: int,
        sequences: int,
        starts: int,
        contexts: int,
        tables: int,
        table_stride: int,
        longest_context: int,
    ) -> None: ...

class CopiedRows:
    def __init__(self, count: int, states: int, positions: int, slots: int) -> None: ...

class Rows:
    def __init__(
        self,
        layout: Layout,
        positions: int,
        slots: int,
        sources: Layout | None,
        copied: CopiedRows | None,
    ) -> None: ...

class DistanceBias:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, table: int, before: int, after: int) -> None: ...

class CrossAttention:
    def __init__(self, norm: Norm, query: Linear, output: Linear, scale: float) -> None: ...

class Block:
    def __init__(
        self,
        *,
        is_post_norm: bool,
        attention_norm: Norm,
        qkv: Linear,
        query_norm: Norm,
        key_norm: Norm,
        cos: int,
        sin: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        bias: DistanceBias,
        output: Linear,
        mlp_norm: Norm,
        up: Linear,
        is_gated: bool,
        activation: int,
        down: Linear,
        cross: CrossAttention | None,
    ) -> None: ...

class Span:
    def __init__(self, blocks: list[Block], caches: list[Cache]) -> None: ...

class PackedTexts:
    def __init__(self, lens: list[int], query_lens: list[int], rows: int) -> None: ...

class PackedSources:
    def __init__(
        self, keys_values: int, stride: int, lens: list[int], query_lens: list[int]
    ) -> None: ...

class TableRows:
    def __init__(self, table: int, rows: int, row_bytes: int, taken: int) -> None: ...

class LowerHead:
    def __init__(
        self, first: int, count: int, hidden: int, head: Linear, alpha: int, least: int
    ) -> None: ...

class RoughRows:
    def __init__(
        self,
        hidden: int,
        codes: int,
        scales: int,
        terms: int,
        reaches: int,
        slacks: int,
        rows: int,
    ) -> None: ...

class RoughHead:
    def __init__(
        self,
        codes: int,
        starts: int,
        scales: int,
        errors: int,
        vocab: int,
        columns: int,
        finer_codes: int = 0,
        finer_starts: int = 0,
        finer_scales: int = 0,
    ) -> None: ...

class Choice:
    def __init__(
        self,
        temperature: int,
        seeds: int,
        positions: int,
        tokens: int,
        log_probs: int,
        num_candidates: int,
    ) -> None: ...

def head_logits(
    threads: int, hidden: int, dtype: int, rows: int, weight: Matrix, bias: int, out: int
) -> None: ...
def head_statistics(
    threads: int,
    hidden: int,
    dtype: int,
    rows: int,
    weight: Matrix,
    bias: int,
    tokens: int,
    log_probs: int,
    second_log_probs: int,
    log_sum_exp: int,
    entropy: int,
) -> None: ...
def code_rows(
    threads: int,
    x: int,
    factors: int,
    rows: int,
    columns: int,
    terms: int,
    codes: int,
    scales: int,
    norms: int,
    errors: int,
) -> None: ...
def coded_head_tokens(
    threads: int,
    rows: RoughRows,
    rough: RoughHead,
    head: Linear,
    lowers: list[LowerHead],
    choice: Choice,
) -> None: ...
def rough_head_sums(
    threads: int,
    rows: RoughRows,
    rough: RoughHead,
    head: Linear,
    mean: int,
    tokens: int,
    numbers: int,
) -> None: ...

class LayerLogits:
    def __init__(
        self, mature: int, premature: int, candidates: int, rows: int, vocab: int
    ) -> None: ...

def js_divergences(threads: int, logits: LayerLogits, is_published: bool, out: int) -> None: ...
def dola_tokens(
    threads: int,
    logits: LayerLogits,
    relative_top: int,
    is_published: bool,
    choice: Choice,
    places: int,
) -> None: ...
def gate_odds(
    threads: int,
    normed: int,
    rows: int,
    up: Linear,
    down: Linear,
    thresholds: int,
    by_entropy: int,
    out: int,
) -> None: ...
def head_tokens(
    threads: int, hidden: int, dtype: int, rows: int, weight: Matrix, bias: int, choice: Choice
) -> None: ...
def contrast_heads(
    threads: int,
    dtype: int,
    upper_hidden: int,
    upper: Matrix,
    lower_hidden: int,
    lower: Matrix,
    alpha: int,
    least: int,
    rows: int,
    out: int,
    num_candidates: int,
) -> None: ...
def contrast_tokens(
    threads: int,
    dtype: int,
    upper_hidden: int,
    upper: Matrix,
    lower_hidden: int,
    lower: Matrix,
    alpha: int,
    rows: int,
    choice: Choice,
) -> None: ...
def shared_head_tokens(
    threads: int, hidden: int, rows: int, head: Linear, lowers: list[LowerHead], choice: Choice
) -> None: ...
def sample_tokens(
    threads: int, scores: int, rows: int, vocab: int, seeds: int, positions: int, tokens: int
) -> None: ...
def linear(
    threads: int, x: int, tokens: int, weight: Matrix, bias: int, out: int, dtype: int
) -> None: ...
def linear_activation(
    threads: int,
    x: int,
    tokens: int,
    weight: Matrix,
    bias: int,
    activation: int,
    out: int,
    dtype: int,
) -> None: ...
def norm(threads: int, x: int, norm: Norm, out: int, rows: int, size: int, dtype: int) -> None: ...
def paged_attention(
    threads: int,
    query: int,
    heads: int,
    cache: Cache,
    layout: Layout,
    scale: float,
    window: int,
    bias: DistanceBias,
    out: int,
) -> None: ...
def packed_attention(
    threads: int,
    query: int,
    query_stride: int,
    key: int,
    key_stride: int,
    value: int,
    value_stride: int,
    dtype: int,
    query_lens: list[int],
    key_lens: list[int],
    heads: int,
    head_dim: int,
    scale: float,
    bias: DistanceBias,
    out: int,
) -> None: ...
def decoder_blocks(
    threads: int, span: Span, rows: Rows, hidden: int, out: int, dtype: int
) -> None: ...
def packed_blocks(
    threads: int,
    blocks: list[Block],
    texts: PackedTexts,
    sources: PackedSources | None,
    is_attended: bool,
    hidden: int,
    dtype: int,
    out: int,
) -> None: ...
def take_rows(threads: int, rows: TableRows, count: int, out: int) -> None: ...
def embed(
    threads: int, tokens: TableRows, places: TableRows, scale: float, count: int, out: int
) -> None: ...
def plain_read(threads: int, numbers: int, count: int) -> float: ...
def isa() -> str: ...
def choose_isa(name: str) -> bool: ...
