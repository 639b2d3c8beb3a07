"""Patterns of strangers: what ``re`` says, and never longer than their bound."""

import json
import pickle
import re
import time

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
HOSTILE = ["(a+)+$", "(a|a)*$", "(a*)*b", ".*.*.*.*.*.*.*.*.*.*.*.*b", "((a+)+)+b", "(a|aa)+$", "(.*a){20}", "(.*)*x"]
LONG = "a" * 300 + "c"


@pytest.fixture
def short(monkeypatch):
    """Little time, and a test that takes much more has failed."""
    monkeypatch.setattr(Budget, "seconds", 0.2)
    start = time.perf_counter()
    yield
    # a compiler can't be stopped, and other processes may have the CPU
    assert time.perf_counter() - start < 20


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


@pytest.mark.parametrize("pattern", [r"(a)\1", "(a)?(?(1)b|c)", "(?i:A)a", "(?i)AA", r"(?P<x>a)(?P=x)"])
@pytest.mark.parametrize("name", ["aa", "ab", "c"])
def test_groups_flags_and_conditions_mean_what_they_mean_in_re(pattern, name):
    matched = re.fullmatch(pattern, name) is not None
    assert matcher(pattern, Budget())(name) == matched
    # a pattern for ends counts its own groups
    assert matcher(pattern, Budget(), ends=True)(f"b.{name}") == matched


HONEST = {
    r".*(self_attn|mlp)\.(q_proj|down_proj)$": ["model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj"],
    r"^(?!.*lm_head).*proj": ["model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj"],
    r"model\.layers\.[0-9]+\..*": ["model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj"],
    r"(?:.*?(?:language|text|model).*?(?:attn|mlp).*?(?:q_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)": [
        "model.layers.0.self_attn.q_proj"
    ],
    re.escape("model.layers.0.self_attn.q_proj") + "|" + re.escape("lm_head"): [
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    ],
}


@pytest.mark.parametrize("pattern", HONEST)
def test_patterns_that_people_write_work(pattern):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj", "lm_head", "lm_head.proj"]
    config = LoRAConfig(target_modules=pattern)
    assert [name for name in names if config.targets(name)] == HONEST[pattern]


def test_thousands_of_layers_with_a_pattern_each_stay_within_the_time():
    paths = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(10) for expert in range(100)]
    config = LoRAConfig(target_modules="|".join(map(re.escape, paths)), rank_pattern={"^" + re.escape(paths[-1]): 3})
    keyed = LoRAConfig(rank=1, rank_pattern=dict.fromkeys(paths, 2))
    assert all(config.targets(path) and keyed.rank_of(path) == 2 for path in paths)
    assert [path for path in paths if config.rank_of(path) == 3] == paths[-1:]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_are_matched_or_given_up_in_time(short, pattern, ends):
    try:
        assert not matcher(pattern, Budget(), ends=ends)(LONG)
    except ValueError as error:
        assert str(error) == f"patterns must be matched in 0.2 s, all together, got {pattern!r}"  # noqa: PT017


def test_what_takes_too_long_is_refused_by_name(short):
    with pytest.raises(ValueError, match=r"patterns must be matched in 0\.2 s, all together, got '\(a\|a\)\*\$'"):
        matcher("(a|a)*$", Budget())(LONG)


@pytest.mark.parametrize("key", ["(a|a)*{}$", "(a|a)*[{}]", "a.{}"])
def test_many_patterns_have_one_time_together(short, key):
    def ranks():
        # on a busy machine the time may be up when the patterns are compiled
        config = LoRAConfig(rank=2, rank_pattern={key.format(index): 3 for index in range(100)})
        return [config.rank_of(f"{LONG}.{index}") for index in range(100_000)]

    with pytest.raises(ValueError, match="all together"):
        ranks()


def test_compiling_is_counted_too(short):
    with pytest.raises(ValueError, match="all together"):
        LoRAConfig(rank_pattern={f"layer.{index}": 3 for index in range(100_000)})


@pytest.mark.parametrize(
    "pattern",
    [
        "(", "a)(b", "[", "a{99999999999}", "(" * 2000, "a{1,65535}{1,65535}", "(?:(?:a{99}){99}){99}", "a*" * 50_000,
        "(?R)", "((?1)*)*", "(?:a){e<=2}", "{" + "9" * 9000 + "}", "(?:" + "(?:a|b)?" * 7000 + "){9000}",
    ],
    ids=lambda pattern: pattern[:20],
)  # fmt: skip
def test_what_cannot_be_compiled_in_little_is_refused_when_the_config_is_made(short, pattern):
    for fields in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}, {"alpha_pattern": {pattern: 4}}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} must hold regular expressions"):
            LoRAConfig(**fields)


def test_a_key_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="rank_pattern must hold regular expressions, got 3: it is no str"):
        LoRAConfig(rank_pattern={3: 4})


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
def test_a_folder_with_a_hostile_pattern_does_not_hang_its_reader(short, tmp_path, field, pattern):
    model = nn.Sequential()
    model.add_module(LONG, nn.Linear(3, 2))
    save_adapter(apply_lora(model, rank=1), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config[field] = {pattern: 3} if field.endswith("pattern") else pattern
    file.write_text(json.dumps(config))
    plain = nn.Sequential()
    plain.add_module(LONG, nn.Linear(3, 2))
    try:
        with pytest.warns(UserWarning, match="changed since"):
            load_adapter(plain, tmp_path)
    except ValueError as error:
        # none of them matches the layer
        expected = ("all together", "does not name in target_modules")
        assert str(error).endswith(expected[1]) or expected[0] in str(error)  # noqa: PT017
        assert type(plain[0]) is nn.Linear
        assert plain[0].weight.requires_grad
    else:
        assert torch.equal(plain[0].lora_A, model[0].lora_A)
