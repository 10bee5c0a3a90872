"""Our `kernels` shares its name with Hugging Face's hub client: transformers must work with the client installed and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A stand-in for the client, with the names that transformers imports, and with the three ways its own modules import one
# another: absolute, relative, and back from the half-initialised package.
CLIENT = {
    "kernels-0.17.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.0\n",
    "kernels/__init__.py": """
__version__ = "0.17.0"
from kernels.layer import CUDAProperties, Device, LayerRepository, LocalLayerRepository, Mode, ROCMProperties
from .functions import *
""",
    "kernels/layer.py": """
import enum
from kernels import __version__ as seen_by_submodule
class Mode(enum.Flag):
    INFERENCE = 1
    TRAINING = 2
    TORCH_COMPILE = 4
class Device:
    def __init__(self, *args, **kwargs): pass
class CUDAProperties(Device): pass
class ROCMProperties(Device): pass
class LayerRepository(Device): pass
class LocalLayerRepository(Device): pass
""",
    "kernels/functions.py": """
from contextlib import nullcontext
def register_kernel_mapping(*args, **kwargs): pass
def use_kernel_mapping(*args, **kwargs): return nullcontext()
def replace_kernel_forward_from_hub(cls, name): pass
def use_kernel_forward_from_hub(name): return lambda cls: cls
def use_kernelized_func(*functions): return lambda cls: cls
def get_kernel(*args, **kwargs): raise RuntimeError("stand-in")
def kernelize(model, **kwargs): return model
""",
}

TRAIN = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
import kernels, torch
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2, use_cache=False))
tokens = torch.arange(12)[None]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(2):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[1] < losses[0], losses
x = torch.randn(3, 16)
assert kernels.rms_norm(x, torch.ones(16), 1e-6).shape == (3, 16)
print(is_kernels_available(), hasattr(kernels, "__version__"), *losses)
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Path:
    """A folder that holds the stand-in, as site-packages would."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in CLIENT.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def fresh(code: str, *search: Path, errors: bool = False) -> str:
    """Return the output of `code` (and its stderr, with `errors`) in a new interpreter in the checkout, `search` behind it on the path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return (done.stdout + done.stderr * errors).strip()


@pytest.mark.slow
def test_llama_trains_the_same_with_and_without_the_client(client):
    absent = fresh(TRAIN).split()
    present = fresh(TRAIN, client).split()
    assert absent[:2] == ["False", "False"]  # transformers sees no client, and we claim no version
    assert present[:2] == ["True", "True"]  # transformers sees the client, and the version is the client's
    assert absent[2:] == present[2:]


@pytest.mark.slow
def test_client_names_are_lent_and_exist_once(client):
    code = """
import kernels, sys
from kernels import LayerRepository, Mode, __version__, get_kernel, rms_norm
import kernels.layer
assert kernels.layer.Mode is Mode and kernels.layer.seen_by_submodule == __version__ == "0.17.0"
assert rms_norm.__module__ == "kernels.rms_norm" and "site" not in kernels.__file__
assert sum(name.rpartition(".")[2] == "layer" for name in sys.modules if name.startswith("kernels")) == 1
print(get_kernel.__module__)
"""
    assert fresh(code, client) == "kernels.functions"


@pytest.mark.slow
def test_without_the_client_unknown_names_are_attribute_errors():
    code = """
import kernels
for name in ("LayerRepository", "__version__"):
    try:
        getattr(kernels, name)
    except AttributeError as error:
        print(error)
"""
    expected = ["module 'kernels' has no attribute 'LayerRepository'", "module 'kernels' has no attribute '__version__'"]
    assert fresh(code).splitlines() == expected


# bitsandbytes asks the client for a kernel where the CPU has AVX-512 with bf16: its file is run again as if on such a CPU.
BITSANDBYTES = """
import importlib
import bitsandbytes
from bitsandbytes.backends.cpu import ops
bitsandbytes._ops.register_kernel = lambda *name: lambda function: function
bitsandbytes.functional.has_avx512bf16 = lambda: True
importlib.reload(ops)
print(ops.gemm_4bit_forward_kernel)
"""


@pytest.mark.slow
def test_bitsandbytes_falls_back_without_a_warning():
    pytest.importorskip("bitsandbytes")
    assert fresh(f"import kernels{BITSANDBYTES}", errors=True) == "None"


@pytest.mark.slow
def test_a_client_that_fails_bitsandbytes_is_not_hushed_up(client):
    pytest.importorskip("bitsandbytes")
    assert "stand-in" in fresh(f"import kernels{BITSANDBYTES}", client, errors=True)


def test_public_functions():
    """The functional API, from one place; a submodule of the same name never hides its function."""
    import kernels
    import kernels.glu
    import kernels.lora_mlp
    import kernels.rms_norm

    names = ["Lora", "Nf4", "TokenStatistics", "add_rms_norm", "apply_rope", "dequantize_nf4", "glu", "grouped_lora_linear",
             "linear_cross_entropy", "linear_cross_entropy_statistics", "linear_kl", "linear_log_prob", "lora_linear", "lora_mlp",
             "lora_qkv", "packed_attention", "qk_norm_rope", "rms_norm", "serving"]
    assert sorted(kernels.__all__) == names
    assert all(callable(getattr(kernels, name)) for name in names)
