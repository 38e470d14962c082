"""Everything static is in pyproject.toml; what a build has to find out first belongs here."""

from setuptools import setup

setup()
