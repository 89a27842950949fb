"""What a run found out: as data (schema), and written for people and for programs."""
