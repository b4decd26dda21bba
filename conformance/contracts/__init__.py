"""The contracts, one file per subject."""
