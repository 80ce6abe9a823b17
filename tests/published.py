"""Figures of the published models that several tests hold."""

PARAMETERS = {
    (1, "s"): 13_383_480,
    (1, "m"): 29_065_294,
    (1, "l"): 47_553_954,
    (2, "s"): 12_759_864,
    (2, "m"): 28_376_142,
    (2, "l"): 46_832_034,
}
