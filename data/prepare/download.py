"""The official files of the datasets: downloaded, checked, unpacked; or where to get them.

``sources.toml`` lists these files. The content of an archive appears in one step, once all of it is
unpacked. An archive may hold files and folders below its own folder and nothing else, so none can
write elsewhere: ``shutil.unpack_archive`` has no limit of size and lets links pass.
"""

import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from tqdm import tqdm

import ramslib
from ramslib.data.annotations import file_errors
from ramslib.errors import InputError, one_line

SOURCES = Path(__file__).with_name("sources.toml")
ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip")
MAX_EXPANSION = 100  # an archive unpacks to at most this many times its own size,
MIN_LIMIT = 2**30  # or to this many bytes
CHUNK = 2**20


def download(data: str, root: Path | str) -> None:
    """Bring into ``root`` what is missing there of a dataset's official files.

    Existing files are used and never replaced, archives put there by hand too.

    Args:
        data: a name in ``sources.toml``.
        root: folder of the dataset, made where it is missing.

    Raises:
        InputError: nothing to download, files that a person must download (where, and what to
            call them), an address that does not answer, a wrong checksum, an unsafe archive.
    """
    sources = tomllib.loads(SOURCES.read_text())
    if data not in sources:
        raise InputError(f"nothing to download for {data!r}; only for {', '.join(sources)}")
    source, root = sources[data], Path(root).expanduser()
    places = [root, *(root / folder for folder in source.get("folders", ()))]
    wanted = {
        name: "".join(checksum)
        for name, makes, *checksum in source["files"]
        if not any((place / makes).exists() for place in places)
    }
    by_hand = [name for name in wanted if not (root / name).exists()]
    if by_hand and "address" not in source:
        raise InputError(
            f"{root}: {', '.join(by_hand)} must be downloaded by a person, see "
            f"{source['page']}; put that into this folder under this name, and run the same "
            "command again"
        )
    if wanted:
        print(f"{data}: {', '.join(wanted)}; for the terms of use see {source['page']}")
    for name, checksum in wanted.items():
        if name in by_hand:
            download_file(f"{source['address']}/{name}", root / name, checksum)
        else:
            check(root / name, checksum)
        if name.endswith(ARCHIVES):
            unpack(root / name, root)


def download_file(address: str, path: Path, checksum: str = "") -> None:
    """Download a file, resuming where an interrupted call stopped, while each try brings more.

    Args:
        address: http or https.
        path: where it appears, complete and checked; until then it is ``<path>.part``.
        checksum: as of `check`; a file that has another is kept as ``<path>.wrong``.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        before = _size(part)
        try:
            _receive(address, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if _size(part) <= before or isinstance(error, urllib.error.HTTPError):
                why = one_line(error)
                raise InputError(
                    f"{address}: not downloaded ({why}); run the same command again, it "
                    f"resumes after {_size(part):,} bytes, or put the file there by hand: {path}"
                ) from None
    try:
        check(part, checksum)
    except InputError as error:
        os.replace(part, path.with_name(f"{path.name}.wrong"))
        raise InputError(f"{error} ({address}); the file is kept as {path.name}.wrong") from None
    os.replace(part, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(address: str, part: Path) -> None:
    """Append to ``part`` what it lacks of the file at a URL; OSError where that is cut short."""
    have = _size(part)
    headers = {"User-Agent": f"ramslib/{ramslib.__version__}"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(address, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers["Content-Range"] == f"bytes */{have}":
            return  # complete: interrupted between its last byte and the check
        raise
    with answer:
        have *= answer.status == 206  # else the server sends all of it again
        length = answer.headers["Content-Length"]
        total = have + int(length) if length else None
        if total and total - have > shutil.disk_usage(part.parent).free:
            raise OSError(f"{total:,} bytes are more than its disk has room for")
        options = {"desc": part.stem, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
        with (
            tqdm(total=total, initial=have, **options) as bar,
            open(part, "ab" if have else "wb") as out,
        ):
            while chunk := answer.read(CHUNK):
                bar.update(out.write(chunk))
    if total and _size(part) != total:
        raise ConnectionError(f"cut off at {_size(part):,} of {total:,} bytes")


def check(path: Path, checksum: str) -> None:
    """Compare a file with its MD5 or SHA-256 in hexadecimal; "" is not compared."""
    if not checksum:
        return
    kind = {32: "md5", 64: "sha256"}[len(checksum)]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != checksum:
        raise InputError(f"{path}: its {kind} is {found}, not {checksum}; download it again")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip archive into a folder: all of it or nothing, and nothing is replaced.

    Raises:
        InputError: it is broken, holds anything but files and folders below its own folder, or more
            than the disk or `MAX_EXPANSION` allow, or what it holds is there already.
    """
    parts = folder / f".{archive.name}.unpacking"
    shutil.rmtree(parts, ignore_errors=True)  # of a killed call
    parts.mkdir()
    try:
        with file_errors(str(archive)):
            _write_members(archive, parts)
        made = sorted(parts.iterdir())
        for item in made:
            if (folder / item.name).exists():
                raise InputError(
                    f"{archive}: {folder / item.name} is in its way; move it elsewhere"
                )
        for item in made:
            os.replace(item, folder / item.name)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _write_members(archive: Path, folder: Path) -> None:
    room = min(max(MAX_EXPANSION * _size(archive), MIN_LIMIT), shutil.disk_usage(folder).free)
    for name, size, content in tqdm(_members(archive), archive.name, unit=" files"):
        windows = PureWindowsPath(name)
        if windows.anchor or ".." in windows.parts or PurePosixPath(name).is_absolute():
            raise InputError(
                f"{archive}: {name!r} in it leads out of its folder; do not use this archive"
            )
        room -= size + 512  # many empty files take space, too
        if room < 0:
            raise InputError(
                f"{archive}: unpacked, it is larger than the disk, or than {MAX_EXPANSION} times "
                "itself; if you trust it, unpack it by hand"
            )
        target = folder / name
        (target.parent if content else target).mkdir(parents=True, exist_ok=True)
        if content:
            with content, open(target, "wb") as out:
                shutil.copyfileobj(content, out, CHUNK)


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    """Name, size and content of each file in an archive; folders have no content."""
    other = "{}: {!r} in it is neither file nor folder; if you trust it, unpack it by hand"
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise InputError(other.format(archive, entry.filename))
                content = None if entry.is_dir() else opened.open(entry)
                yield entry.filename, entry.file_size, content
        return
    with tarfile.open(archive) as opened:
        while entry := opened.next():
            if not (entry.isfile() or entry.isdir()):
                raise InputError(other.format(archive, entry.name))
            yield entry.name, entry.size, opened.extractfile(entry)
            opened.members.clear()  # a list of all members so far: 675,000 for iNaturalist
