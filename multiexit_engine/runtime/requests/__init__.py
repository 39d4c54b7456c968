"""From a caller's words to requests, and from tokens to the caller's outputs; knows no step."""
