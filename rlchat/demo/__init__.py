"""The offline demo: a generated corpus and the three stages in a row."""
