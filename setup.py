"""The list of packages; everything else about the build is in pyproject.toml.

Folders under ``rlchat/`` are found, so that a new one needs no entry here. ``configs/`` becomes ``rlchat.configs``.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["rlchat", "rlchat.*"]), "rlchat.configs"])
