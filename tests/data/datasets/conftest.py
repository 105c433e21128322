"""Phantom trees of the data sets of fundus photographs, which all tests share."""

import os
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from data_sets import write_fundus
from samjax.data.datasets import READERS, Pictures
from samjax.data.layouts import fundus

# Of labelme's files, which differ in nothing else. No reader looks at it.
IMAGE_PATH = re.compile(rb'"imagePath": "[^"]*", ')


class Tree(NamedTuple):
    """All files of a data set in its owners' layout; a test puts back what it changes.

    Attributes:
        drawn: the path of each photograph below the root → its label map: 1 vessel, 2 disc, 3 cup.
        read: its reader, of the split and the options; the same call gives the same `Pictures`.
    """

    root: Path
    drawn: dict[str, np.ndarray]
    read: Callable[..., Any]

    def labels(self, dataset: Pictures, index: int) -> np.ndarray:
        """The label map that an example was drawn from."""
        photograph = dataset.cases[index].images[0]
        return self.drawn[photograph.relative_to(self.root).as_posix()]


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> Iterator[None]:
    """Every layout repeats the same three pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fundus, "make_phantom", cache(fundus.make_phantom))
        yield


@pytest.fixture(scope="session")
def trees(tmp_path_factory) -> Callable[[str], Tree]:
    """Data set → its tree, written when first asked for; DRIVE's has labels of the test images.

    Files of the same content are links to one, which cost a tenth of a file: nothing may write
    into them. `data_sets.replaced` puts another file in the place of one.
    """
    put = fundus.Tree.put
    files: dict[tuple[Path, bytes], Path] = {}

    def put_or_link(tree: fundus.Tree, path: str, data: bytes) -> None:
        data = IMAGE_PATH.sub(b"", data)
        first = files.setdefault((tree.root, data), tree.root / path)
        if not first.exists():
            put(tree, path, data)
        else:
            (tree.root / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(first, tree.root / path)

    @cache
    def tree(name: str) -> Tree:
        root = tmp_path_factory.mktemp(name)
        options = {"test_labels": True} if name == "drive" else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fundus.Tree, "put", put_or_link)
            drawn = write_fundus(name, root, **options)
        return Tree(root, drawn, cache(partial(READERS[name], root)))

    return tree
