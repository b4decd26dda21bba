"""How far a result may lie from the oracle, and the oracle."""
