"""Configuration of the test suite: run-time type checks, running the suite in parts, and skipped tests as failures."""

import abc
import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile
import typing

sys.dont_write_bytecode = False  # as for most people: what Python would write beside their files is seen
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# diffusers copies the pipeline.py of every student to the same file of this folder: each worker needs its own.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

gc.disable()  # until all tests are collected: hundreds of modules are imported, none goes away again


def implements(protocol, instance, plain=typing._ProtocolMeta.__instancecheck__):
    """isinstance() as from Python 3.12 on, which evaluates no property: `Codec.digest` reads files, for example."""
    if not (protocol._is_protocol and protocol._is_runtime_protocol):
        return plain(protocol, instance)
    lacking = not_of_class(protocol, type(instance))
    return all(hasattr(instance, name) for name in lacking) or abc.ABCMeta.__instancecheck__(protocol, instance)


@functools.cache
def not_of_class(protocol, kind):
    """The members of a protocol that a class does not have, so that its instances must have them."""
    known = {name for each in kind.__mro__ for name in vars(each)}
    return [name for name in typing._get_protocol_attrs(protocol) if name not in known]


if os.environ.get("CHECK_TYPES") == "yes":  # set by `make test-all`; it takes a fifth of the time of all tests
    if sys.version_info < (3, 12):  # which remembers them: each check of a protocol lists its members again
        typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)
        typing._ProtocolMeta.__instancecheck__ = implements

    from beartype.claw import beartype_packages

    beartype_packages(("distill", "recipes"))

import pytest  # noqa: E402

pytest_plugins = ["budgets"]

LONGEST = (  # files of `make test`, the longest first, so that one worker is not left with it at the end
    "test_ranks.py",
    "test_slurm_workflow.py",
    "test_inputs.py",
    "test_slurm_follow.py",
    "test_run_ranks.py",
    "test_slurm.py",
    "test_slurm_submit.py",
    "test_compare.py",
    "test_hub.py",
    "test_launch.py",
    "test_conformance.py",
    "test_reflow_command.py",
    "test_run.py",
)


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="run part i of n, as i/n: whole test files, dealt in turn")
    parser.addoption("--fail-on-skip", action="store_true", help="a skipped test fails the run (CI)")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--part").split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--part {part}/{parts}: the part must lie between 1 and {parts}")
    files = sorted({item.path for item in items})
    mine = set(files[part - 1 :: parts])
    config.hook.pytest_deselected(items=[item for item in items if item.path not in mine])
    items[:] = [item for item in items if item.path in mine]
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """What is left now stays: later collections look only at what is new. Libraries collect at each checkpoint."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def lpips_options(tmp_path_factory):
    """LPIPS by a SqueezeNet of random weights."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    path = tmp_path_factory.mktemp("trunk") / "squeeze.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(squeezenet1_1(weights=None).state_dict(), path)
    return {"lpips_trunk": "squeeze", "lpips_path": path}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and config.getoption("--part") != "1/1":
        session.exitstatus = pytest.ExitCode.OK  # more parts than files
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if config.getoption("--fail-on-skip") and skipped:
        reporter.write_line(f"{len(skipped)} tests were skipped where none may be", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
