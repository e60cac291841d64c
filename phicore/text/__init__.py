"""Text: tokenizers, vocabularies, chat templates, stop strings, and the pieces of an answer."""
