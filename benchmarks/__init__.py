"""What asv lists, one file per family. `make dashboard` measures it and publishes results/, which keeps every commit's."""
