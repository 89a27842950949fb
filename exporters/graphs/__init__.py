"""What a Gemma computes, written once over a small set of operations that each backend spells its own way."""
