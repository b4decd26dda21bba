"""What asv lists, one file per subject. `make dashboard` measures it and publishes results/, which keeps every commit's."""
