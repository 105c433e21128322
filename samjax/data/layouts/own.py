"""Phantoms in the formats in which people keep data of their own: nnU-Net, COCO, CSV, DICOM.

Each writer takes the folder to write into, which it makes, and returns what it drew.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from samjax.data.volumes import Volume, library, write_labels

_ORGANS = ("organ", "lesion")


def write_nnunet(
    root: str | Path, *, train: int = 3, test: int = 1, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes a data set of nnU-Net v2: CT of 20×16×6 voxels with an organ and a lesion in it.

    Returns case to label map, uint8 (i, j, k), of imagesTr and imagesTs (with labelsTs).

    Raises ``ImportError`` where nibabel is not installed.
    """
    nibabel = library("nibabel")
    root = Path(root)
    affine = np.diag([-0.8, -0.8, 3.0, 1.0])
    drawn = {}
    for number in range(train + test):
        part, name = "Tr" if number < train else "Ts", f"case_{number:03d}"
        for folder in ("images", "labels"):
            (root / f"{folder}{part}").mkdir(parents=True, exist_ok=True)
        voxels, labels = _volume((20, 16, 6), np.random.default_rng((seed, number)))
        image = nibabel.Nifti1Image(voxels, affine)
        nibabel.save(image, root / f"images{part}" / f"{name}_0000.nii.gz")
        write_labels(root / f"labels{part}" / f"{name}.nii.gz", labels, Volume(voxels, affine))
        drawn[name] = labels
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(described), "utf-8")
    return drawn


def write_coco(
    root: str | Path, *, split: str = "train", count: int = 3, size: int = 48, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes pictures with polygons and run lengths: a cell, on it a nucleus, nothing on the last.

    Category ids are 3 (nucleus) and 7 (cell), so nucleus is label 1.

    Returns picture name to label map, uint8 (size, size).
    """
    root = Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations, drawn = [], [], {}
    for number in range(1, count + 1):
        name, labels = f"picture_{number:03d}", np.zeros((size, size), np.uint8)
        if number < count:
            x, y = rng.integers(4, size // 3, 2).tolist()
            side = size // 2
            labels[y : y + side, x : x + side] = 2
            nucleus = np.zeros_like(labels)
            nucleus[y + side // 4 : y + side // 2, x + side // 4 : x + side // 2] = 1
            labels[nucleus == 1] = 1
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            runs = {"size": [size, size], "counts": _column_runs(nucleus)}
            # The nucleus first: what lies on top is decided by size, not by order.
            for category, shape in ((3, runs), (7, [corners])):
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": number, "iscrowd": 0},
                        **{"category_id": category, "segmentation": shape},
                    }
                )
        _save_picture(root / split / f"{name}.png", labels, rng)
        images.append({"id": number, "file_name": f"{name}.png", "height": size, "width": size})
        drawn[name] = labels
    categories = [{"id": 7, "name": "cell"}, {"id": 3, "name": "nucleus"}]
    described = {"images": images, "annotations": annotations, "categories": categories}
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(described), "utf-8")
    return drawn


def write_csv(root: str | Path, *, count: int = 6, size: int = 32, seed: int = 0) -> Path:
    """Writes a table of pictures with binary masks (0, 255), two pictures a patient.

    The last third of the patients, one at least, is the split "test". Returns the table.
    """
    root = Path(root)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    patients = (count + 1) // 2
    rows = [("image", "mask", "patient", "split", "name")]
    for number in range(count):
        name, patient = f"eye{number:02d}", number // 2
        picture = Image.new("L", (size, size))
        x, y = rng.integers(size // 8, size // 2, 2).tolist()
        ImageDraw.Draw(picture).ellipse((x, y, x + size // 3, y + size // 4), 255)
        picture.save(root / "masks" / f"{name}.png")
        _save_picture(root / "images" / f"{name}.png", np.asarray(picture) // 255, rng)
        part = "test" if patient >= patients - max(patients // 3, 1) else "train"
        files = (f"images/{name}.png", f"masks/{name}.png")
        rows.append((*files, f"patient {patient}", part, name))
    table = root / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return table


def write_dicom_seg(
    root: str | Path, *, cases: int = 2, slices: int = 5, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes CT series of 16×24 pixels, each with a binary SEG of an organ and a lesion.

    The files are named against their order in space, and the SEG has no empty frames.

    Returns case to label map, uint8 (i, j, k).

    Raises ``ImportError`` where highdicom is not installed.
    """
    drawn = {}
    for number in range(cases):
        folder = Path(root) / f"case{number}"
        (folder / "ct").mkdir(parents=True, exist_ok=True)
        voxels, labels = _volume((24, 16, slices), np.random.default_rng((seed, number)))
        headers = [_save_slice(folder / "ct", voxels, number, k) for k in range(slices)]
        seg = make_seg(headers, labels.transpose(2, 1, 0))
        seg.save_as(folder / "seg.dcm")
        drawn[f"case{number}"] = labels
    return drawn


def make_seg(headers: list[Any], labels: np.ndarray, **options: Any) -> Any:
    """A SEG of highdicom with the segments organ and lesion.

    Args:
        headers: pydicom's, of the slices.
        labels: uint8 (k, rows, columns), a frame for each header.
        options: over those of `highdicom.seg.Segmentation`.
    """
    import highdicom
    from highdicom.sr.coding import CodedConcept

    tissue = CodedConcept("85756007", "SCT", "Tissue")
    descriptions = [
        highdicom.seg.SegmentDescription(
            number, name, tissue, tissue, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for number, name in enumerate(_ORGANS, start=1)
    ]
    settings = {
        **{"segmentation_type": "BINARY", "segment_descriptions": descriptions},
        **{"series_instance_uid": f"{headers[0].SeriesInstanceUID}.1", "series_number": 2},
        **{"sop_instance_uid": f"{headers[0].SeriesInstanceUID}.1.1", "instance_number": 1},
        **{"manufacturer": "samjax", "manufacturer_model_name": "phantom"},
        **{"software_versions": "1", "device_serial_number": "1"},
    }
    return highdicom.seg.Segmentation(headers, labels, **(settings | options))


def _save_slice(folder: Path, voxels: np.ndarray, case: int, k: int) -> Any:
    """Slice ``k`` as a DICOM file; its header."""
    try:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
    except ImportError as error:
        raise ImportError("DICOM SEG needs highdicom: pip install 'samjax[dicom]'") from error
    study = f"1.2.826.0.1.3680043.10.511.{case + 1}"
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {
        **{"SOPClassUID": CTImageStorage, "SOPInstanceUID": f"{study}.1.{k + 1}"},
        **{"StudyInstanceUID": study, "SeriesInstanceUID": f"{study}.1"},
        **{"FrameOfReferenceUID": f"{study}.2", "Modality": "CT", "SeriesNumber": 1},
        **{"PatientID": f"P{case}", "PatientName": f"Phantom^{case}", "PatientBirthDate": ""},
        **{"PatientSex": "O", "StudyID": "1", "AccessionNumber": "", "StudyDate": "20200101"},
        **{"StudyTime": "120000", "ReferringPhysicianName": "", "InstanceNumber": k + 1},
        **{"PositionReferenceIndicator": "", "Manufacturer": "samjax"},
        **{"ImagePositionPatient": [-10.0, -20.0, 30.0 + 2.5 * k], "SliceThickness": 2.5},
        **{"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [0.75, 0.5]},
        **{"Rows": voxels.shape[1], "Columns": voxels.shape[0], "SamplesPerPixel": 1},
        **{"PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16},
        **{"HighBit": 15, "PixelRepresentation": 1, "RescaleSlope": 1, "RescaleIntercept": 0},
    }
    for name, value in values.items():
        setattr(header, name, value)
    header.PixelData = np.ascontiguousarray(voxels[..., k].T).tobytes()
    header.save_as(folder / f"{99 - k:03d}.dcm", enforce_file_format=True)
    return header


def _volume(shape: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Voxels int16 in Hounsfield units, and labels uint8: an organ, in it a lesion."""
    labels = np.zeros(shape, np.uint8)
    i, j = rng.integers(2, 5, 2).tolist()
    labels[i : i + 9, j : j + 8, 1:-1] = 1
    labels[i + 2 : i + 6, j + 3 : j + 6, 2:-2] = 2
    units = np.choose(labels, (-90, 60, 130)) + rng.normal(0, 8, shape)
    return units.round().astype(np.int16), labels


def _save_picture(file: Path, labels: np.ndarray, rng: np.random.Generator) -> None:
    colours = np.array([(230, 205, 220), (110, 60, 140), (205, 140, 180)])
    noisy = colours[labels] + rng.normal(0, 5, (*labels.shape, 3))
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file)


def _column_runs(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, column by column, of 0 first."""
    pixels = mask.ravel(order="F")
    steps = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *steps.tolist(), pixels.size]).tolist()
    return [0, *runs] if pixels[0] else runs
