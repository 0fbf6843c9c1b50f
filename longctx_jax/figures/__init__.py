"""Every picture of this project: pure functions from records or flat rows to matplotlib figures."""
