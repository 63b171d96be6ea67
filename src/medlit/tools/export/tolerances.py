"""How far an export's answers may lie from medlit's unless its user says otherwise: for the check and for --help."""

from __future__ import annotations

MAX_CHANGED = 0.02  # share of notes that may get another specialty
# Most that the log-likelihood of any note's answer may move, in nats, by the export's number format: over what was
# measured and far below what a mistake does. The 4-bit bound stands on one run alone, of a 135M Llama whose rows are no
# multiples of 256, so that 180 of its 272 tensors were kept in 5 or 8 bits: a model that is 4-bit throughout may move
# its answers further.
PLAIN_DRIFT = 0.5
DRIFT = {"q4_k_m": 3.0}
MEASURED = (
    "Measured at most: 0.04 by rounding to 16 bits, 0.15 to 8, 0.3 by a GPU that computes in bfloat16, 1.6 by q4_k_m"
    " (of one 135M model, 180 of whose 272 tensors were not 4-bit); many by a wrong layer"
)
