"""Right implementations made wrong by rule: one change of their text at a time, which the gate must see."""
