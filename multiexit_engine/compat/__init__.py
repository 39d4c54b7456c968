"""Other libraries' interfaces on top of the engine."""
