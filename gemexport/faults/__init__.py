"""Faults on purpose: ways in which real conversions went wrong, put into written artefacts to prove the validator."""
