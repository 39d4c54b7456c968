"""The paged KV cache: who owns which block, and the tensors behind the blocks."""
