"""Compressed, remote and divided files give the records of plain ones; what cannot be read is one line with file, line and remedy."""

import bz2
import gzip
import http.server
import json
import lzma
import os
import threading
import zipfile
from functools import partial
from pathlib import Path

import fsspec
import pyarrow
import pytest
from datasets import Dataset

from trainer.config import Source
from trainer.data import files
from trainer.data.sources import load_sources
from trainer.errors import UserError
from trainer.evaluation.config import Data, Items
from trainer.evaluation.items import read_files

ROWS = [{"prompt": f"What is {i} + {i}?", "completion": str(2 * i)} for i in range(6)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def prompts(path, tmp_path, **options) -> list[str]:
    (_, records), = load_sources([Source(str(path), **options)], "domain", cache_dir=str(tmp_path / "cache"))
    return [record["messages"][0]["content"] for record in records]


def refusal(path, tmp_path, **options) -> str:
    with pytest.raises(UserError) as caught:
        prompts(path, tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ALL = [row["prompt"] for row in ROWS]


# ---------------------------------------------------------------- compressed


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.NDJSON", "rows.json", "rows.csv", "rows.parquet"])
def test_compressed_files_of_every_kind(ending, name, tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "p")
    content = {"json": json.dumps(ROWS).encode(), "parquet": (tmp_path / "p").read_bytes(),
               "csv": b"prompt,completion\n" + b"".join(f"{row['prompt']},{row['completion']}\n".encode() for row in ROWS)}
    path = tmp_path / (name + (ending.upper() if name.isupper() else ending))
    path.write_bytes(COMPRESS[ending](content.get(name.rpartition(".")[2], TEXT)))
    (source, records), = load_sources(str(path), "domain", cache_dir=str(tmp_path / "cache"))
    assert [record["messages"][0]["content"] for record in records] == ALL and source.name.lower() == "rows"


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_of_several_compressed_members_is_read_to_its_end(ending, tmp_path):
    (tmp_path / f"rows.jsonl{ending}").write_bytes(COMPRESS[ending](TEXT[:100]) + COMPRESS[ending](TEXT[100:]))
    assert prompts(tmp_path / f"rows.jsonl{ending}", tmp_path) == ALL


@pytest.mark.parametrize("ending", COMPRESS)
def test_damaged_files(ending, tmp_path):
    path, whole = tmp_path / f"rows.jsonl{ending}", COMPRESS[ending](TEXT)
    path.write_bytes(whole[:-9])
    assert f"rows.jsonl{ending}, after line " in refusal(path, tmp_path) and "that is cut off; copy or download" in refusal(path, tmp_path)
    path.write_bytes(whole[:8] + bytes(8) + whole[16:])
    assert "copy or download the file again" in refusal(path, tmp_path)
    path.write_bytes(TEXT)
    assert f"rows.jsonl{ending}: expected a file compressed with" in refusal(path, tmp_path)
    path.write_bytes(b"")
    assert "found an empty data set" in refusal(path, tmp_path)
    if ending != ".bz2":
        (tmp_path / "plain.jsonl").write_bytes(whole)
        assert f"add {ending} to its name" in refusal(tmp_path / "plain.jsonl", tmp_path)


def test_the_line_after_which_a_file_is_cut_off(tmp_path):
    many = b"".join(b'{"text": "%d %d"}\n' % (i, hash((i, i))) for i in range(3000))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(many)[:-2000])
    line = int(refusal(tmp_path / "rows.jsonl.gz", tmp_path).partition("after line ")[2].partition(":")[0])
    assert 2000 < line < 3000


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["bomb.jsonl", "bomb.json", "bomb.csv"])
def test_a_zip_bomb_is_not_unpacked(ending, name, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "EXPANSION_FLOOR", 2**20)
    (tmp_path / (name + ending)).write_bytes(COMPRESS[ending](b" " * 2**23))
    assert "a zip bomb?; decompress it yourself if you trust it" in refusal(tmp_path / (name + ending), tmp_path)


# ---------------------------------------------------------------- several files


def write_parts(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = TEXT.splitlines(keepends=True)
    (folder / "part-1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[3:])))
    (folder / "part-0.jsonl").write_bytes(b"".join(lines[:3]))


def test_patterns_and_folders_of_parts_come_sorted(tmp_path):
    for i in (2, 0, 1):
        (tmp_path / "parts" / str(i)).mkdir(parents=True)
        (tmp_path / "parts" / str(i) / "x.jsonl").write_bytes(b"".join(TEXT.splitlines(keepends=True)[2 * i:2 * i + 2]))
    (tmp_path / "parts" / "README.md").write_text("about")
    (tmp_path / "parts" / "_temporary").mkdir()
    (tmp_path / "parts" / "_temporary" / "y.jsonl").write_text("nonsense")
    assert prompts(tmp_path / "parts", tmp_path) == prompts(tmp_path / "parts" / "?" / "*.jsonl", tmp_path) == ALL
    assert prompts(tmp_path / "parts" / "[02]", tmp_path) == ALL[:2] + ALL[4:]
    assert "/parts/*.gz: expected files that match this pattern, found none" in refusal(tmp_path / "parts" / "*.gz", tmp_path)
    assert "README.md: expected a file that ends in .json" in refusal(tmp_path / "parts" / "*.md", tmp_path)


def test_names_of_sources(tmp_path):
    assert [files.stem(path) for path in ("a/chats.jsonl.gz", "a/parts/*.jsonl", "a/shard-*.jsonl.zst", "owner/name", "s3://b/C.PARQUET",
                                          "https://h/f.jsonl?download=true", "set/*/*")] == \
        ["chats", "parts", "shard", "name", "C", "f", "set"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "rows[1].jsonl").write_bytes(TEXT)
    assert prompts(tmp_path / "rows[1].jsonl", tmp_path) == ALL


def test_parts_of_another_split_are_left_out(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "data" / f"{name}.jsonl").write_bytes(TEXT.splitlines()[len(name) % 5])
    assert len(prompts(tmp_path / "set", tmp_path)) == 2 and len(prompts(tmp_path / "set", tmp_path, split="test")) == 1
    assert "expected parts of the split 'dev', found test, train; set split" in refusal(tmp_path / "set", tmp_path, split="dev")


def test_parts_of_several_kinds(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(TEXT)
    (tmp_path / "set" / "b.csv").write_text("prompt,completion\n")
    assert "expected parts of one kind, found .csv, .jsonl; name those to read by a pattern" in refusal(tmp_path / "set", tmp_path)


def test_a_mistake_in_a_part_names_it(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(TEXT)
    (tmp_path / "set" / "b.jsonl").write_bytes(TEXT + b'{"prompt": "Q", "completion": ""}\n')
    assert "set, b.jsonl, line 7: completion: expected text" in refusal(tmp_path / "set", tmp_path)
    monkeypatch.chdir(tmp_path / "set")
    assert refusal("*.jsonl", tmp_path).startswith("*.jsonl, b.jsonl, line 7: completion: expected text")
    (tmp_path / "set" / "b.jsonl").write_bytes(TEXT + b"{\n")
    assert "set/b.jsonl, line 7: expected one JSON object" in refusal(tmp_path / "set", tmp_path)


def test_the_cache_follows_every_part(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(TEXT)
    assert len(prompts(tmp_path / "set", tmp_path)) == 6
    (tmp_path / "set" / "b.jsonl").write_bytes(TEXT)
    assert len(prompts(tmp_path / "set", tmp_path)) == 12
    before = (tmp_path / "set" / "b.jsonl").stat()
    (tmp_path / "set" / "b.jsonl").write_bytes(TEXT.replace(b"What", b"That"))
    os.utime(tmp_path / "set" / "b.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prompts(tmp_path / "set", tmp_path)[6].startswith("That")


# ---------------------------------------------------------------- other machines


@pytest.fixture
def memory():
    """A file system of fsspec that is gone after the test."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_files_of_any_file_system(tmp_path, memory):
    write_parts(tmp_path / "parts")
    memory.put(str(tmp_path / "parts"), "/bucket/parts", recursive=True)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    memory.put(str(tmp_path / "rows.parquet"), "/bucket/rows.parquet")
    there = ["memory://bucket/parts", "memory://bucket/parts/part-*", "memory://bucket/*.parquet", "memory://bucket/rows.parquet"]
    for path in there:
        assert prompts(path, tmp_path) == ALL
    memory.pipe("/bucket/parts/part-0.jsonl", TEXT + b"{\n")
    assert "memory:///bucket/parts/part-0.jsonl, line 7: expected one JSON object" in refusal("memory://bucket/parts", tmp_path)
    memory.pipe("/bucket/parts/part-0.jsonl", TEXT)
    assert len(prompts("memory://bucket/parts", tmp_path)) == 9
    assert "found no such file" in refusal("memory://bucket/none.jsonl", tmp_path)
    assert "found none" in refusal("memory://bucket/none*.jsonl", tmp_path)


def test_files_inside_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inside/rows.jsonl", TEXT)
        archive.writestr("inside/wrong.jsonl", TEXT + b"{\n")
    assert prompts(f"zip://inside/rows.jsonl::{tmp_path}/a.zip", tmp_path) == ALL
    assert "inside/wrong.jsonl::" in refusal(f"zip://inside/w*.jsonl::{tmp_path}/a.zip", tmp_path)
    assert "a.zip, line 7: expected one JSON object" in refusal(f"zip://inside/w*.jsonl::{tmp_path}/a.zip", tmp_path)


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(TEXT)
    (tmp_path / "set" / "b.jsonl").symlink_to(tmp_path / "nothing")
    assert refusal(tmp_path / "set", tmp_path).endswith("b.jsonl: expected a file, found a link to nothing; remove or mend it")
    (tmp_path / "rows.tar.gz").write_bytes(gzip.compress(TEXT))
    assert "found .tar.gz; convert or rename it" in refusal(tmp_path / "rows.tar.gz", tmp_path)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    whole = (tmp_path / "rows.parquet").read_bytes()
    for damaged in (whole[:-30], whole[:100] + bytes(200) + whole[300:], b"PAR1" + bytes(50) + b"PAR1"):
        (tmp_path / "rows.parquet").write_bytes(damaged)
        assert "rows.parquet: expected a Parquet file, found one that cannot be read" in refusal(tmp_path / "rows.parquet", tmp_path)
    assert "Invalid IPv6" in refusal("https://[::1/f.jsonl", tmp_path)


def test_folders_that_a_pattern_matches_give_their_parts_alone(tmp_path):
    write_parts(tmp_path / "set" / "0")
    (tmp_path / "set" / "0" / "_SUCCESS").write_bytes(b"")
    (tmp_path / "set" / "0" / "README.md").write_bytes(b"")
    assert prompts(tmp_path / "set" / "*", tmp_path) == ALL


def test_text_in_another_encoding(tmp_path):
    for name in ("rows.jsonl", "rows.csv", "rows.json"):
        (tmp_path / name).write_bytes(TEXT.decode().encode("utf-16"))
        assert f"{name}: expected UTF-8 text, found UTF-16; convert the file" in refusal(tmp_path / name, tmp_path)


def test_a_file_system_whose_package_is_missing_or_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(files.known_implementations, "cloud", {"class": "cloudfs.CloudFileSystem", "err": "Install cloudfs"})
    assert refusal("cloud://bucket/x.jsonl", tmp_path) == \
        "cloud://bucket/x.jsonl: expected the package that reads cloud://, found it is not installed; pip install cloudfs"
    assert "Protocol not known: nothing" in refusal("nothing://bucket/x.jsonl", tmp_path)


class Site(http.server.SimpleHTTPRequestHandler):
    """A web server that cuts files off after the name "cut", and hides what is secret."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        if "secret" in self.path:
            self.send_error(403)
        elif "cut" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(TEXT)
            self.close_connection = True
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.mark.slow
def test_files_of_a_web_server(tmp_path):
    write_parts(tmp_path / "site")
    (tmp_path / "site" / "rows.jsonl.gz").write_bytes(gzip.compress(TEXT))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "site" / "rows.parquet")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(tmp_path / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for name in ("rows.jsonl.gz", "rows.jsonl.gz?download=true", "rows.parquet"):
            assert prompts(f"{url}/{name}", tmp_path) == ALL
        (tmp_path / "site" / "rows.jsonl.gz").write_bytes(gzip.compress(TEXT + TEXT))
        assert len(prompts(f"{url}/rows.jsonl.gz", tmp_path)) == 12
        assert "found no such file" in refusal(f"{url}/none.jsonl", tmp_path)
        assert "check the address, the network and your access" in refusal(f"{url}/cut.jsonl", tmp_path)
        assert "found ClientConnectorError" in refusal("https://127.0.0.1:9/x.jsonl", tmp_path)
        assert "secret.jsonl: expected files that can be read, found ClientResponseError: 403" in refusal(f"{url}/secret.jsonl", tmp_path)
    finally:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------- chats in other forms, and who else reads


@pytest.mark.parametrize("column, role, content", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_chats_as_json_text_or_as_a_dict_of_lists(column, role, content, tmp_path):
    turns = [{role: turn["role"], content: turn["content"]} for turn in CHAT]
    lists = {role: [turn[role] for turn in turns], content: [turn[content] for turn in turns]}
    Dataset.from_list([{column: json.dumps(turns)}]).to_csv(tmp_path / "text.csv")
    Dataset.from_list([{column: json.dumps(turns)}]).to_parquet(tmp_path / "text.parquet")
    Dataset.from_list([{column: lists}]).to_parquet(tmp_path / "lists.parquet")
    Dataset.from_list([{column: json.dumps(lists)}]).save_to_disk(tmp_path / "saved")
    for name in ("text.csv", "text.parquet", "lists.parquet", "saved"):
        assert prompts(tmp_path / name, tmp_path) == ["Q"]
    mapped = tmp_path / "mapped.jsonl"
    mapped.write_text(json.dumps({"log": {"chat": json.dumps(turns)}}))
    assert prompts(mapped, tmp_path, columns={column: "log.chat"}) == ["Q"]


@pytest.mark.parametrize("value, words", [
    ("[{'role': 'user'}]", "expected a list of messages, or JSON of one, in 'messages', found JSON that cannot be read"),
    ("[" * 100_000, "found JSON that cannot be read"),
    ("hello", "expected a list of messages"),
    ({"role": ["user"], "content": []}, "expected lists of one length in 'messages', found role: 1, content: 0"),
])
def test_chats_in_no_form(value, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": value}))
    assert "rows.jsonl, line 2: " in refusal(tmp_path / "rows.jsonl", tmp_path) and words in refusal(tmp_path / "rows.jsonl", tmp_path)


def test_a_completion_that_is_json_stays_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Write a chat", "completion": json.dumps(CHAT)}))
    (_, records), = load_sources(str(tmp_path / "rows.jsonl"), "domain", cache_dir=str(tmp_path / "cache"))
    assert records[0]["messages"][1]["content"] == json.dumps(CHAT)


def test_item_files_are_read_by_the_same_reader(tmp_path):
    write_parts(tmp_path / "parts")
    (tmp_path / "q.csv.gz").write_bytes(gzip.compress(b'question,options,answer\n1?,"[""0"", ""1""]",1\n'))
    (tmp_path / "chats.ndjson").write_text(json.dumps({"messages": json.dumps(CHAT)}))
    parts, choice, chats = read_files(Data(general=[str(tmp_path / "parts"), str(tmp_path / "q.csv.gz"),
                                                    Items(str(tmp_path / "chats.ndjson"), metric="logprob")]))
    assert [item.prompt[0]["content"] for item in parts.items] == ALL and parts.name == "parts"
    assert parts.items[-1].place.endswith("parts, part-1.jsonl.gz, line 3")
    assert choice.metric == "choice" and choice.name == "q" and len(chats.items[0].chat) == 2


def test_evaluation_files_of_synthesis_are_read_by_the_same_reader(tmp_path):
    contamination = pytest.importorskip("synth.filters.contamination")
    write_parts(tmp_path / "parts")
    (tmp_path / "chats.jsonl.zst").write_bytes(zstd(json.dumps({"messages": json.dumps(CHAT)}).encode()))
    assert [item.text for item in contamination.read_items(str(tmp_path / "parts"))] == ALL
    assert [item.text for item in contamination.read_items(str(tmp_path / "chats.jsonl.zst"))] == ["Q"]
    before = contamination.fingerprint(str(tmp_path / "parts"))
    (tmp_path / "parts" / "part-0.jsonl").write_bytes(TEXT)
    assert contamination.fingerprint(str(tmp_path / "parts")) != before
