"""A pytest plugin for PEFT's own tests: keeps those of LoRA, and with ``--fuse`` fuses every model that PEFT makes.

It hooks the one place where PEFT puts adapter layers into a model. Each test's entry in the junit report then has a
property ``calls``: how often ``lora_linear`` computed in PEFT's place, why PEFT's own forward ran in other calls, and
which LoRA layers of other kinds were called, so that a run that fused little is seen for what it is.
"""

import functools
import json
import re
from collections import Counter, defaultdict

import pytest
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner

from fused_lora.integrations import peft as integration

# of the test that runs: {"fused": {kind: calls}, "peft": {reason: calls}, "other": {class: calls}}
calls = defaultdict(Counter)


class EveryModel(defaultdict):
    """What PEFT's tests take for the models they have seen: these they load offline."""

    def __contains__(self, name):
        return True


def pytest_addoption(parser):
    parser.addoption("--fuse", action="store_true", help="fuse every LoRA model")


def pytest_configure(config):
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = EveryModel(int)
    if config.getoption("--fuse"):
        BaseTuner.inject_adapter = _and_fuse(BaseTuner.inject_adapter)
        for name in ("lora_linear", "quantized_lora_linear", "plus_adapter"):
            setattr(integration, name, _counted(getattr(integration, name), "fused", lambda *_, name=name, **__: name))
        integration._PEFT_FORWARD = _counted(integration._PEFT_FORWARD, "peft", _reason)
        for kind in {kind for kind in _subclasses(lora.LoraLayer) if "forward" in vars(kind)}:
            kind.forward = _counted(kind.forward, "other", lambda layer, *_, **__: integration.kind_of(layer))


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if _is_of_lora(item)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    calls.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    item.user_properties.append(("calls", json.dumps(calls)))


def _is_of_lora(item):
    """By its configuration class where it has one, else by its name."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and "config_cls" in callspec.params:
        return callspec.params["config_cls"] is LoraConfig
    return "lora" in item.name.lower() or not any(name in item.name.lower() for name in ("ia3", "vera", "loha", "lokr"))


def _and_fuse(inject_adapter):
    @functools.wraps(inject_adapter)
    def inject(self, *args, **kwargs):
        inject_adapter(self, *args, **kwargs)
        if integration.fuses(self):
            integration.fuse(self)

    return inject


def _counted(function, sort, kind):
    @functools.wraps(function)
    def count(*args, **kwargs):
        calls[sort][kind(*args, **kwargs)] += 1
        return function(*args, **kwargs)

    return count


def _reason(layer, x, *args, **kwargs):
    """Why PEFT's forward runs for this call, as ``FusedLinear.forward`` decides; names and numbers left out."""
    call = integration._call_of(layer)
    if isinstance(call, str):
        return re.sub(r"'[^']*'|\d+\.\d+", "…", call)
    if args or kwargs:
        return f"called with {', '.join(kwargs) or 'more arguments'}"
    return f"x is a {type(x).__name__} of {x.dtype} over {call.compute}"


def _subclasses(kind):
    return {kind, *(found for subclass in kind.__subclasses__() for found in _subclasses(subclass))}
