"""A config is a frozen value; a view of one can be assigned to, and is no key of a dictionary."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest

from mistral_core import AutoConfig, MistralConfig
from mistral_core.config import AssignableConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, FrozenConfigError

CODE = [
    lambda config: setattr(config, "hidden_size", 64),
    lambda config: setattr(config, "torch_dtype", "float16"),
    lambda config: setattr(config, "hiden_size", 64),
    lambda config: delattr(config, "hidden_size"),
]


@pytest.mark.parametrize("code", CODE)
def test_a_config_stays_as_it_was_made(code):
    config = MistralConfig()
    key = {config: "found"}
    with pytest.raises(FrozenConfigError, match=r"config\.replace\(.*AutoConfig") as error:
        code(config)
    assert isinstance(error.value, ConfigError | AttributeError)
    assert config == MistralConfig()
    assert key[config] == "found"
    assert config.value is config


def test_a_view_shows_the_config_that_an_assignment_makes():
    config = AutoConfig(num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    before = config.value
    config.num_labels = 2
    assert (config.num_labels, config.id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
    assert before.num_labels == 3
    assert type(config.value) is MistralConfig
    assert hash(config.value) == hash(MistralConfig())
    assert config == MistralConfig() == config
    assert config != before
    assert before != config
    config.sliding_window = None
    assert config.layer_windows == (None,) * 32
    with pytest.raises(ConfigError, match=r"vocab_size.*-1"):
        config.vocab_size = -1
    with pytest.raises(ConfigError, match="did you mean 'vocab_size'"):
        config.vocab_siz = 5
    with pytest.raises(AttributeError):
        del config.vocab_size
    assert config.vocab_size == 32000


def test_a_view_is_a_config_that_changes_and_so_no_key():
    config = AssignableConfig.showing(TINY)
    assert isinstance(config, MistralConfig)
    assert config.to_dict() == TINY.to_dict()
    assert config.program("MistralForCausalLM") == TINY.program("MistralForCausalLM")
    assert dataclasses.asdict(config) == dataclasses.asdict(TINY)
    assert [*inspect.signature(AutoConfig).parameters] == [*inspect.signature(MistralConfig).parameters]
    assert repr(config) == repr(TINY).replace("MistralConfig", "AssignableConfig")
    assert MistralConfig.from_dict(config.to_dict()) == config
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


def test_a_view_is_made_in_every_way_a_config_is(tmp_path):
    TINY.save_pretrained(tmp_path)
    made = [
        AutoConfig.from_pretrained(tmp_path, num_labels=5),
        AutoConfig.from_dict(TINY.replace(num_labels=5).to_dict()),
        AutoConfig.from_pretrained(tmp_path).replace(num_labels=5),
        dataclasses.replace(AssignableConfig.showing(TINY), num_labels=5, id2label=None, label2id=None),
        AutoConfig(**dataclasses.asdict(TINY.replace(num_labels=5))),
    ]
    for config in made:
        assert config == TINY.replace(num_labels=5)
        config.num_labels = 6
        assert config == TINY.replace(num_labels=6)
    made[0].save_pretrained(tmp_path)
    assert MistralConfig.from_pretrained(tmp_path).num_labels == 6


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
@pytest.mark.parametrize("is_built", [False, True])
def test_a_copy_of_a_view_is_a_view_of_its_own(copied, is_built):
    config = AssignableConfig.showing(TINY.noted(name_or_path="here"), is_built=is_built)
    again = copied(config)
    again.use_cache = False
    assert (again.value, config.value) == (TINY.replace(use_cache=False), TINY)
    assert again.name_or_path == again._name_or_path == "here"
    if is_built:
        with pytest.raises(ConfigError, match="built with"):
            again.hidden_size = 64
    value = copied(TINY)
    assert value == TINY
    assert hash(value) == hash(TINY)


def test_what_a_config_tells_beside_its_value():
    told = TINY.noted(name_or_path="here").noted(attn_implementation="eager")
    assert told == TINY
    assert hash(told) == hash(TINY)
    assert told.to_dict() == TINY.to_dict()
    for config in (told, told.replace(use_cache=False), AssignableConfig.showing(told), copy.deepcopy(told)):
        assert (config.name_or_path, config._attn_implementation) == ("here", "eager")
    assert (TINY.name_or_path, TINY._attn_implementation) == ("", None)
    view = AssignableConfig.showing(told, is_built=True)
    view.become(TINY)
    assert view.name_or_path == "", "of the config that it showed before nothing is left"


def test_fields_are_assigned_while_they_are_gone_through():
    """transformers' suite and scripts for it go through `config.__dict__` and assign what they find there."""
    view = AssignableConfig.showing(MistralConfig())
    for name in vars(view).keys():  # noqa: SIM118
        if name.endswith("_range"):
            setattr(view, name, 1e-10)
    assert view.initializer_range == view.value.initializer_range == 1e-10
