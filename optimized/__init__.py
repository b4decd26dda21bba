"""Fast implementations of the operations in `gaugeblock.reference`, with the same names and arguments."""
