"""Forms of texts for tests that want them among other wishes, where their package is installed."""

from importlib.util import find_spec


def written_in(regex):
    """Parameters of a text in this form; none on a machine that has no llguidance."""
    return {"structured_outputs": {"regex": regex}} if find_spec("llguidance") else {}
