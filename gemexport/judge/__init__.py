"""What is measured of an artefact, by which bounds it is judged, and what is wrong where one is broken."""
