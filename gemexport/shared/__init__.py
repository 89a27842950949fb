"""What the engine, the judge and the report tell each other, and what each of them is given."""
