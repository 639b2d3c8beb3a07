"""Patterns of strangers: what ``re`` says, and never longer than their bound."""

import json
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fused_lora import LoRAConfig, apply_lora, load_adapter, save_adapter
from fused_lora.models.patterns import Budget, matcher

LEAVES = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", r"\b", "^", "$", "ab"])
PATTERNS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        st.tuples(st.sampled_from(["?=", "?!"]), inner).map(lambda pair: f"({pair[0]}{pair[1]})"),
    ),
    max_leaves=6,
)
NAMES = st.text("ab.c", max_size=7)
# for re any of these takes longer than anyone waits
HOSTILE = ["(a+)+$", "(a|a)*$", "(a*)*b", ".*.*.*.*.*.*.*.*.*.*.*.*b", "((a+)+)+b"]


@settings(max_examples=300, deadline=None)
@given(PATTERNS, NAMES)
def test_says_what_re_says(pattern, name):
    assert matcher(pattern, Budget())(name) == (re.fullmatch(pattern, name, re.DOTALL) is not None)
    ends = re.fullmatch(rf"(.*\.)?({pattern})", name, re.DOTALL) is not None
    assert matcher(pattern, Budget(), ends=True)(name) == ends


@pytest.mark.parametrize("pattern", ["(?<=a)b", "(?<!a)b", "b", "(?i)AB"])
@pytest.mark.parametrize("name", ["ab", "b", "bb"])
def test_looks_behind_and_ignores_case_as_re_does(pattern, name):
    around = f"(?i)a?{pattern[4:]}" if pattern.startswith("(?i)") else f"a?{pattern}"
    assert matcher(around, Budget())(name) == (re.fullmatch(around, name) is not None)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_are_matched_in_little(pattern):
    budget = Budget()
    before = budget.left
    assert not matcher(pattern, budget)("a" * 40 + "c")
    assert before - budget.left <= 20_000


def test_what_would_take_too_long_is_refused_by_name():
    with pytest.raises(ValueError, match=r"pattern must be matched in 20,000 steps a name"):
        matcher("(?:(?:(?:a?){60}){60}){60}b", Budget())("a" * 300)
    spent = Budget()
    spent.left = 3
    with pytest.raises(ValueError, match="30,000,000 in all"):
        matcher(".*a", spent)("aaaaaa")


@pytest.mark.parametrize("pattern", [r"(a)\1", "(a)?(?(1)b|c)", "(?i:a)b", "(", "a)(b", "a{99999999999}", "(" * 2000])
def test_what_cannot_be_bounded_is_refused_when_the_config_is_made(pattern):
    for fields in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}, {"alpha_pattern": {pattern: 4}}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} must hold regular expressions"):
            LoRAConfig(**fields)


def test_flags_that_only_a_whole_pattern_may_have_are_refused_in_a_pattern_for_ends():
    with pytest.raises(ValueError, match="rank_pattern must hold regular expressions"):
        LoRAConfig(rank_pattern={"(?i)a": 4})


def test_an_anchor_in_a_pattern_for_ends_means_the_whole_path():
    config = LoRAConfig(rank=2, rank_pattern={"^fc": 4})
    assert (config.rank_of("fc"), config.rank_of("block.fc")) == (4, 2)


def test_a_config_that_was_used_can_be_pickled():
    config = LoRAConfig(rank=2, target_modules=".*fc", rank_pattern={"fc": 4})
    assert config.targets("a.fc")
    assert config.rank_of("a.fc") == 4
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.targets("a.fc")
    assert again.rank_of("a.fc") == 4


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_folder_with_a_hostile_pattern_does_not_hang_its_reader(tmp_path, field, pattern):
    name = "a" * 40 + "c"
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 2))
    save_adapter(apply_lora(model, rank=1), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config[field] = {pattern: 3} if field.endswith("pattern") else pattern
    file.write_text(json.dumps(config))
    plain = nn.Sequential()
    plain.add_module(name, nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="changed since"):
        load_adapter(plain, tmp_path)
    assert torch.equal(plain[0].lora_A, model[0].lora_A)
