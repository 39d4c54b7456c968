"""Parts of decoders: modules that hold weights and call ops."""
