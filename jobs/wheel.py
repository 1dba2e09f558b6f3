"""The wheel of this actlake, as it is installed here: what ``actlake submit`` sends to a cluster.

It is made from the package's own files, of an editable checkout too, and has the same bytes each time: no working
directory, no tests, and nothing is built or downloaded.
"""

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import actlake
from actlake.storage.errors import BadInputError

#: What the package's folders hold beside these is of no use to a worker: notebooks, caches, what an editor leaves.
_SUFFIXES = {".py", ".toml", ".typed", ".html", ".js", ".css", ".txt"}

_WHEEL = "Wheel-Version: 1.0\nGenerator: actlake\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

#: The earliest time that a zip file can hold.
_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pure Python wheel: a zip file that is installed where it is unpacked onto the path."""

    name: str
    data: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def package(self) -> str:
        """The name under which a cluster keeps it; another content has another name."""
        name, version = self.name.split("-")[:2]
        return f"{name}-{version}-{self.digest[:16]}.zip"


def own_wheel() -> Wheel:
    """Return the wheel of the running actlake."""
    stem = f"actlake-{actlake.__version__}"
    files = dict(_package_files(Path(actlake.__file__).parent)) | _metadata(f"{stem}.dist-info")
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},sha256={_base64(data)},{len(data)}" for name, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    return Wheel(name=f"{stem}-py3-none-any.whl", data=packed(files))


def read_wheel(path: Path) -> Wheel:
    """Read a wheel of actlake; raise ``BadInputError`` for what is none, or wants more than to be unpacked."""
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInputError(f"{path} is no wheel ({error}); leave --wheel out to send the actlake that runs") from error
    if "actlake/__init__.py" not in names or any(".data/" in name.partition("/")[0] + "/" for name in names):
        raise BadInputError(f"{path} is no pure Python wheel of actlake; 'pip wheel --no-deps' makes one of a checkout")
    return Wheel(name=path.name, data=data)


def packed(files: dict[str, bytes]) -> bytes:
    """Return a zip file of these contents; the same ones give the same bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name, _TIME)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return made.getvalue()


def _package_files(root: Path, below: str = "actlake") -> Iterator[tuple[str, bytes]]:
    # In a checkout the areas are links: followed, for the wheel has folders.
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            yield from _package_files(path, f"{below}/{path.name}")
        elif path.suffix in _SUFFIXES and path.is_file():
            yield f"{below}/{path.name}", path.read_bytes()


def _metadata(folder: str) -> dict[str, bytes]:
    text = f"Metadata-Version: 2.1\nName: actlake\nVersion: {actlake.__version__}\n"
    found = {f"{folder}/METADATA": text.encode(), f"{folder}/WHEEL": _WHEEL.encode()}
    try:
        # Zarr finds our data type by them.
        points = distribution("actlake").read_text("entry_points.txt")
    except PackageNotFoundError:
        points = None
    return found | ({} if points is None else {f"{folder}/entry_points.txt": points.encode()})


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
