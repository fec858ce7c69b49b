"Pairs of rows, as sets."

from ftbook.quality.words import words


def pairs(m):
    return set(zip(m.a.tolist(), m.b.tolist()))


def distinct(texts):
    return list({tuple(words(t)): t for t in texts}.values())
