"""Two LSTM layers on rows: `best/row_gru` with another cell. Results: RESULTS.md."""

import ml_collections

from configs.best import row_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = row_gru.get_config()
    config.model.cell = "lstm"
    return config
