"""The subcommands of `gaugeblock`: a file for each, with its options and what it runs; importing one imports nothing heavy."""
