"""What is known of Gemma: sizes and layers out of config.json, whichever spelling it came in."""
