"""Downloads from a server of this machine, and archives that mean harm."""

import functools
import hashlib
import http.server
import io
import stat
import tarfile
import threading
import tomllib
import zipfile

import pytest

from ramslib import __main__ as command_line
from ramslib.data import datasets
from ramslib.errors import InputError

download = datasets.preparation("download")
download_file, unpack = download.download_file, download.unpack

DATA = bytes(range(256)) * 40
MD5, SHA256 = (hashlib.new(kind, DATA).hexdigest() for kind in ("md5", "sha256"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; may be cut off after some bytes, or know no ranges."""

    def do_GET(self):
        self.server.asked.append(self.headers["Range"])
        data = self.server.files.get(self.path)
        if data is None:
            return self.send_error(404, "Not Found")
        start = 0
        if self.server.ranges and self.headers["Range"]:
            start = int(self.headers["Range"][6:-1])
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.wfile.write(data[start:][:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cuts, server.ranges, server.asked = {"/file.bin": DATA}, [], True, []
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---------------------------------------------------------------- fetching


@pytest.mark.parametrize("checksum", ["", MD5, SHA256])
def test_a_file_is_fetched_whole(server, tmp_path, checksum):
    download_file(f"{server.address}/file.bin", tmp_path / "new/file.bin", checksum)
    assert (tmp_path / "new/file.bin").read_bytes() == DATA and names(tmp_path / "new") == [
        "file.bin"
    ]


def test_what_is_cut_off_goes_on_by_itself_while_it_grows(server, tmp_path):
    server.cuts = [1000, 3000]
    download_file(f"{server.address}/file.bin", tmp_path / "file.bin", MD5)
    assert (tmp_path / "file.bin").read_bytes() == DATA
    assert server.asked == [None, "bytes=1000-", "bytes=4000-"]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server, tmp_path):
    server.cuts = [1000, 0]
    call = functools.partial(
        download_file, f"{server.address}/file.bin", tmp_path / "file.bin", MD5
    )
    found = message(call)
    assert f"cut off at 1,000 of {len(DATA):,} bytes" in found and "resumes after 1,000" in found
    assert (tmp_path / "file.bin.part").read_bytes() == DATA[:1000]
    call()
    assert (tmp_path / "file.bin").read_bytes() == DATA and server.asked[-1] == "bytes=1000-"


def test_a_part_that_was_complete_is_not_fetched_again(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(DATA)
    download_file(f"{server.address}/file.bin", tmp_path / "file.bin", MD5)
    assert names(tmp_path) == ["file.bin"]
    (tmp_path / "longer.part").write_bytes(DATA + b"more")
    server.files["/longer"] = DATA
    found = message(lambda: download_file(f"{server.address}/longer", tmp_path / "longer"))
    assert "416" in found and (tmp_path / "longer.part").read_bytes() == DATA + b"more"


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges, server.cuts = False, [1000, 1000]
    call = functools.partial(
        download_file, f"{server.address}/file.bin", tmp_path / "file.bin", MD5
    )
    assert "cut off at 1,000" in message(call)
    call()
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_a_wrong_checksum_is_refused_and_kept_aside(server, tmp_path):
    path = tmp_path / "file.bin"
    found = message(lambda: download_file(f"{server.address}/file.bin", path, "0" * 32))
    assert MD5 in found and server.address in found and "file.bin.wrong" in found
    assert names(tmp_path) == ["file.bin.wrong"]


def test_no_answer_is_one_line(server, tmp_path):
    found = message(lambda: download_file(f"{server.address}/other.bin", tmp_path / "other.bin"))
    assert f"{server.address}/other.bin: not downloaded (HTTP Error 404: Not Found)" in found
    assert "refused" in message(lambda: download_file("http://127.0.0.1:9/file", tmp_path / "file"))
    assert names(tmp_path) == []


def test_a_full_disk_is_said_before_anything_is_written(server, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)._replace(free=len(DATA) - 1)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    found = message(lambda: download_file(f"{server.address}/file.bin", tmp_path / "file.bin"))
    assert f"{len(DATA):,} bytes are more than its disk" in found and names(tmp_path) == []


# ---------------------------------------------------------------- unpacking


def write_tar(path, members, mode="w:gz"):
    """Members by name: bytes, or the type of a special member."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) == 1:
                info.type, info.linkname = content, "../../outside"
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            if content == tarfile.SYMTYPE:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, content)
    return path


WRITERS = {
    "a.tgz": write_tar,
    "a.tar": functools.partial(write_tar, mode="w"),
    "a.zip": write_zip,
}


@pytest.fixture(params=WRITERS)
def pack(request, tmp_path):
    """Function that packs members into an archive of each kind in a folder of its own."""
    (tmp_path / "data").mkdir()
    return functools.partial(WRITERS[request.param], tmp_path / "data" / request.param)


def test_what_is_packed_is_unpacked(pack, tmp_path):
    members = {"set/a.txt": DATA, "./set/deep/b.txt": b"", "c.txt": b"text"}
    unpack(pack(members), tmp_path / "data")
    for name, content in members.items():
        assert (tmp_path / "data" / name).read_bytes() == content
    assert not [name for name in names(tmp_path / "data") if "unpacking" in name]


@pytest.mark.parametrize(
    "name", ["../outside", "set/../../outside", "/outside", "C:\\outside", "..\\outside"]
)
def test_a_way_out_is_refused(pack, tmp_path, name):
    archive = pack({"set/a.txt": DATA, name: b"harm"})
    found = message(lambda: unpack(archive, tmp_path / "data"))
    assert "leads out of its folder" in found and str(archive) in found
    assert names(tmp_path) == ["data", f"data/{archive.name}"]


SPECIAL = ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE"]


@pytest.mark.parametrize("kind", SPECIAL)
def test_links_and_devices_are_refused(tmp_path, kind):
    members = {"set/a.txt": DATA, "link": getattr(tarfile, kind), "link/x": DATA}
    archive = write_tar(tmp_path / "a.tgz", members)
    assert "'link' in it is neither file nor folder" in message(lambda: unpack(archive, tmp_path))
    assert names(tmp_path) == ["a.tgz"]


def test_a_link_in_a_zip_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"link": tarfile.SYMTYPE})
    assert "'link' in it is neither file nor folder" in message(lambda: unpack(archive, tmp_path))
    assert names(tmp_path) == ["a.zip"]


def test_too_much_is_refused(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MIN_LIMIT", 10_000)
    monkeypatch.setattr(download, "MAX_EXPANSION", 0.1)
    archive = pack({"a": bytes(6000), "b": bytes(6000)})
    assert "larger than the disk" in message(lambda: unpack(archive, tmp_path))
    assert names(tmp_path / "data") == [archive.name]


def test_what_is_broken_leaves_nothing(pack, tmp_path):
    archive = pack({"a": DATA, "b": hashlib.sha512(DATA).digest() * 1000})
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    assert f"{archive}: cannot be read" in message(lambda: unpack(archive, tmp_path / "data"))
    assert names(tmp_path / "data") == [archive.name]


def test_nothing_is_replaced(pack, tmp_path):
    archive, mine = pack({"a.txt": b"new", "b.txt": b"new"}), tmp_path / "data/b.txt"
    mine.write_text("mine")
    assert f"{mine} is in its way" in message(lambda: unpack(archive, tmp_path / "data"))
    assert mine.read_text() == "mine" and names(tmp_path / "data") == [archive.name, "b.txt"]


# ---------------------------------------------------------------- whole data sets


def test_every_official_data_set_has_a_source():
    sources = tomllib.loads(download.SOURCES.read_text())
    assert set(sources) == set(datasets.READERS) - {"diagnostic", "folder", "csv", "coco"}
    for source in sources.values():
        assert source["page"].startswith("http") and source["files"]
        for _, _, *checksum in source["files"]:
            assert [len(text) in (32, 64) and int(text, 16) for text in checksum] != [False]
    assert "nothing to download for 'folder'" in message(lambda: download.download("folder", "."))


@pytest.fixture
def cub_source(server, tmp_path, monkeypatch):
    """A tiny CUB-200-2011, served as the official one is; returns its archive's name."""
    from layouts import write_cub

    write_cub(tmp_path / "made/CUB_200_2011")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as opened:
        opened.add(tmp_path / "made", ".")
    server.files["/CUB.tgz"] = archive.getvalue()
    checksum = hashlib.md5(archive.getvalue()).hexdigest()
    (tmp_path / "sources.toml").write_text(
        f'[cub]\npage = "http://terms"\naddress = "{server.address}"\nfolders = ["CUB_200_2011"]\n'
        f'files = [["CUB.tgz", "images.txt", "{checksum}"]]\n'
        '[nabirds]\npage = "http://terms"\nfiles = [["nabirds.tar.gz", "images.txt"]]\n'
    )
    monkeypatch.setattr(download, "SOURCES", tmp_path / "sources.toml")
    return server.files["/CUB.tgz"]


def test_the_command_fetches_once_and_reads(server, cub_source, tmp_path, capsys):
    root = tmp_path / "cub"
    command = ["data", "data=cub", f"root={root}", "--download"]
    assert command_line.main(command) == 0
    text = capsys.readouterr().out
    assert "for the terms of use see http://terms" in text and "train" in text
    assert names(root)[:2] == ["CUB.tgz", "CUB_200_2011"]
    (root / "CUB.tgz").unlink()
    assert command_line.main(command) == 0 and len(server.asked) == 1
    assert command_line.main([*command[:2], f"root={root}/CUB_200_2011", "--download"]) == 0
    assert len(server.asked) == 1


def test_an_archive_put_there_by_hand_is_used_if_it_is_right(server, cub_source, tmp_path):
    (tmp_path / "CUB.tgz").write_bytes(cub_source)
    download.download("cub", tmp_path)
    assert (tmp_path / "CUB_200_2011/images.txt").exists() and server.asked == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other/CUB.tgz").write_bytes(b"something else")
    assert "its md5 is" in message(lambda: download.download("cub", tmp_path / "other"))
    assert (tmp_path / "other/CUB.tgz").read_bytes() == b"something else"


def test_what_no_address_serves_is_asked_for_by_name(cub_source, tmp_path):
    root = tmp_path / "nabirds"
    found = message(lambda: download.download("nabirds", root))
    assert f"{root}: nabirds.tar.gz must be downloaded by a person, see http://terms" in found
    root.mkdir()
    (root / "nabirds.tar.gz").write_bytes(cub_source)
    download.download("nabirds", root)
    assert (root / "CUB_200_2011/images.txt").exists()
