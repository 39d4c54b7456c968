"""Which tokens of which sequences a step computes, on which KV blocks; knows no tensors."""
