"""PROMISE12: the prostate in 50 labelled T2-weighted MR scans, and 30 for testing.

Litjens et al., Medical Image Analysis 18, 2014, https://zenodo.org/records/8026660 (terms there).
One scan a patient. The labels of the test set are not published; H-SAM (arXiv:2403.18271,
preprocess_PROMISE12.py) trains on three of the 50 and tests on ten others. How it made grey values
of the signal is not published either; here it is by percentiles.
"""

from __future__ import annotations

from pathlib import Path

from samjax.data.datasets.base import Case, Scans, find_files, one_of, wrong_tree

TREE = """
    training_data/Case00.mhd, Case00.raw, Case00_segmentation.mhd, Case00_segmentation.raw … Case49
    test_data/Case00.mhd, Case00.raw … Case29                        (for split="test" only)
"""
HSAM_TRAIN = ("Case29", "Case14", "Case05")
HSAM_TEST = (
    *("Case16", "Case35", "Case34", "Case49", "Case23"),
    *("Case12", "Case28", "Case43", "Case20", "Case13"),
)


def promise12(root: str | Path, split: str = "train") -> Scans:
    """Reads PROMISE12.

    Args:
        root: see ``TREE``; the training scans may lie in any folders that are not called test…
            or live….
        split: "train" (the 50 labelled), "test" (30, no labels), "hsam3" or "hsam3_test" (H-SAM's
            3 and 10 of the 50).

    Raises:
        DataError: another tree, or a case of H-SAM's that is missing. ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "hsam3", "hsam3_test"))
    files = {}
    for file in find_files(root, "**/Case[0-9][0-9].mhd", TREE):
        folders = [part.lower() for part in file.relative_to(root).parts[:-1]]
        if any(part.startswith("live") for part in folders):
            continue
        if any(part.startswith("test") for part in folders) == (split == "test"):
            files[file.stem] = file
    names = {"hsam3": HSAM_TRAIN, "hsam3_test": HSAM_TEST}.get(split, tuple(files))
    if missing := [name for name in names if name not in files]:
        raise wrong_tree(root, f"{missing[0]}.mhd", TREE)
    cases = []
    for name in names:
        label = files[name].with_name(f"{name}_segmentation.mhd")
        cases.append(Case(name, (files[name],), () if split == "test" else (label,)))
    return Scans(
        dataset="promise12", root=root, split=split, cases=tuple(cases), class_names=("prostate",)
    )
