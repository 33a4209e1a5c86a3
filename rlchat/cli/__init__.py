"""The command line: `rlchat fit`, `validate`, `test`, `predict`, `tokenizer` and `export`."""
