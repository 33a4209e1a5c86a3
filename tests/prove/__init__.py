"""Long tests, which `make prove` runs and docs/multi-gpu.md quotes; `make test` runs short versions of some."""
