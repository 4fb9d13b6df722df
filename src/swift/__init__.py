"""swift: fine-tune, align, run and export large language models. Importing it imports nothing heavy."""

__version__ = "0.1.0"
