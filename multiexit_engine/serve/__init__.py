"""An OpenAI-compatible HTTP server on ``AsyncEngine``; needs the packages of group ``serve``."""
