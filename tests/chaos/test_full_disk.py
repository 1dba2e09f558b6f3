"""A disk that fills up: a message that says so and what to do, nothing half made, and the next run goes on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.campaign import Run, World
from runs import contents

from actlake.storage.listing import list_objects
from actlake.storage.stores import Store


class Disk:
    """A file system in memory of a size that can be changed."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        self._call("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder))

    def resize(self, nbytes: int) -> None:
        self._call("mount", "-o", f"remount,size={nbytes}", str(self.folder))

    def close(self) -> None:
        self._call("umount", "--lazy", str(self.folder))

    @staticmethod
    def _call(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PermissionError(done.stderr.strip())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path / "disk", 1 << 20)
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield made
    made.close()


@pytest.mark.parametrize("free", [16 << 10, 160 << 10, 400 << 10])
def test_a_full_disk_is_named_and_the_next_run_goes_on(world: World, disk: Disk, tmp_path: Path, free: int) -> None:
    """Full in the corpus, in the metadata, or in the shards."""
    run = Run(world, tmp_path / "run", dataset=str(disk.folder / "ds"))
    disk.resize(free)
    driver = run.start()
    assert driver.wait(120) in (1, 2)
    said = " ".join(run.log.read_text().split())
    assert "No space left on device" in said
    assert "free some space" in said
    assert "Traceback" not in said
    if (disk.folder / "ds").exists():
        whole = contents(disk.folder / "ds")
        assert {key: data for key, data in whole.items() if "commits/" in key}.items() <= world.contents.items()
        assert [found.key for found in list_objects(Store(disk.folder)) if ".actlake-" in found.key] == []
    disk.resize(64 << 20)
    run.resume()
    assert contents(disk.folder / "ds") == world.contents
