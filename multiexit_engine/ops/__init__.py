"""The engine's numerical vocabulary: every op, each with its reference."""

from multiexit_engine.ops.activation import gated_activation
from multiexit_engine.ops.attention import paged_attention
from multiexit_engine.ops.biased_attention import (
    biased_packed_attention,
    biased_paged_attention,
)
from multiexit_engine.ops.blocks import decoder_blocks
from multiexit_engine.ops.coded_heads import (
    CodedHead,
    are_codes_fast,
    code_head,
    code_hidden,
    code_states,
    finer_head,
    logit_bounds,
)
from multiexit_engine.ops.coded_tokens import coded_head_tokens
from multiexit_engine.ops.contrast import contrast_heads, contrast_logits
from multiexit_engine.ops.dola import dola_tokens, js_divergences, relative_top_logits
from multiexit_engine.ops.exit_rows import (
    ExitProgress,
    ExitRules,
    RowPaths,
    decide_exits,
    rows_asked,
    rows_beyond,
    settle_paths,
)
from multiexit_engine.ops.gate_odds import gate_odds
from multiexit_engine.ops.heads import HeadStatistics, head_logits, head_statistics
from multiexit_engine.ops.kv import rotate_and_write_kv, write_kv
from multiexit_engine.ops.linear import linear, linear_activation
from multiexit_engine.ops.listed_blocks import ListedRows, listed_decoder_blocks
from multiexit_engine.ops.memory_edits import EditLists, memory_edits, note_latest
from multiexit_engine.ops.norm import layer_norm, rms_norm
from multiexit_engine.ops.packed_attention import packed_attention
from multiexit_engine.ops.packed_blocks import PackedSources, PackedTexts, packed_blocks
from multiexit_engine.ops.ragged_blocks import (
    RaggedSources,
    RaggedTexts,
    are_rows_ragged,
    ragged_blocks,
)
from multiexit_engine.ops.registry import (
    NATIVE,
    REFERENCE,
    Op,
    assume_device,
    device_kind,
    register_op,
    use_backend,
)
from multiexit_engine.ops.rotary import rotary
from multiexit_engine.ops.rough_sums import (
    HeadSpread,
    LogitErrors,
    RoughSums,
    finer_spread,
    head_spread,
    logit_errors,
    rough_head_sums,
)
from multiexit_engine.ops.row_lists import (
    RowList,
    compact_rows,
    listed_head_statistics,
    listed_linear,
)
from multiexit_engine.ops.rows import embed, take_rows
from multiexit_engine.ops.sampling import gumbel_noise, sample_tokens
from multiexit_engine.ops.tokens import contrast_tokens, head_tokens, shared_head_tokens

__all__ = [
    "EditLists",
    "NATIVE",
    "REFERENCE",
    "CodedHead",
    "ExitProgress",
    "ExitRules",
    "HeadSpread",
    "HeadStatistics",
    "ListedRows",
    "LogitErrors",
    "Op",
    "PackedSources",
    "PackedTexts",
    "RaggedSources",
    "RaggedTexts",
    "RoughSums",
    "RowList",
    "RowPaths",
    "are_codes_fast",
    "are_rows_ragged",
    "assume_device",
    "biased_packed_attention",
    "biased_paged_attention",
    "code_head",
    "code_hidden",
    "code_states",
    "coded_head_tokens",
    "compact_rows",
    "contrast_heads",
    "contrast_logits",
    "contrast_tokens",
    "decide_exits",
    "decoder_blocks",
    "device_kind",
    "dola_tokens",
    "embed",
    "gate_odds",
    "finer_head",
    "finer_spread",
    "gated_activation",
    "gumbel_noise",
    "head_logits",
    "head_spread",
    "head_statistics",
    "head_tokens",
    "js_divergences",
    "layer_norm",
    "linear",
    "linear_activation",
    "listed_decoder_blocks",
    "listed_head_statistics",
    "listed_linear",
    "memory_edits",
    "note_latest",
    "logit_bounds",
    "logit_errors",
    "packed_attention",
    "packed_blocks",
    "paged_attention",
    "ragged_blocks",
    "register_op",
    "relative_top_logits",
    "rms_norm",
    "rotary",
    "rotate_and_write_kv",
    "rough_head_sums",
    "rows_asked",
    "rows_beyond",
    "settle_paths",
    "sample_tokens",
    "shared_head_tokens",
    "take_rows",
    "use_backend",
    "write_kv",
]
