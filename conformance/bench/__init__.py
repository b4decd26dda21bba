"""`gaugeblock bench`: how far each implementation is from what the machine allows, here and now."""
