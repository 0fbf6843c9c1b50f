"""A byte model of Python source, minutes on a laptop."""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the quickstart config."""
    config = base.get_config(arg)
    return config
