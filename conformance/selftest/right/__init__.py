"""Right but different implementations: no judgement of theirs may be an alarm."""
