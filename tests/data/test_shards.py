"""WebDataset shards: no sample is lost silently, and no code in them is run."""

import io
import json
import os
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from smalti.data.image_io import FolderOptions
from smalti.data.sources import download
from smalti.data.sources.base import (
    ShardOptions,
    SourceOptions,
    open_source,
    open_unverified,
)
from smalti.data.sources.folder import EXTENSIONS
from smalti.data.sources.shard_members import BLOCK, MAX_ANNOTATION_BYTES, list_members
from smalti.data.sources.webdataset import (
    ShardPictures,
    expand_braces,
    expand_shards,
    read_manifest,
)
from smalti.errors import SmaltiError

COUNT = 6


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 12), (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(first: int = 0, count: int = COUNT) -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        members[f"{number:03d}.png"] = png(number)
        members[f"{number:03d}.cls"] = str(number % 2).encode()
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(2):
        write_tar(tmp_path / "set" / f"{number:03d}.tar", samples(COUNT * number))
    return tmp_path / "set"


def test_samples_are_those_that_webdataset_reads(shards: Path) -> None:
    source = open_source(f"{shards}/{{000..001}}.tar")
    files = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(files, shardshuffle=False).decode("rgb8"))
    assert len(source) == len(theirs) == 2 * COUNT
    for index, sample in enumerate(theirs):
        assert np.array_equal(np.asarray(source.read(index)), sample["png"])
        assert source.labels[index] == int(sample["cls"])
    assert source.name(COUNT) == "001.tar/006.png"


@pytest.mark.parametrize("manifest", [False, True])
def test_a_shard_truncated_anywhere_is_an_error_and_never_fewer_samples(
    tmp_path: Path, manifest: bool
) -> None:
    """At every block, so also exactly between two members, where tar readers see no error."""
    whole = write_tar(tmp_path / "000.tar", samples())
    content = whole.read_bytes()
    end = max(m.offset + m.size for m in list_members(whole))
    if manifest:
        (tmp_path / "manifest.json").write_text(json.dumps({"000.tar": COUNT}))
    cuts = [*range(0, len(content), BLOCK), end + 7, end - 7, end - BLOCK + 1]
    for cut in cuts:
        whole.write_bytes(content[:cut])
        try:
            found = len(open_source(str(whole)))
        except SmaltiError as error:
            assert "000.tar" in str(error) and "\n" not in str(error)
        else:
            assert found == COUNT  # nothing but padding was lost
            assert cut > end
    assert sum(cut <= end for cut in cuts) > 10


def test_a_shard_that_lost_samples_contradicts_the_manifest(shards: Path) -> None:
    (shards / "sizes.json").write_text(json.dumps({"000.tar": COUNT, "001.tar": COUNT}))
    assert len(open_source(str(shards))) == 2 * COUNT
    write_tar(shards / "001.tar", samples(COUNT, COUNT - 1))  # properly closed
    with pytest.raises(SmaltiError, match=r"001.tar holds 5 samples, but 6 are listed"):
        open_source(str(shards))


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "manifest.json").write_text(json.dumps({"shards": {"000.tar": 6, "001.tar": 6}}))
    (shards / "001.tar").unlink()
    for spec in (str(shards), f"{shards}/*.tar", f"{shards}/{{000..001}}.tar"):
        with pytest.raises(SmaltiError, match=r"001.tar"):
            open_source(spec)
    assert len(open_source(f"{shards}/000.tar")) == COUNT


def test_a_compressed_shard_among_others_is_not_ignored(shards: Path) -> None:
    (shards / "more.tar.gz").write_bytes(b"")
    with pytest.raises(SmaltiError, match=r"more.tar.gz would be ignored: decompress it"):
        open_source(str(shards))


def test_manifests_of_other_tools_are_read(shards: Path) -> None:
    listed = [{"url": f"http://x/{name}", "nsamples": 6} for name in ("000.tar", "001.tar")]
    (shards / "_shards.json").write_text(json.dumps({"shardlist": listed, "wids_version": 1}))
    assert read_manifest(shards) == {"000.tar": 6, "001.tar": 6}
    (shards / "_shards.json").write_text(json.dumps({"000.tar": "six"}))
    with pytest.raises(SmaltiError, match=r"_shards.json does not list the number"):
        open_source(str(shards))
    (shards / "_shards.json").write_text(json.dumps({"000.tar": 6}))
    with pytest.raises(SmaltiError, match=r"manifest beside .*001.tar does not name it"):
        open_source(str(shards))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("suffix", ["pyd", "pkl", "pickle", "pth", "npy", "cls.pyd", "json.pkl"])
def test_pickled_members_are_never_opened(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "exploded"
    bombs = {f"{n:03d}.{suffix}": pickle.dumps(Bomb(target)) for n in range(COUNT)}
    source = open_source(str(write_tar(tmp_path / "000.tar", {**samples(), **bombs})))
    for index in range(len(source)):
        source.read(index)
    assert len(source) == COUNT and not target.exists()


def test_a_pickle_named_like_a_label_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    members = {**samples(), "000.cls": pickle.dumps(Bomb(target))}
    with pytest.raises(SmaltiError, match=r"000.cls .* holds no label"):
        open_source(str(write_tar(tmp_path / "000.tar", members)))
    assert not target.exists()


@pytest.mark.parametrize("spec", ["pipe:touch {}", "pipe:touch {} .tar", "{}.tar::x.tar"])
def test_commands_are_refused(tmp_path: Path, spec: str) -> None:
    target = tmp_path / "ran"
    with pytest.raises(SmaltiError, match="are not run"):
        open_source(spec.format(target))
    assert not target.exists()


def test_names_outside_the_folder_unpack_nothing(tmp_path: Path) -> None:
    members = {"../../up.png": png(1), "../../up.cls": b"0", "/abs.png": png(2), "/abs.cls": b"1"}
    source = open_source(str(write_tar(tmp_path / "a" / "b" / "000.tar", members)))
    assert [source.read(index).getpixel((0, 0))[0] for index in range(2)] == [1, 2]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["000.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "000.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("000.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(SmaltiError, match=r"000.png in .*000.tar is a link"):
        open_source(str(path))


def test_incomplete_and_duplicate_samples_are_named(tmp_path: Path) -> None:
    def opened(**changes: bytes):
        members = {**samples(), **{name.replace("_", "."): c for name, c in changes.items()}}
        return open_source(str(write_tar(tmp_path / "000.tar", members)))

    with pytest.raises(SmaltiError, match=r"a label for extra, but no picture"):
        opened(extra_cls=b"1")
    with pytest.raises(SmaltiError, match=r"extra in .* has no label: add extra.cls"):
        opened(extra_png=png(0))
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name in ("0.png", "0.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(SmaltiError, match="two pictures for 0"):
        open_source(str(tmp_path / "twice.tar"))


def test_members_of_a_sample_need_not_be_adjacent(tmp_path: Path) -> None:
    members = samples()
    apart = dict(sorted(members.items(), key=lambda pair: pair[0][-3:]))  # all .cls first
    source = open_source(str(write_tar(tmp_path / "000.tar", apart)))
    assert len(source) == COUNT and source.labels.tolist() == [0, 1] * 3


def test_labels_are_numbers_names_or_json(tmp_path: Path) -> None:
    def classes(*labels: tuple[str, bytes]):
        members = {}
        for number, (suffix, content) in enumerate(labels):
            members |= {f"{number}.png": png(number), f"{number}.{suffix}": content}
        source = open_source(str(write_tar(tmp_path / "000.tar", members)))
        return source.classes, source.labels.tolist()

    assert classes(("cls", b"1"), ("cls", b"0\n")) == (("0", "1"), [1, 0])
    assert classes(("cls", b"dog"), ("cls", b"cat")) == (("cat", "dog"), [1, 0])
    assert classes(("json", b'{"label": 1}'), ("cls", b"0")) == (("0", "1"), [1, 0])
    with pytest.raises(SmaltiError, match=r"0.cls .* holds no label"):
        classes(("cls", b"-1"), ("cls", b"0"))
    with pytest.raises(SmaltiError, match="has no label"):
        classes(("json", b'{"width": 3}'), ("cls", b"0"))
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert classes(("cls", b"1"), ("cls", b"0")) == (("a", "b"), [1, 0])
    with pytest.raises(SmaltiError, match="labels go up to 2"):
        classes(("cls", b"2"), ("cls", b"0"))


@pytest.mark.parametrize("odd", [b"cat", b"1.0", b"ten"])
def test_a_name_among_numbers_renumbers_no_class(tmp_path: Path, odd: bytes) -> None:
    """As names, 10 would come before 2. The message names the single one, first or last."""
    for place in (0, 10):
        members = {}
        for number in range(11):
            label = odd if number == place else str(number).encode()
            members |= {f"{number:02d}.png": png(number), f"{number:02d}.cls": label}
        path = write_tar(tmp_path / "000.tar", members)
        message = rf"^{place:02d} in \S+000.tar has the label '{odd.decode()}', but 10 .*numbers"
        with pytest.raises(SmaltiError, match=message):
            open_source(str(path))
    members |= {"10.cls": b"10"}
    source = open_source(str(write_tar(tmp_path / "000.tar", members)))
    assert source.labels.tolist() == list(range(11))


def test_a_number_among_names_in_another_shard_is_named(tmp_path: Path) -> None:
    for number, labels in enumerate((("a", "b", "c"), ("a", "7", "b"))):
        members = {}
        for row, label in enumerate(labels):
            members |= {f"{row}.png": png(row), f"{row}.json": f'{{"label": "{label}"}}'.encode()}
        write_tar(tmp_path / f"{number}.tar", members)
    with pytest.raises(SmaltiError, match=r"^1 in \S+1.tar has the label 7, but 5 .*names"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("000.cls", b"\0"),
        ("000.cls", b"\0" * 3),
        ("000.cls", b"cat\ndog"),
        ("000.cls", b"\x1b[31mred"),
        ("000.json", b"\0" * 20),
        ("000.json", b'{"label": "\\u0000"}'),
        ("000.json", b'{"label": "\\ud800"}'),
    ],
)
def test_a_label_that_cannot_be_printed_is_refused(
    tmp_path: Path, member: str, content: bytes
) -> None:
    named = {f"{n:03d}.cls": f"class {n % 2}".encode() for n in range(COUNT)}
    members = {**samples(), **named, member: content}
    with pytest.raises(SmaltiError, match=rf"^{member} in \S+000.tar ") as error:
        open_source(str(write_tar(tmp_path / "000.tar", members)))
    assert str(error.value).isprintable()


def test_names_of_classes_may_be_of_any_language(tmp_path: Path) -> None:
    names = ("\u0645\u06cc\u200c\u0634\u0648\u062f", "\u72ac", "\U0001f468\u200d\U0001f33e", "a b")
    members = {}
    for number, name in enumerate(names):
        members |= {f"{number}.png": png(number), f"{number}.cls": name.encode()}
    source = open_source(str(write_tar(tmp_path / "000.tar", members)))
    assert source.classes == tuple(sorted(names))


def test_a_large_json_member_beside_a_label_is_ignored(tmp_path: Path) -> None:
    large = {"000.json": b'{"label": 9, "text": "' + b"x" * MAX_ANNOTATION_BYTES + b'"}'}
    source = open_source(str(write_tar(tmp_path / "000.tar", {**samples(), **large})))
    assert source.labels.tolist() == [0, 1] * 3


def test_a_gap_of_zeros_hides_no_samples(tmp_path: Path) -> None:
    """A copy with zeros from some byte on, or without the header of a member."""
    path = write_tar(tmp_path / "000.tar", samples(0, 40))
    content = path.read_bytes()
    (middle,) = [m.offset for m in list_members(path) if m.key == "010"]
    head = middle - BLOCK
    for damaged in (
        content[:head] + bytes(len(content) - head),
        content[:head] + bytes(BLOCK) + content[middle:],
        content + content,
    ):
        path.write_bytes(damaged)
        with pytest.raises(SmaltiError, match=r"000.tar is cut or damaged .*more follows"):
            open_source(str(path))


@pytest.mark.parametrize("count", range(1, 21))
def test_archives_of_any_length_are_complete(tmp_path: Path, count: int) -> None:
    """They are padded to a multiple of 10240 bytes, or not at all."""
    path = write_tar(tmp_path / "000.tar", samples(0, count))
    assert len(list_members(path)) == count
    end = max(-(-(m.offset + m.size) // BLOCK) for m in list_members(path)) * BLOCK + 2 * BLOCK
    path.write_bytes(path.read_bytes()[: end + 2 * BLOCK])  # the label's, then two of zeros
    assert len(list_members(path)) == count


def test_members_belong_together_as_webdataset_says(tmp_path: Path, caplog) -> None:
    """Dots within a name: the key ends at the first, the kind begins after the last."""
    names = ("a", "f1.8_c", "b", "f2.8_d")
    members = {}
    for number, name in enumerate(names):
        members |= {f"{name}.png": png(number), f"{name}.cls": str(number % 2).encode()}
    path = write_tar(tmp_path / "000.tar", members)
    source = open_source(str(path))
    theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert [member.key for member in list_members(path)] == [s["__key__"] for s in theirs]
    assert [source.name(i) for i in range(4)] == [f"000.tar/{name}.png" for name in names]
    assert [source.read(i).getpixel((0, 0))[0] for i in range(4)] == [0, 1, 2, 3]
    assert source.labels.tolist() == [0, 1, 0, 1] and caplog.messages == []
    write_tar(path, {**members, "f1.9_e.png": png(9)})
    with pytest.raises(SmaltiError, match="two pictures for f1: rename one"):
        open_source(str(path))


def test_members_that_are_ignored_are_counted_and_named(tmp_path: Path, caplog) -> None:
    more = {f"{n:03d}.{suffix}": b"?" for n in range(3) for suffix in ("txt", "mask.png")}
    more |= {"._000.png": b"?", "README": b"?", "000.meta.json": b"not JSON", "7.boxes.json": b"?"}
    source = open_source(str(write_tar(tmp_path / "000.tar", {**more, **samples()})))
    assert len(source) == COUNT and source.name(0) == "000.tar/000.png"
    assert source.labels.tolist() == [0, 1] * 3
    assert "ignored 6 members of" in caplog.text and "3 of the 6 pictures" in caplog.text
    kinds = "1 hidden (._000.png), 1 without suffix (README)"
    assert f"3 .mask.png (000.mask.png), 1 .meta.json (000.meta.json), {kinds}" in caplog.text
    assert "ignored 1 samples of" in caplog.text and ": 1 .boxes.json (7.boxes.json)" in caplog.text


@pytest.mark.parametrize(
    "pattern",
    ["{0..99999999999}.tar", "{a,b}" * 40, "{{a,b},c}", "{{a,b}{a,b},{c,d}}" * 20, "{a,b", "a}{b"],
)
def test_patterns_that_stand_for_too_much_are_refused_at_once(pattern: str) -> None:
    with pytest.raises(SmaltiError, match=r"use at most 1000000|nested or unbalanced"):
        expand_braces(pattern)


def test_patterns_are_ranges_and_lists() -> None:
    assert expand_braces("a{08..11}.tar") == [f"a{n:02d}.tar" for n in (8, 9, 10, 11)]
    assert expand_braces("{9..10}") == ["9", "10"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand_braces("plain") == ["plain"]
    for wrong in ("{3..1}.tar", "{abc}.tar", "{0..999}{0..9999}.tar"):
        with pytest.raises(SmaltiError):
            expand_braces(wrong)
    with pytest.raises(SmaltiError, match="no shards match"):
        expand_shards("/nowhere/*.tar")
    with pytest.raises(SmaltiError, match="decompress"):
        open_source("/nowhere/0.tar.gz")
    assert ".pkl" not in EXTENSIONS and ".pyd" not in EXTENSIONS


# -- what is passed over, and labels elsewhere ----------------------------------------------------


def test_samples_in_unread_formats_are_counted_and_named(tmp_path: Path, caplog) -> None:
    """Half of an unlabelled set in another format; no manifest fixes the wrong count."""
    members = {f"{n}.{'png' if n % 2 else 'ppm'}": png(n) for n in range(8)}
    one = FolderOptions(single_class=True)
    path = write_tar(tmp_path / "000.tar", members)
    source = open_source(str(path), options=one)
    message = "without a picture that can be read: 4 .ppm (0.ppm); save their pictures as PNG"
    assert len(source) == 4 and f"ignored 4 samples of {path} {message}" in caplog.text
    assert any(message in remark for remark in source.remarks)
    pictures = open_unverified(str(path), SourceOptions(one))
    assert isinstance(pictures, ShardPictures)
    with pytest.raises(SmaltiError, match=r"no manifest .* not count 4 samples .*4 .ppm"):
        pictures.write_manifests()
    assert not (tmp_path / "manifest.json").exists()


def test_a_label_whose_picture_has_an_unknown_extension_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "000.tar", {**samples(), "x.ppm": png(0), "x.cls": b"1"})
    with pytest.raises(SmaltiError, match=r"label for x, but its picture has an unknown .*x.ppm"):
        open_source(str(path))


def test_a_manifest_with_too_few_samples_can_be_replaced(shards: Path) -> None:
    manifest = shards / "manifest.json"
    manifest.write_text(json.dumps({"shards": {"000.tar": COUNT, "001.tar": 2}}))
    with pytest.raises(SmaltiError, match=r"holds 6 samples, but 2 are listed .*--write_manifest"):
        open_source(str(shards))
    manifest.unlink()
    pictures = open_unverified(str(shards), SourceOptions())
    assert isinstance(pictures, ShardPictures) and pictures.write_manifests() == [manifest]
    assert read_manifest(shards) == {"000.tar": COUNT, "001.tar": COUNT}


def test_files_beside_shards_are_counted_and_named(shards: Path, caplog) -> None:
    (shards / "002.tar.part").write_bytes(b"")
    (shards / "classes.json").write_text('["a", "b"]')
    assert len(open_source(str(shards))) == 2 * COUNT
    assert caplog.messages == [f"ignored 1 files in {shards}: 1 .part (002.tar.part)"]


def test_labels_elsewhere_are_named_by_an_option(tmp_path: Path, caplog) -> None:
    def opened(label: str, **members: bytes):
        content = {f"{n}.{kind}": text for kind, text in members.items() for n in (0, 1)}
        content = {name: text % int(name[0]) for name, text in content.items()}
        path = write_tar(tmp_path / "000.tar", {"0.png": png(0), "1.png": png(1), **content})
        one = FolderOptions(single_class=True)
        return open_source(str(path), options=one, shards=ShardOptions(label))

    category = b'{"category": "class %d"}'
    for label, members in {".txt": {"txt": b"class %d"}, "category": {"json": category}}.items():
        source = opened(label, **members)
        assert source.classes == ("class 0", "class 1") and source.labels.tolist() == [0, 1]
    assert opened("", json=category).classes == ("",)
    unlabelled = open_source(str(tmp_path / "000.tar"))
    assert unlabelled.classes == () and unlabelled.labels.tolist() == [0, 0]
    again = open_source(str(tmp_path / "000.tar"), label_column="category")
    assert again.classes == ("class 0", "class 1")
    with pytest.raises(SmaltiError, match=r'"category" and --shards.label is "kind": leave out'):
        SourceOptions(shards=ShardOptions("kind"), label_column="category")
    assert "2 .json without a label (0.json); name the label in --label_column" in caplog.text
    with pytest.raises(SmaltiError, match=r'0 in .* has no label: add 0.json with "kind"'):
        opened("kind", json=category)
    with pytest.raises(SmaltiError, match=r"0.json .* holds no label \(True\)"):
        opened("", json=b'{"label": true, "%d": 0}')
    with pytest.raises(SmaltiError, match=r"--shards.\* is for WebDataset shards"):
        open_source("emoji", shards=ShardOptions(".txt"))


def test_brackets_and_braces_in_a_path_are_part_of_it(tmp_path: Path) -> None:
    for name in ("set [1]", "set {a}", "a*"):
        for number in range(2):
            write_tar(tmp_path / name / f"[{number}].tar", samples(COUNT * number))
        for pattern in ("", "*.tar", "[[]?].tar", "[{0..1}].tar"):
            assert len(open_source(f"{tmp_path / name}/{pattern}")) == 2 * COUNT, pattern
        assert len(open_source(f"{tmp_path / name}/[0].tar")) == COUNT


def test_a_pipe_is_never_opened(shards: Path, caplog) -> None:
    os.mkfifo(shards / "002.tar")
    assert len(open_source(str(shards))) == 2 * COUNT
    assert "1 pipe or device (002.tar)" in caplog.text
    with pytest.raises(SmaltiError, match=r"002.tar is a pipe or a device"):
        open_source(str(shards / "002.tar"))


# -- behind a URL -----------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, records the requests, and may truncate the answers."""

    requested: list[str]
    cut: dict[str, int]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        short = self.cut.get(self.path)
        if short is None:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:short])

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def served(shards: Path, monkeypatch):
    """The shards behind http, and the handler that serves them."""
    monkeypatch.setattr("smalti.data.sources.download.time.sleep", lambda seconds: None)
    Handler.requested, Handler.cut = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{{000..001}}.tar"
    server.shutdown()
    server.server_close()


def test_shards_behind_a_url_are_copied_once(served: str, shards: Path, tmp_path: Path) -> None:
    here = open_source(str(shards))
    cache = tmp_path / "cache"
    there = open_source(served, stream_cache=cache)
    assert there.fingerprint == here.fingerprint
    assert there.labels.tolist() == here.labels.tolist()
    Handler.requested.clear()
    assert len(open_source(served, stream_cache=cache)) == 2 * COUNT
    assert Handler.requested == []
    with pytest.raises(SmaltiError, match="--stream_cache"):
        open_source(served)


def test_the_manifest_behind_a_url_is_checked(served: str, shards: Path, tmp_path: Path) -> None:
    (shards / "sizes.json").write_text(json.dumps({"000.tar": COUNT, "001.tar": COUNT + 1}))
    with pytest.raises(SmaltiError, match=r"001.tar holds 6 samples, but 7 are listed"):
        open_source(served, stream_cache=tmp_path / "cache")


def test_the_place_of_labels_is_known_before_shards_are_copied(
    served: str, shards: Path, tmp_path: Path
) -> None:
    for name in ("000.tar", "001.tar"):
        described = {"0.json": b'{"label": ["not", "one"], "kind": "x"}'}
        write_tar(shards / name, {"0.png": png(0), **described})
    flags = {"stream_cache": tmp_path / "cache", "options": FolderOptions(single_class=True)}
    with pytest.raises(SmaltiError, match=r"0.json .* holds no label .*--label_column"):
        open_source(served, **flags)
    assert open_source(served, **flags, shards=ShardOptions("kind")).classes == ("x",)


def test_an_incomplete_copy_is_not_kept(served: str, tmp_path: Path) -> None:
    Handler.cut["/001.tar"] = 3 * BLOCK
    with pytest.raises(SmaltiError, match=r"001.tar cannot be fetched: 1536 of \d+ bytes arrived"):
        open_source(served, stream_cache=tmp_path / "cache")
    assert Handler.requested.count("/001.tar") == 3  # it was tried again
    assert [path.name for path in (tmp_path / "cache").rglob("*.tar")] in (["000.tar"], [])
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
    Handler.cut.clear()
    assert len(open_source(served, stream_cache=tmp_path / "cache")) == 2 * COUNT


def test_a_shard_that_is_truncated_at_its_origin_is_not_kept(
    served: str, shards: Path, tmp_path: Path
) -> None:
    path = shards / "001.tar"
    path.write_bytes(path.read_bytes()[: 4 * BLOCK])  # between two members
    with pytest.raises(SmaltiError, match=r"http://.*/001.tar: .*no end-of-archive mark"):
        open_source(served, stream_cache=tmp_path / "cache")
    path.unlink()
    with pytest.raises(SmaltiError, match=r"there is no shard http://.*001.tar"):
        open_source(served, stream_cache=tmp_path / "cache")


def test_urls_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    for url in ("ftp://x/0.tar", "python://os/0.tar", "http://x/"):
        with pytest.raises(SmaltiError):
            open_source(url, stream_cache=tmp_path)


def test_stores_are_read_through_fsspec(shards: Path, tmp_path: Path, monkeypatch) -> None:
    import fsspec

    monkeypatch.setitem(download.STORES, "memory", "none")
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    source = open_source("memory://bucket/{000..001}.tar", stream_cache=tmp_path / "cache")
    assert len(source) == 2 * COUNT
