"""Long proofs, which `make prove` runs and the README quotes; `make test` runs short forms of some."""
