"""Bytes on a disk that mean nothing yet: safetensors, packed bits, outputs that appear when they are whole."""
