"""Test the extension of PEFT's enum under each supported Python. The interpreters need no packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import peft_crome.registration

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

# Runs in the interpreter under test. PEFT's own enum and registration function are loaded from its file, which imports
# nothing but the standard library; torch, transformers and the rest of PEFT are not there.
SCRIPT = """
import copy, enum, importlib.util, pickle, sys, types


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peft_types_path, registration_path, expected_version = sys.argv[1:]
assert "%d.%d" % sys.version_info[:2] == expected_version, sys.version

peft_types = load("peft.utils.peft_types", peft_types_path)
PeftType = peft_types.PeftType
before = list(PeftType)
if not hasattr(PeftType, "_hashable_values_"):  # later patch releases of 3.12 and 3.13 keep this list for `in`
    PeftType._hashable_values_ = [kind.value for kind in before]
assert "CROME" not in PeftType.__members__, "this PEFT has CROME already: nothing is left to test"

mapping = types.ModuleType("peft.mapping")
for table in ("CONFIG", "MIXED_MODEL", "PREFIX", "TUNER"):
    setattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING", {})
utils = types.ModuleType("peft.utils")
utils.PeftType, utils.register_peft_method = PeftType, peft_types.register_peft_method
auto = types.ModuleType("peft.auto")
auto.get_default_import_allowlist = lambda: ["peft", "transformers"]
tuner = types.ModuleType("peft_crome.tuner")
tuner.CromeConfig, tuner.CromeModel = type("CromeConfig", (), {}), type("CromeModel", (), {"prefix": "crome_"})
compat, checks = types.ModuleType("peft_crome.backbone.compat"), types.ModuleType("peft_crome.tuner.attaching.checks")
looked = []
compat.check_before_loading = lambda peft_type, check: looked.append((peft_type, check))
checks.check_loaded = lambda model, adapter_name, tensors: None
hub = types.ModuleType("huggingface_hub")
save, commit = (lambda self, filepath: None), (lambda self, repo_id, operations: None)
upload = lambda self, *, repo_id, folder_path: None
hub.RepoCard = type("RepoCard", (), {"save": save})
hub.HfApi = type("HfApi", (), {"create_commit": commit, "upload_folder": upload})
transformers = types.ModuleType("transformers")
transformers.PreTrainedModel = type("PreTrainedModel", (), {"resize_token_embeddings": lambda self: None})
for name, module in {
    "huggingface_hub": hub,
    "transformers": transformers,
    "peft": types.ModuleType("peft"),
    "peft.auto": auto,
    "peft.mapping": mapping,
    "peft.utils": utils,
    "peft_crome": types.ModuleType("peft_crome"),
    "peft_crome.backbone": types.ModuleType("peft_crome.backbone"),
    "peft_crome.backbone.compat": compat,
    "peft_crome.tuner": tuner,
    "peft_crome.tuner.attaching": types.ModuleType("peft_crome.tuner.attaching"),
    "peft_crome.tuner.attaching.checks": checks,
}.items():
    sys.modules[name] = module
sys.modules["peft"].auto = auto

registration = load("peft_crome.registration", registration_path)
registration.register()
registration.register()  # a second call changes nothing

member = PeftType.CROME
assert isinstance(member, PeftType) and isinstance(member, str)
assert (member.name, member.value, str(member.value)) == ("CROME", "CROME", "CROME")
assert repr(member) == "<PeftType.CROME: 'CROME'>"
assert member == "CROME" and hash(member) == hash("CROME")
assert PeftType["CROME"] is member and PeftType("CROME") is member and PeftType(member) is member
assert list(PeftType) == [*before, member] and list(reversed(PeftType))[0] is member
assert len(PeftType) == len(before) + 1 and list(PeftType.__members__)[-1] == "CROME"
assert member in PeftType and "CROME" in list(PeftType)
assert member in {member: 1} and {"CROME": 1}[member] == 1
if sys.version_info >= (3, 12):  # before, `in` takes members alone
    assert "CROME" in PeftType
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member
assert copy.copy(member) is member and copy.deepcopy([member]) == [member] and copy.deepcopy(member) is member
assert [type(kind)(kind.value) is kind for kind in PeftType] == [True] * len(PeftType)
try:
    PeftType("CROMEE")
except ValueError:
    pass
else:
    raise AssertionError("an unknown value was accepted")
try:
    PeftType.CROME = 1
except AttributeError:
    pass
else:
    raise AssertionError("the member can be overwritten")
assert PeftType._hashable_values_ == [kind.value for kind in PeftType]
enum.unique(PeftType)

assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING == {member: tuner.CromeConfig}
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING == {member: tuner.CromeModel}
assert looked == [("CROME", checks.check_loaded)]
assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING == {member: "crome_"}
assert mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING == {}
assert auto.get_default_import_allowlist() == ["peft", "transformers", "peft_crome.vlm.modeling_crome_vlm"]
assert hub.RepoCard.save.__wrapped__ is save and hub.HfApi.create_commit.__wrapped__ is commit  # wrapped once
assert hub.HfApi.upload_folder.__wrapped__ is upload
assert "torch" not in sys.modules
print("registered under", sys.version.split()[0])
"""


def interpreter(version: str) -> list[str]:
    """Return the command for one Python version, which is this interpreter or one on PATH.

    A pyenv shim runs only what PYENV_VERSION names, so `run` sets it. Other interpreters ignore this variable.
    """
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return [sys.executable]
    found = shutil.which(f"python{version}")
    if found is None:
        pytest.skip(f"no python{version} on PATH")
    if run([found, "--version"], version).returncode != 0:
        pytest.skip(f"{found} does not start")
    return [found]


def run(command: list[str], version: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYENV_VERSION"] = version
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("version", VERSIONS)
def test_enum_extension_works_under_each_python(version: str, tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(SCRIPT, encoding="utf-8")
    peft_types = Path(peft.__file__).parent / "utils" / "peft_types.py"
    arguments = [str(script), str(peft_types), peft_crome.registration.__file__, version]
    result = run([*interpreter(version), "-I", *arguments], version)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("registered under " + version)
