"""What a model is asked: prompts as tokens, requests of arguments, and the checks of these."""
