"""A dataset in the cache of `datasets`, as a download leaves it behind."""

import json
from pathlib import Path

import datasets


def prepare(cache, commit, texts, name="org/set"):
    """Write CACHE/OWNER___TITLE/default/0.0.0/COMMIT with a split `train` of texts."""
    title = name.rpartition("/")[2]
    folder = cache / name.replace("/", "___") / "default" / "0.0.0" / commit
    scratch = cache / "scratch" / commit
    scratch.mkdir(parents=True)
    file = scratch / "p.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=scratch)
    (arrow,) = [entry["filename"] for entry in table.cache_files]
    made = Path(arrow).parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    made.rename(folder)
    (folder / "json-train.arrow").rename(folder / f"{title}-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    info.update(dataset_name=title, config_name="default", builder_name="json")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
