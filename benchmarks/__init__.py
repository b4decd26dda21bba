"""What asv runs: one file per subject. `make dashboard` runs and publishes it; results/ holds those of lent hardware."""
