"""Near-duplicates: found when they should be, by a definition that is computed here in the plain way."""

import random

from swift.data.duplicates import SHINGLE, SIMILAR, find_equal, find_similar

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("st", "r", "ng", "p", "tter")]


def jaccard(a: str, b: str) -> float:
    first, second = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (a, b))
    return len(first & second) / len(first | second)


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(10, 60))) for _ in range(count)]


def test_equal_keys():
    assert find_equal(["a", "b", "a", "c", "a", "b"]) == {2: 0, 4: 0, 5: 1}


def test_changed_words_are_found_and_others_are_not():
    texts = make_texts(300)
    changed = {}
    for i in range(0, 300, 10):
        words = texts[i].split()
        words[len(words) // 2] = "changed"
        changed[len(texts)] = i
        texts.append(" ".join(words))
    expected = {i for i, original in changed.items() if jaccard(texts[i], texts[original]) >= SIMILAR}
    found = find_similar(texts)
    assert len(expected) > 20
    assert len(expected & set(found)) >= len(expected) - 1
    assert all(found[i] == changed[i] and jaccard(texts[i], texts[found[i]]) >= SIMILAR for i in found)


def test_case_punctuation_and_spacing_do_not_count():
    assert find_similar(["What is the capital of France?", "what is  the capital, of FRANCE!"]) == {1: 0}
    assert find_similar(["法国的首都是哪里？请告诉我。", "法国的首都是哪里,请告诉我"]) == {1: 0}


def test_many_alike_are_one_chain_each():
    texts = [
        "Answer the following question in the style of a pirate, please: " * 3 + str(i) for i in range(500)
    ]
    found = find_similar(texts)
    assert set(found) == set(range(1, 500)) and all(found[i] < i for i in found)


def test_too_short_to_compare():
    assert find_similar([]) == {}
    assert find_similar(["a"]) == {}
    assert find_similar(["", "", "abcd", "abcd", "\ud800"]) == {}
