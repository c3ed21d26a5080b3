"""Texts that are cut at special tokens become the ids of the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo.data.separators import find_separators
from dpo.data.tokenizer_calls import encode_texts

SPECIAL = ["<s>", "<e>", "<s>x", "|a|", "|ab", "b|>"]
LETTERS = [*"abx<>|se ", "ab", " a", "\u2581", "\u2581a", "aa", "\u0130", "i\u0307"]


def make(*, added=SPECIAL, before=None, normalizer=None, **model):
    """A tokenizer of pairs of letters with added tokens, of which some can overlap."""
    vocabulary = {token: number for number, token in enumerate(["?", *LETTERS])}
    merges = [("a", "b"), (" ", "a"), ("\u2581", "a"), ("a", "a")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="?", **model))
    if before is not None:
        backend.pre_tokenizer = before
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(t, normalized=False) if isinstance(t, str) else t for t in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def separators(tokenizer):
    return set(find_separators(tokenizer, ["".join(SPECIAL) + "<p>"]))


def test_tokens_that_others_can_overlap_are_no_separators():
    assert separators(make()) == {"<e>"}, "<s> is in <s>x, |a| and |ab and b|> meet each other"
    assert separators(make(added=["<s>", "<e>", "e"])) == {"<s>", "<e>"}, "what is inside one cannot win"
    assert separators(make(added=["|a|"])) == set(), "it can overlap itself"


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<p>", normalized=False, lstrip=True),
        AddedToken("<p>", normalized=False, rstrip=True),
        AddedToken("<p>", normalized=True),
    ],
)
def test_tokens_that_take_more_than_their_text_are_no_separators(token):
    assert separators(make(added=["<e>", token])) == {"<e>"}


def test_a_token_of_whole_words_rules_all_out():
    """Whether it is one depends on what stands beside it."""
    whole = AddedToken("b", normalized=False, single_word=True)
    assert separators(make(added=["<e>", whole])) == set()


@pytest.mark.parametrize(
    "others",
    [
        {"before": pre_tokenizers.Metaspace(prepend_scheme="first")},
        {"dropout": 0.5},
    ],
)
def test_what_sees_more_than_a_piece_rules_all_out(others):
    assert separators(make(**others)) == set()


def test_special_tokens_that_are_to_be_split_are_no_separators():
    tokenizer = make()
    tokenizer.split_special_tokens = True
    assert separators(tokenizer) == set()


KINDS = [
    make(),
    make(before=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    make(before=pre_tokenizers.Metaspace(prepend_scheme="always")),
    make(before=pre_tokenizers.Metaspace(prepend_scheme="first")),
    make(before=pre_tokenizers.Split(Regex(" ?[ab]+|x"), "isolated")),
    make(
        normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    ),
    make(normalizer=normalizers.Lowercase()),
    make(added=["<e>", AddedToken("<s>", normalized=False, rstrip=True), AddedToken("A", normalized=True)]),
]
pieces = st.sampled_from([*SPECIAL, *LETTERS, "A", "  ", "<p>", "\u0301"])


@given(st.sampled_from(KINDS), st.lists(st.lists(pieces, max_size=12).map("".join), max_size=5))
def test_ids_are_those_of_the_whole_texts(tokenizer, texts):
    texts = ["<s><e>|a|", *texts]
    assert encode_texts(tokenizer, texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
