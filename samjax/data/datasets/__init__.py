"""Readers of data sets in the layouts in which their owners publish them, one file each."""

from __future__ import annotations

from collections.abc import Callable

from samjax.data.datasets.amos22 import amos22
from samjax.data.datasets.base import Case, Pictures, Scan, Scans
from samjax.data.datasets.brats import brats2020, brats_men
from samjax.data.datasets.chasedb1 import chasedb1
from samjax.data.datasets.chestxray8 import chestxray8
from samjax.data.datasets.coco import coco
from samjax.data.datasets.csv_table import csv_table
from samjax.data.datasets.dicom_seg import dicom_seg
from samjax.data.datasets.drishti_gs import drishti_gs
from samjax.data.datasets.drive import drive
from samjax.data.datasets.fives import fives
from samjax.data.datasets.g1020 import g1020
from samjax.data.datasets.grape import grape
from samjax.data.datasets.hrf import hrf
from samjax.data.datasets.idrid import idrid
from samjax.data.datasets.image_folder import image_folder
from samjax.data.datasets.kits19 import kits19
from samjax.data.datasets.la2018 import la2018
from samjax.data.datasets.lits import lits
from samjax.data.datasets.msd import msd
from samjax.data.datasets.nnunet import nnunet
from samjax.data.datasets.origa import origa
from samjax.data.datasets.papila import papila
from samjax.data.datasets.promise12 import promise12
from samjax.data.datasets.refuge2 import refuge2
from samjax.data.datasets.stare import stare
from samjax.data.datasets.synapse import synapse
from samjax.data.datasets.synapse_samed import synapse_samed

# By the name that the command lines know it by.
READERS: dict[str, Callable[..., Pictures | Scans]] = {
    "chasedb1": chasedb1,
    "drive": drive,
    "fives": fives,
    "hrf": hrf,
    "stare": stare,
    "drishti_gs": drishti_gs,
    "g1020": g1020,
    "grape": grape,
    "origa": origa,
    "papila": papila,
    "refuge2": refuge2,
    "idrid": idrid,
    "synapse": synapse,
    "synapse_samed": synapse_samed,
    "amos22": amos22,
    "lits": lits,
    "kits19": kits19,
    "la2018": la2018,
    "promise12": promise12,
    "brats_men": brats_men,
    "brats2020": brats2020,
    "msd": msd,
    "chestxray8": chestxray8,
    "nnunet": nnunet,
    "coco": coco,
    "csv": csv_table,
    "folder": image_folder,
    "dicom_seg": dicom_seg,
}

__all__ = [
    "READERS",
    "Case",
    "Pictures",
    "Scan",
    "Scans",
    "amos22",
    "brats2020",
    "brats_men",
    "chasedb1",
    "chestxray8",
    "coco",
    "csv_table",
    "dicom_seg",
    "drishti_gs",
    "drive",
    "fives",
    "g1020",
    "grape",
    "hrf",
    "idrid",
    "image_folder",
    "kits19",
    "la2018",
    "lits",
    "msd",
    "nnunet",
    "origa",
    "papila",
    "promise12",
    "refuge2",
    "stare",
    "synapse",
    "synapse_samed",
]
