"""What reading through SimpleITK leaves behind in the process."""

import locale

import numpy as np
import pytest

from samjax.data.volumes import read_volume

sitk = pytest.importorskip("SimpleITK")


def test_the_locale_stays(tmp_path):
    """GDCM sets the C locale, in which Python opens texts as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    image = sitk.GetImageFromArray(np.arange(30, dtype=np.int16).reshape(5, 6))
    sitk.WriteImage(image, str(tmp_path / "slice.dcm"))
    locale.setlocale(locale.LC_ALL, before)
    assert read_volume(tmp_path / "slice.dcm").array.shape == (6, 5, 1)
    assert locale.setlocale(locale.LC_ALL) == before
