"""The GGUF writer on Qwen2.5's real shapes and vocabulary, beside llama.cpp's own converter; numbers are random.

The converter, the vocabulary and the chat template come from the source archive of llama-cpp-python, fetched from PyPI.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from random_qwen import write_random_qwen
from test_export_families import FAMILIES, write_base  # tests/ is on the path for its conftest.py

from qreason.data.prompts import HELPDESK
from qreason.errors import ModelError
from qreason.export import engine, quality, reference, verify, writer
from qreason.export.reference import Heldout
from qreason.model.load import EMBEDDED, load_tokenizer
from qreason.types import Example, Reply

pytestmark = pytest.mark.slow
TINY = EMBEDDED["qreason/tiny"]
ARCHIVE = "llama_cpp_python==0.3.36"
CONVERT = """
import runpy, sys
from pathlib import Path
source = Path(sys.argv[1])
sys.path[:0] = [str(source / "gguf-py"), str(source)]
from conversion import base, llama, qwen
for kind in (qwen.Qwen2Model, qwen.Qwen3Model, llama.LlamaModel):
    kind.set_vocab = lambda self: self._set_vocab_gpt2()  # it would ask for sentencepiece first
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"  # it knows published tokenizers by hash only
sys.argv[:2] = [str(source / "convert_hf_to_gguf.py")]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MEASURED = """
import sys, time
from pathlib import Path
from qreason.export.writer import write_model
start = time.perf_counter()
write_model(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], "qwen")
# not ru_maxrss: a child starts with its parent's
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(time.perf_counter() - start, int(peak.split()[1]) * 1024)
"""
QUANTIZED = """
import sys, threading, time
from pathlib import Path
import psutil
from qreason.export.engine import quantize
start, peak = time.perf_counter(), 0
job = threading.Thread(target=quantize, args=(Path(sys.argv[1]), Path(sys.argv[2]), "q4_k_m"))
job.start()
while job.is_alive():
    for child in psutil.Process().children():
        try:
            memory = child.memory_info()
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, memory.rss - memory.shared)  # the input is mapped: its pages are the cache's
    time.sleep(0.1)
print(time.perf_counter() - start, peak)
"""


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's source; the test is skipped where PyPI cannot be reached."""
    folder = tmp_path_factory.mktemp("archive")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    done = subprocess.run([*command, ARCHIVE, "-d", str(folder)], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"{ARCHIVE} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*")) / "vendor" / "llama.cpp"


def write_tokenizer(llama_cpp: Path, folder: Path) -> None:
    """Qwen2's own vocabulary as a transformers tokenizer, from llama.cpp's vocabulary file."""
    from gguf import GGUFReader
    from transformers import Qwen2Tokenizer

    fields = GGUFReader(llama_cpp / "models" / "ggml-vocab-qwen2.gguf").fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    vocab = {token: number for number, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair.split(" ")) for pair in merges],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    template = llama_cpp / "models" / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)


def convert(llama_cpp: Path, model: Path, kind: str, out: Path) -> None:
    command = [sys.executable, "-c", CONVERT, str(llama_cpp), str(model), "--outtype", kind, "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def check_same_tensors(one: Path, other: Path) -> None:
    from gguf import GGUFReader

    ours, theirs = ({tensor.name: tensor for tensor in GGUFReader(file).tensors} for file in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert list(tensor.shape) == list(theirs[name].shape), name
        assert tensor.data.tobytes() == theirs[name].data.tobytes(), name


def check_same_header(one: Path, other: Path) -> None:
    """Every key that the converter writes, but for the size label and the unknown token, which Qwen2 has not."""
    from gguf import GGUFReader

    ours, theirs = ({key: field.contents() for key, field in GGUFReader(file).fields.items()} for file in (one, other))
    unimportant = {"general.name", "general.size_label", "tokenizer.ggml.unknown_token_id", "GGUF.kv_count"}
    different = {key for key, value in theirs.items() if ours.get(key) != value}
    assert different <= unimportant


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_the_embedded_model_is_written_as_llama_cpp_writes_it(kind: str, llama_cpp: Path, tmp_path: Path) -> None:
    writer.write_model(TINY, tmp_path / "ours.gguf", kind, "tiny")
    convert(llama_cpp, TINY, kind, tmp_path / "theirs.gguf")
    check_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    check_same_header(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_is_written_as_llama_cpp_writes_it(name: str, kind: str, llama_cpp: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", name)
    writer.write_model(base, tmp_path / "ours.gguf", kind, "x")
    convert(llama_cpp, base, kind, tmp_path / "theirs.gguf")
    check_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.fixture(scope="session", params=["0.5b", "1.5b"])
def qwen(request: pytest.FixtureRequest, llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of Qwen2.5's shape and vocabulary with random weights."""
    folder = tmp_path_factory.mktemp("qwen") / request.param
    write_random_qwen(folder, request.param)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    write_tokenizer(llama_cpp, folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(str(folder))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps({**config, **ids}))
    yield folder
    shutil.rmtree(folder)


def test_real_shapes_stream_load_and_agree(qwen: Path, llama_cpp: Path, tmp_path: Path) -> None:
    """Time and memory are printed (`-s`); writing and quantizing each stay under 4 GB."""
    native = tmp_path / "ours-bf16.gguf"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(qwen), str(native), "bf16"], capture_output=True, text=True, check=True
    )
    seconds, peak_bytes = map(float, done.stdout.split())
    print(f"\n{qwen.name}: bf16 {seconds:.0f} s, {peak_bytes / 1e9:.2f} GB, file {native.stat().st_size / 1e9:.2f} GB")
    assert peak_bytes < 4e9
    convert(llama_cpp, qwen, "bf16", tmp_path / "theirs.gguf")
    check_same_tensors(native, tmp_path / "theirs.gguf")
    (tmp_path / "theirs.gguf").unlink()
    compare_with_transformers(qwen, native, tmp_path)
    quantized = tmp_path / "ours-q4_k_m.gguf"
    done = subprocess.run(
        [sys.executable, "-c", QUANTIZED, str(native), str(quantized)], capture_output=True, text=True, check=True
    )
    seconds, peak_bytes = map(float, done.stdout.split())
    print(
        f"{qwen.name}: q4_k_m {seconds:.0f} s, {peak_bytes / 1e9:.2f} GB, file {quantized.stat().st_size / 1e9:.2f} GB"
    )
    print(f"{qwen.name}: weights in percent {quality.types_of(quantized)}")
    assert peak_bytes < 4e9


def compare_with_transformers(qwen: Path, file: Path, work: Path) -> None:
    """Header, tokens, template and teacher-forced logits of a file, with the real vocabulary."""
    tokenizer = load_tokenizer(str(qwen))
    examples = [Example(str(number), f"Ticket {number}: VPN drops after {number * 37} min.", "") for number in range(4)]
    heldout = Heldout(examples, HELPDESK, tokenizer, 16, 4)
    assert verify.check_metadata(file, "bf16", qwen, tokenizer).passed
    with engine.Server(file, 256) as server:
        for check in (verify.check_tokens, verify.check_template, verify.check_stop):
            result = check(file, server, heldout)
            assert result.passed, result.line
    asked = [Reply("", prompt_ids=tuple(ids[:-8]), token_ids=tuple(ids[-8:])) for ids in heldout.prompts]
    found = engine.logits(file, asked, work / "found")
    model: Any = reference.in_float32(qwen).model
    own = reference.write_logits(model, asked, work / "own")
    result = verify.check_logits(file, "bf16", own, found)
    print(f"{qwen.name}: {result.line}")
    assert result.passed, result.line
    assert verify.distance(own, found).top1 > 0.9


def test_a_token_more_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(TINY, tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ModelError, match="the tokenizer was extended"):
        writer.write_model(tmp_path / "tiny", tmp_path / "x.gguf", "f16", "x")
