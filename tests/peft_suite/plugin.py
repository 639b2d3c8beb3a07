"""A pytest plugin for PEFT's own tests: keeps those of LoRA, and with ``--fuse`` fuses every model that PEFT makes.

It hooks the one place where PEFT puts adapter layers into a model, and counts the calls that ``lora_linear`` computes
in PEFT's place, so that a run that fused nothing is seen for what it is.
"""

import functools
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner

from fused_lora.integrations import peft as integration

COUNTED = pytest.StashKey()
calls = 0


def pytest_addoption(parser):
    parser.addoption("--fuse", action="store_true", help="fuse every LoRA model")
    parser.addoption("--calls", type=Path, help="file to write the number of fused calls to")


def pytest_configure(config):
    if config.getoption("--fuse"):
        BaseTuner.inject_adapter = _and_fuse(BaseTuner.inject_adapter)
        integration.lora_linear = _counted(integration.lora_linear)


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if _is_of_lora(item)]


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
        if any(isinstance(module, lora.Linear) for module in self.modules()):
            integration.fuse(self)

    return inject


def _counted(lora_linear):
    @functools.wraps(lora_linear)
    def count(*args, **kwargs):
        global calls
        calls += 1
        return lora_linear(*args, **kwargs)

    return count


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fused_calls"] = calls


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[COUNTED] = node.config.stash.get(COUNTED, 0) + getattr(node, "workeroutput", {}).get(
        "fused_calls", 0
    )


def pytest_unconfigure(config):
    path = config.getoption("--calls")
    if path is not None and not hasattr(config, "workerinput"):
        path.write_text(str(config.stash.get(COUNTED, 0) + calls))
