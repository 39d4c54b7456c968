"""The build hook of the package; its metadata and every tool's settings are in pyproject.toml."""

from setuptools import setup

setup()
