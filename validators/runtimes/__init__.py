"""The programs that users run artefacts with, one module or folder a program: each has `load`."""
