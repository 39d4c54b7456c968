"""Non-autoregressive answers: a core of their own, and the passes that find them."""
