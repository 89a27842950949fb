"""What of an artefact can be compared without running it, and the texts that everything is compared on."""
