"""What a reader says of a folder that holds something else: what is there, what it expects."""

import pytest

from data_sets import touch
from samjax.data import DataError
from samjax.data.datasets import READERS

# Those that look for files of a fixed name; and words of the tree that is shown of some.
FUNDUS = (
    *("chasedb1", "drive", "fives", "hrf", "stare"),
    *("drishti_gs", "g1020", "grape", "idrid", "origa", "papila", "refuge2"),
)
VOLUMES = (
    *("synapse", "synapse_samed", "amos22", "lits", "kits19"),
    *("brats_men", "brats2020", "promise12", "la2018"),
)
WORDS = {
    "chasedb1": "Image_01L.jpg",
    "drive": "training/images/21_training.tif",
    "idrid": "train/od_masks/IDRiD_01_OD",
    "papila": "Contours/RET002OD_disc_exp1.txt",
}


@pytest.mark.parametrize("name", [*FUNDUS, *VOLUMES])
def test_another_tree_is_shown_beside_the_expected_one(tmp_path, name):
    touch(tmp_path / "elsewhere" / "holiday.jpg", tmp_path / "notes.txt")
    found = r"found there: elsewhere/, notes\.txt\); expected\n+ +\S"
    with pytest.raises(DataError, match=found) as error:
        READERS[name](tmp_path)
    assert WORDS.get(name, "") in str(error.value)
    with pytest.raises(DataError, match=r"absent: no .*no such folder"):
        READERS[name](tmp_path / "absent")
    with pytest.raises(ValueError, match=r"split 'tain': expected one of train, (test|val)"):
        READERS[name](tmp_path, "tain")
