"""The tolerances of the tests, with their reasons. Most are bounds of `compare.relative_error`.

Rounding to float32 has a relative error of at most 2**-24 = 6e-8. The error of a sum of n products
grows like sqrt(n) times this number if roundings are independent, as they are for random numbers.
"""

ELEMENTWISE = 1e-6
"""For a few float32 operations per number. Libraries compute exp and sqrt to within 4 units."""

PRODUCT = 5e-6
"""For sums of up to 8192 products in float32, in any order: sqrt(8192) * 6e-8."""

DEQUANTIZED = 3e-7
"""For scale * code + bias with one or two roundings, however a compiler contracts them."""

ATTENTION = 5e-6
"""For two products with a softmax between them, over tens of positions."""

SAME_GRAPH = 1e-5
"""For logits of two layers that one backend computes twice, with sums divided differently."""

FLOAT32_LOGITS = 1e-4
"""For logits compared with the float32 reference, as docs/architecture.md (Fidelity) promises."""

ROPE_UNITS = 4
"""The rounding error of a rotary angle in units of 2**-24: two units for the power, one for its
reciprocal and one for the product with the position. The rounding of the exponent adds ln(theta) *
exponent units."""
