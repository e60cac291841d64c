"""Every tolerance of the tests, with its reason. All are bounds of `compare.relative_error`.

A float32 number is rounded by at most 2**-24 = 6e-8 of itself. The errors of a sum of n products
grow like sqrt(n) times that when roundings are independent, as they are for random numbers.
"""

ELEMENTWISE = 1e-6
"""A few float32 operations a number, exp and sqrt among them (libraries: up to 4 units each)."""

PRODUCT = 5e-6
"""Sums of up to 8192 products in float32, in any order: sqrt(8192) * 6e-8."""

DEQUANTIZED = 3e-7
"""scale * code + bias with one or two roundings, however a compiler contracts them."""

ATTENTION = 5e-6
"""Two products and a softmax between them, over tens of positions."""

SAME_GRAPH = 1e-5
"""Logits of two layers, computed twice by one backend with sums cut differently."""

FLOAT32_LOGITS = 1e-4
"""Logits against the float32 reference, as the documentation promises (docs: fidelity)."""

ROPE_UNITS = 4
"""Roundings of a rotary angle in units of 2**-24: two of the power, one each of its reciprocal and
of the product with the position. The rounding of the exponent counts ln(theta) * exponent more."""
