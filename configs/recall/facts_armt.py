"""Who is where, in sentences scattered over the text of books: passkey_armt.py, as untried."""

import ml_collections

from configs.recall import passkey_armt


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = passkey_armt.get_config(arg)
    config.data.name = "recall_facts"
    config.data.recall.n_facts = 3
    config.data.seq_len = 48 * 4
    return config
