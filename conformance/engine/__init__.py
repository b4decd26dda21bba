"""How an implementation is judged: from a contract's row to a verdict."""
