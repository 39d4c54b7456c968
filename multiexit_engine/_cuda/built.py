"""The kernels as they were built at installation: backends of the ops, found by name.

The contract of each stands in ``multiexit_engine.ops``. Importing this raises ImportError where the
kernels were not built.
"""

from multiexit_engine._cuda.blocks import Blocks
from multiexit_engine._cuda.heads import Heads
from multiexit_engine._cuda.layers import LayersLibrary
from multiexit_engine._cuda.library import PATH, Library

_heads = Heads(Library(PATH))
head_tokens = _heads.head_tokens
contrast_tokens = _heads.contrast_tokens
blocks = Blocks(LayersLibrary(PATH))
decoder_blocks = blocks.decoder_blocks

__all__ = ["blocks", "contrast_tokens", "decoder_blocks", "head_tokens"]
