"""Text: tokenizers and vocabularies, chat templates, stop strings, and pieces of an answer."""
