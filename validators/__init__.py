"""Whether an artefact is the model: weights, tokenizer, logits, and one runtime adapter a module."""
