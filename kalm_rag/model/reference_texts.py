"""The texts that the reference of the compact form is computed from.

They are of many kinds and languages, short, and never change: another text is another reference, and every passage kept
against the old one becomes a miss.
"""

from __future__ import annotations

REFERENCE_TEXTS = (
    "The heart pumps blood through two circuits. The right side sends it to the lungs, where it takes up "
    "oxygen; the left side sends it to the rest of the body.",
    "To reset your password, open Settings, choose Account and then Security, and select Reset password. You "
    "will receive an e-mail with a link that is valid for one hour.",
    "def mean(values):\n    if not values:\n        raise ValueError('mean of an empty list')\n    return "
    "sum(values) / len(values)",
    "The treaty was signed on 14 May 1955 by eight states. It remained in force until 1991, when its members "
    "agreed to dissolve the alliance.",
    "In a randomised trial of 412 patients, the treatment lowered systolic blood pressure by 8.3 mmHg "
    "compared with placebo (95% CI 6.1 to 10.5; p < 0.001).",
    "Melt the butter, stir in the flour and cook it for two minutes. Add the milk little by little, whisking "
    "all the time, until the sauce is smooth and thick.",
    "The tenant shall give notice in writing at least three months before the end of the term. Otherwise the "
    "lease is extended by one year on the same conditions.",
    "Shares of the company fell by 6 percent on Tuesday after it lowered its forecast for the year, citing "
    "higher energy costs and weak demand in Asia.",
    "This 14-inch laptop weighs 1.2 kg and has 16 GB of memory, a 1 TB drive and a battery that lasts up to "
    "18 hours. Two  USB-C ports and a headphone jack are included.",
    "Once upon a time there was a fox who lived at the edge of a forest. Every morning he went to the river, "
    "and every morning the old heron was there before him.",
    "Der Rhein entspringt in den Schweizer Alpen und mündet nach rund 1230 Kilometern in die Nordsee. Er ist "
    "eine der verkehrsreichsten Wasserstraßen der Welt.",
    "La fotosíntesis es el proceso por el cual las plantas convierten la luz del sol, el agua y el dióxido "
    "de carbono en azúcares y oxígeno.",
    "长城是中国古代的军事防御工程，东起山海关，西至嘉峪关，全长超过两万公里。1987年被列为世界文化遗产。",
    "ERROR 1045 (28000): Access denied for user 'app'@'10.0.0.7' (using password: YES). Check the user's "
    "grants and the host it connects from.",
    "Q: Do I need a visa for a stay of less than 90 days? A: Citizens of the listed countries do not need "
    "one; all others must apply at a consulate before they travel.",
    "Light travels at 299,792 kilometres per second. It takes a little more than eight minutes to reach us "
    "from the Sun, and over four years from the next star.",
)
"""Sixteen short texts."""


def reference_texts() -> list[str]:
    """Return as many passages of one to eight of the texts: of short and of long passages, prefixes differ."""
    count = len(REFERENCE_TEXTS)
    return [
        " ".join(REFERENCE_TEXTS[(5 * first + more) % count] for more in range(1 + first // 2))
        for first in range(count)
    ]
