"""The command line: `rlchat fit`, `validate`, `test`, `predict` and `tokenizer`."""
