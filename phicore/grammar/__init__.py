"""Structured output: answers that a JSON schema, a regular expression or a grammar allows.

The library llguidance says which tokens may come next (https://github.com/guidance-ai/llguidance).
It is installed with `phicore[grammar]`.
"""

from phicore.grammar.constraints import Constraint, constraint_of
from phicore.grammar.processor import AllowedTokens
from phicore.grammar.tool_calls import constrained
from phicore.grammar.vocabulary import Vocabulary

__all__ = ["AllowedTokens", "Constraint", "Vocabulary", "constrained", "constraint_of"]
